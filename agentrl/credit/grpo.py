"""GRPO (arXiv 2402.03300): the outcome, standardised inside the group, shared by every token of the episode.

    A_i = (R_i - mean_g R) / (std_g R + 1e-6)        std with ddof 1; groups of one and groups without variance give 0

`scale=False` leaves the division out. The method `dr_grpo` (Dr. GRPO, arXiv 2503.20783) is that preset; pair it with
`policy_update.aggregation: seq-mean-token-sum-norm`, its other half: no division by the length of an episode.
"""

from __future__ import annotations

import torch

from agentrl.credit.base import Advantage, CreditMethod, Options, Signals, broadcast, episode_advantage


class GRPOOptions(Options):
    scale: bool = True
    """Divide by the group's standard deviation."""
    ddof: int = 1
    """Of that standard deviation: 1 divides by n - 1."""


def grpo(signals: Signals, options: GRPOOptions) -> Advantage:
    """Returns the group-standardised outcome on every action token (K,)."""
    index = signals.index
    estimator = "grpo" if options.scale else "dr_grpo"
    episode = episode_advantage(index, signals.outcome, estimator, ddof=options.ddof)  # type: ignore[arg-type]
    return broadcast(index, episode, torch.zeros(index.M, dtype=torch.float64))


GRPO = CreditMethod("grpo", GRPOOptions, grpo)


class DrGRPOOptions(Options):
    pass


def dr_grpo(signals: Signals, options: DrGRPOOptions) -> Advantage:
    """Returns the group-centred outcome on every action token (K,): `grpo` with `scale=False`."""
    return grpo(signals, GRPOOptions(scale=False))


DR_GRPO = CreditMethod("dr_grpo", DrGRPOOptions, dr_grpo)
