"""Ground truth: the environment's own step rewards as process rewards (arXiv 2509.19199, Table 3, "ground-truth PR").

    A_t = A^E_i + alpha (r_t - mean(R_s)) / std(R_s)          r_t = the environment's reward of turn t, see `oprl`

OPRL with ``rewards: environment``: nothing is learned, so it tells what the PRM's learning is worth.
"""

from __future__ import annotations

from typing import Literal

from agentrl.credit.base import CreditMethod
from agentrl.credit.oprl import OPRLOptions, oprl


class GroundTruthOptions(OPRLOptions):
    """Options of OPRL, but for those of a PRM."""

    rewards: Literal["environment"] = "environment"
    """Always the environment's."""


GROUND_TRUTH = CreditMethod("ground_truth", GroundTruthOptions, oprl, needs=frozenset({"turn_rewards"}))
