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
    """Who belongs to whom, and in which order. All vectors are int64, on the CPU.

    Tokens and turns are listed in the order of time unless `token_time` and `turn_time` say otherwise.
    """

    turn_of_token: Tensor
    """(K,) turn of each action token."""
    traj_of_turn: Tensor
    """(M,) trajectory of each turn."""
    group_of_traj: Tensor
    """(N,) group of each trajectory, numbered 0..G-1."""
    token_time: Tensor | None = None
    """(K,) anything that grows with time inside a trajectory; None: tokens are listed in the order of time."""
    turn_time: Tensor | None = None
    """(M,) the same for turns."""

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
    def token_rank(self) -> Tensor:
        """(K,) 0, 1, 2...: the how-manieth action token of its trajectory each one is."""
        return rank(self.traj_of_token, self.N, self.token_time)

    @cached_property
    def turn_rank(self) -> Tensor:
        """(M,) 0, 1, 2...: the how-manieth turn of its trajectory each one is."""
        return rank(self.traj_of_turn, self.N, self.turn_time)

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


def rank(owner: Tensor, size: int, time: Tensor | None = None) -> Tensor:
    """Returns each entry's place among those of its owner, 0 first, by `time` (None: in the order listed)."""
    order = torch.arange(len(owner)) if time is None else torch.argsort(time, stable=True)
    order = order[torch.argsort(owner[order], stable=True)]
    n = torch.bincount(owner, minlength=size)
    first = n.cumsum(0) - n
    out = torch.empty_like(owner)
    out[order] = torch.arange(len(owner)) - first[owner[order]]
    return out


def _place(owner: Tensor, place: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns where each entry stands once sorted by (owner, rank), and every owner's first place and length."""
    length = torch.bincount(owner, minlength=size)
    first = length.cumsum(0) - length
    return first[owner] + place, first, length


def suffix_sum(values: Tensor, owner: Tensor, place: Tensor, size: int, gamma: float = 1.0) -> Tensor:
    """Returns float64 discounted sums to the end of each owner: out_k = v_k + gamma out_(next of the same owner).

    Args:
        values: any length.
        owner: of each value.
        place: its rank among its owner's values (`Index.token_rank`, `Index.turn_rank`).
        size: number of owners.
        gamma: discount per entry.
    """
    at, first, length = _place(owner, place, size)
    line = torch.empty(len(values), dtype=torch.float64)
    line[at] = values.double()
    if gamma != 1.0:
        # Sums of 1, 2, 4... entries in turn: log2(longest) passes, whether owners are many or long.
        left = torch.empty_like(owner)
        left[at] = length[owner] - 1 - place
        step, weight, longest = 1, gamma, int(length.max()) if size else 0
        while step < longest and weight > 0:
            line[:-step] += weight * torch.where(left[:-step] >= step, line[step:], 0.0)
            step, weight = 2 * step, weight * weight
        return line[at]
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, owner, values.double())
    running = line.cumsum(0)
    before = torch.where(first > 0, running[(first - 1).clamp(min=0)], 0.0) if len(line) else first.double()
    return total[owner] - (running[at] - before[owner]) + values.double()


def following(values: Tensor, owner: Tensor, place: Tensor, size: int) -> Tensor:
    """Returns the value of the next entry of the same owner; 0 after the last."""
    at, _, length = _place(owner, place, size)
    line = torch.zeros(len(values) + 1, dtype=torch.float64)
    line[at] = values.double()
    return torch.where(place + 1 < length[owner], line[at + 1], 0.0)
