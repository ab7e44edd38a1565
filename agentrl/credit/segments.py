"""Segments of an episode between a token and the whole: turns, or stretches between spikes of the policy's entropy.

PRPO (arXiv 2601.07182) cuts a response where the policy was unsure: at the `spikes` action tokens of highest entropy,
at least `min_gap` tokens apart. A spike begins a segment, and a trajectory's first action token begins its first.

Turn borders cut as well, so that no segment spans two turns, and count like any other cut [our extension]: the spikes
are chosen over all action tokens of the trajectory, and keep their distance from the borders of their turns. With one
turn this is the paper's rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from agentrl.batch.index import Index, rank

Tensor = torch.Tensor
Placement = Literal["positional", "nms"]


@dataclass(frozen=True)
class Segments:
    """Which action tokens belong together."""

    of_token: Tensor
    """(K,) int64 segment of each action token."""
    traj: Tensor
    """(S,) int64 trajectory of each segment."""

    def __len__(self) -> int:
        return len(self.traj)


def turn_segments(index: Index) -> Segments:
    """One segment per turn with action tokens."""
    acting = index.tokens_per_turn > 0
    return Segments((acting.long().cumsum(0) - 1)[index.turn_of_token], index.traj_of_turn[acting])


def entropy_segments(
    index: Index, entropy: Tensor, *, spikes: int, min_gap: int, threshold: float = 0.0, placement: Placement
) -> Segments:
    """Cuts every trajectory's action tokens at its entropy spikes and at the borders of its turns.

    Args:
        index: who belongs to whom.
        entropy: (K,) nats.
        spikes: most spikes per trajectory. Equal entropies: the earlier one first.
        min_gap: action tokens from a cut to the next, and from the beginning of a turn to its first cut.
        threshold: nats; a spike lies above it. 0 takes the highest tokens however low they are, as the paper does,
            and never a token that the policy was certain of.
        placement: ``positional``: among the highest, from left to right, each one that is far enough from the cut
            before it; ``nms`` (non-maximum suppression): highest first, each one that is far enough from all cuts taken
            before and from both borders of its turn. Without a threshold, nms fills up with tokens of low entropy
            where there are fewer far-apart spikes than asked for.
    """
    # All trajectories in one line, each one's tokens in the order of time.
    line = torch.empty(index.K, dtype=torch.int64)
    tokens = torch.bincount(index.traj_of_token, minlength=index.N)
    at = (tokens.cumsum(0) - tokens)[index.traj_of_token] + index.token_rank
    line[at] = torch.arange(index.K)
    traj, turn, entropy = index.traj_of_token[line], index.turn_of_token[line], entropy.double()[line]
    position = torch.arange(index.K)
    begins = torch.ones(index.K, dtype=torch.bool)
    begins[1:] = turn[1:] != turn[:-1]
    since = position - torch.where(begins, position, 0).cummax(0).values if index.K else position
    above = entropy > threshold
    if placement == "positional":
        # Nothing below a trajectory's spikes-th highest entropy can be among them: little is left to sort.
        floor = entropy.new_tensor([_kth_highest(part, spikes) for part in entropy.split(tokens.tolist())])
        highest = (above & (entropy >= floor[traj])).nonzero()[:, 0]
        highest = highest[rank(traj[highest], index.N, -entropy[highest]) < spikes]
        highest = highest[since[highest] >= min_gap]
        cuts = _from_left(highest, traj[highest], index.N, min_gap)
    else:
        length = torch.bincount(turn, minlength=index.M)[turn]
        allowed = (above & (since >= min_gap) & (length - since >= min_gap)).nonzero()[:, 0]
        cuts = _highest_first(allowed, traj[allowed], entropy[allowed], index.N, min_gap, spikes)
    begins[cuts] = True
    segment = begins.long().cumsum(0) - 1
    return Segments(segment[at], traj[begins])


def _kth_highest(values: Tensor, k: int) -> float:
    """Returns the k-th highest of `values`, -inf where there are fewer."""
    return float(values.topk(k).values[-1]) if len(values) >= k else -math.inf


def _from_left(position: Tensor, traj: Tensor, size: int, min_gap: int) -> Tensor:
    """Returns those of `position` (n,), rising, that lie at least `min_gap` after the one kept before."""
    kept = []
    while len(position):
        # The leftmost candidate of every trajectory; all trajectories take their next step at once.
        leftmost = torch.full((size,), int(position[-1]) + 1).scatter_reduce(0, traj, position, "amin")[traj]
        kept.append(position[position == leftmost])
        far = position - leftmost >= min_gap
        position, traj = position[far], traj[far]
    return torch.cat(kept) if kept else position


def _highest_first(position: Tensor, traj: Tensor, height: Tensor, size: int, min_gap: int, most: int) -> Tensor:
    """Returns up to `most` of `position` (n,) per trajectory, highest first, `min_gap` or more from those before."""
    kept = []
    for _ in range(most):
        if not len(position):
            break
        top = torch.full((size,), -torch.inf, dtype=height.dtype).scatter_reduce(0, traj, height, "amax")[traj]
        peaks = height == top
        # Equal heights: the leftmost.
        peak = torch.full((size,), int(position[-1]) + 1).scatter_reduce(0, traj[peaks], position[peaks], "amin")[traj]
        kept.append(position[position == peak])
        far = (position - peak).abs() >= min_gap
        position, traj, height = position[far], traj[far], height[far]
    return torch.cat(kept) if kept else position
