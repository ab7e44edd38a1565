"""Three index vectors instead of two layouts.

An agent's batch is ragged: groups have trajectories, trajectories have turns, turns have action tokens. It stays so:

    turn_of_token (K,)     traj_of_turn (M,)     group_of_traj (N,)        only action tokens are listed

Every statistic is then a line or two of `index_add`, and gives the same answer however tokens were laid out in rows.
All sums run in float64: they are tiny next to a model's forward pass, and credit should not depend on summation order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Index:
    """Who belongs to whom. All vectors are int64, on the CPU, and non-decreasing in `turn_of_token`, `traj_of_turn`."""

    turn_of_token: Tensor
    """(K,) turn of each action token."""
    traj_of_turn: Tensor
    """(M,) trajectory of each turn."""
    group_of_traj: Tensor
    """(N,) group of each trajectory, numbered 0..G-1."""

    @property
    def K(self) -> int:
        return len(self.turn_of_token)

    @property
    def M(self) -> int:
        return len(self.traj_of_turn)

    @property
    def N(self) -> int:
        return len(self.group_of_traj)

    @cached_property
    def G(self) -> int:
        return int(self.group_of_traj.max()) + 1 if self.N else 0

    @cached_property
    def traj_of_token(self) -> Tensor:
        """(K,)"""
        return self.traj_of_turn[self.turn_of_token]

    @cached_property
    def group_of_turn(self) -> Tensor:
        """(M,)"""
        return self.group_of_traj[self.traj_of_turn]

    @cached_property
    def tokens_per_turn(self) -> Tensor:
        """(M,) float64"""
        return count(self.turn_of_token, self.M)

    @cached_property
    def turns_per_traj(self) -> Tensor:
        """(N,) float64"""
        return count(self.traj_of_turn, self.N)

    @cached_property
    def tokens_per_traj(self) -> Tensor:
        """(N,) float64"""
        return count(self.traj_of_token, self.N)


def count(owner: Tensor, size: int) -> Tensor:
    """Returns (size,) float64: how many entries each owner has."""
    return torch.bincount(owner, minlength=size).double()


def segment_sum(values: Tensor, owner: Tensor, size: int) -> Tensor:
    """Returns (size,) float64 sums of `values` (any length) by `owner`."""
    return torch.zeros(size, dtype=torch.float64).index_add_(0, owner, values.double())


def segment_mean(values: Tensor, owner: Tensor, size: int) -> Tensor:
    """Returns (size,) float64 means; 0 where an owner has no entry. The mean of equal values is exactly that value."""
    values = values.double()
    # Summed from each segment's smallest value: 0.1 + 0.1 + 0.1 is not 0.3, and equal values would have a variance.
    low = torch.zeros(size, dtype=torch.float64).scatter_reduce(0, owner, values, "amin", include_self=False)
    return low + segment_sum(values - low[owner], owner, size) / count(owner, size).clamp(min=1)


def segment_std(values: Tensor, owner: Tensor, size: int, ddof: int = 1) -> Tensor:
    """Returns (size,) float64 standard deviations; 0 where an owner has no more than `ddof` entries."""
    n = count(owner, size)
    deviation = values.double() - segment_mean(values, owner, size)[owner]
    variance = segment_sum(deviation**2, owner, size) / (n - ddof).clamp(min=1)
    return torch.where(n > ddof, variance.sqrt(), 0.0)
