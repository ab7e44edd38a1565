"""What every credit method takes and returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from agentrl.batch.index import Index, count, segment_mean, segment_std

Tensor = torch.Tensor


class Options(BaseModel):
    """Base of a method's options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Signals:
    """Everything a method may look at. Detached, on the CPU."""

    index: Index
    outcome: Tensor
    """(N,) outcome reward of each trajectory."""
    token_reward: Tensor | None = None
    """(K,) implicit process reward of each action token, in reward units (beta x nats); None without a PRM."""
    prm_updates: int = 0
    """Optimiser steps that the PRM has had so far."""
    prm_skill: float | None = None
    """How well the PRM ordered this batch's pairs before it saw them, beyond what length alone predicts: 0..1."""


@dataclass(frozen=True)
class Advantage:
    """A method's answer. The two terms are kept apart for the report; `token` is what the policy trains on."""

    token: Tensor
    """(K,) float32 advantage of each action token."""
    episode: Tensor
    """(M,) float32 part of it that the whole episode shares."""
    step: Tensor
    """(M,) float32 part that is the turn's own (already weighted)."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CreditMethod:
    """A method: its name, options, function and needs."""

    name: str
    options_type: type[Options]
    function: Callable[[Signals, Any], Advantage]
    needs_prm: bool = False

    def __call__(self, signals: Signals, options: Options) -> Advantage:
        return self.function(signals, options)


EpisodeEstimator = Literal["grpo", "rloo", "dr_grpo"]

EPS = 1e-6
"""Added to standard deviations (algorithms.md 0.4), in the unit of what is divided."""


def zscore(values: Tensor, owner: Tensor, size: int, *, ddof: int = 1, eps: float = EPS) -> Tensor:
    """Returns float64 (x - mean)/(std + eps) inside each segment.

    Segments of one, and segments without variance, give 0 (algorithms.md 0.4: a raw reward never leaks through).
    """
    mean = segment_mean(values, owner, size)[owner]
    return (values.double() - mean) / (segment_std(values, owner, size, ddof)[owner] + eps)


def leave_one_out(values: Tensor, owner: Tensor, size: int) -> Tensor:
    """Returns float64 x_i minus the mean of the *other* entries of its segment; 0 in segments of one."""
    n = count(owner, size)[owner]
    centred = values.double() - segment_mean(values, owner, size)[owner]
    return torch.where(n > 1, centred * n / (n - 1).clamp(min=1), 0.0)


def episode_advantage(index: Index, outcome: Tensor, estimator: EpisodeEstimator, *, ddof: int = 1) -> Tensor:
    """Returns (N,) float64: each trajectory's outcome against its group (algorithms.md 6).

    Trajectories without action tokens are left out of the group's statistics and get 0 (algorithms.md 1.7).
    """
    acting = index.tokens_per_traj > 0
    owner, size, values = index.group_of_traj[acting], index.G, outcome.double()[acting]
    if estimator == "grpo":
        advantage = zscore(values, owner, size, ddof=ddof)
    elif estimator == "rloo":
        advantage = leave_one_out(values, owner, size)
    else:
        # The mean of one is that one: a group of one gives 0 here as well.
        advantage = values - segment_mean(values, owner, size)[owner]
    return torch.zeros(index.N, dtype=torch.float64).masked_scatter(acting, advantage)


def broadcast(index: Index, episode: Tensor, step: Tensor, metrics: dict[str, float] | None = None) -> Advantage:
    """Spreads an episode term (N,) and a step term (M,) over turns and their action tokens."""
    per_turn = episode[index.traj_of_turn]
    token = (per_turn + step)[index.turn_of_token]
    return Advantage(token.float(), per_turn.float(), step.float(), metrics or {})
