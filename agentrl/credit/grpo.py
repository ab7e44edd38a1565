"""GRPO (arXiv 2402.03300): the outcome, standardised inside the group, shared by every token of the episode.

    A_i = (R_i - mean_g R) / (std_g R + 1e-6)        std with ddof 1; groups of one and groups without variance give 0

`scale=False` leaves the division out. The method `dr_grpo` (Dr. GRPO, arXiv 2503.20783) is that preset; pair it with
`policy_update.aggregation: seq-mean-token-sum-norm`, its other half: no division by the length of an episode.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from agentrl.batch.index import segment_std
from agentrl.credit.base import EPS, Advantage, CreditMethod, Options, Signals, Singleton, broadcast, episode_advantage


class GRPOOptions(Options):
    scale: Literal["group", "batch"] | bool = True
    """Divide by the group's standard deviation (true or ``group``), by that of all outcomes of the batch (``batch``, as
    TRL's `scale_rewards`), or by nothing (false)."""
    ddof: int = 1
    """Of that standard deviation: 1 divides by n - 1."""
    eps: float = Field(default=EPS, ge=0)
    """Added to it, in outcome units (verl 1e-6, TRL 1e-4)."""
    singleton: Singleton = "zero"
    """What a group of one gets: 0, or (``raw``) its outcome, as in verl."""


def grpo(signals: Signals, options: GRPOOptions) -> Advantage:
    """Returns the group-standardised outcome on every action token (K,)."""
    index = signals.index
    if options.scale in (True, "group"):
        episode = episode_advantage(
            index, signals.outcome, "grpo", ddof=options.ddof, eps=options.eps, singleton=options.singleton
        )
    else:
        episode = episode_advantage(index, signals.outcome, "dr_grpo", singleton=options.singleton)
    if options.scale == "batch":
        acting = index.tokens_per_traj > 0
        one = torch.zeros(int(acting.sum()), dtype=torch.int64)
        episode = episode / (segment_std(signals.outcome[acting], one, 1, options.ddof) + options.eps)
    return broadcast(index, episode, torch.zeros(index.M, dtype=torch.float64))


GRPO = CreditMethod("grpo", GRPOOptions, grpo)


class DrGRPOOptions(Options):
    pass


def dr_grpo(signals: Signals, options: DrGRPOOptions) -> Advantage:
    """Returns the group-centred outcome on every action token (K,): `grpo` with `scale=False`."""
    return grpo(signals, GRPOOptions(scale=False))


DR_GRPO = CreditMethod("dr_grpo", DrGRPOOptions, dr_grpo)
