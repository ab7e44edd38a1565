"""RLOO (arXiv 2402.14740): the outcome minus the mean outcome of the group's other trajectories.

    A_i = R_i - mean_{j != i} R_j = n/(n-1) (R_i - mean_g R)

Groups of one give 0.
"""

from __future__ import annotations

import torch

from agentrl.credit.base import Advantage, CreditMethod, Options, Signals, Singleton, broadcast, episode_advantage


class RLOOOptions(Options):
    singleton: Singleton = "zero"
    """What a group of one gets: 0, or (``raw``) its outcome, as in verl."""


def rloo(signals: Signals, options: RLOOOptions) -> Advantage:
    """Returns the leave-one-out outcome on every action token (K,)."""
    index = signals.index
    episode = episode_advantage(index, signals.outcome, "rloo", singleton=options.singleton)
    return broadcast(index, episode, torch.zeros(index.M, dtype=torch.float64))


RLOO = CreditMethod("rloo", RLOOOptions, rloo)
