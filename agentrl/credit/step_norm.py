"""How step rewards become a step advantage: normalised over a pool of turns (or of tokens).

OPRL's Eq. 4 is the z-score; the others are the remedies of algorithms.md 1.12. Whatever the form, a pool without
spread gives 0: at the start PRM and policy are equal, the spread is float noise, and normalising would blow it up.
"""

from __future__ import annotations

from typing import Literal

import torch

from agentrl.batch.index import count, segment_mean, segment_std, segment_sum
from agentrl.credit.base import leave_one_out, zscore

Tensor = torch.Tensor

StepNorm = Literal["zscore", "scale", "centre", "loo_step", "loo_trajectory", "rank"]


def normalise(
    values: Tensor, pool: Tensor, traj: Tensor, form: StepNorm, *, ddof: int = 1, std_floor: float = 1e-6
) -> Tensor:
    """Returns float64 values, normalised inside each pool; 0 in pools whose spread is not above `std_floor`.

    Args:
        values: (L,) step rewards.
        pool: (L,) pool of each, numbered from 0.
        traj: (L,) trajectory of each.
        form: see `OPRLOptions.step_norm`.
        ddof: of the standard deviation of ``zscore``.
        std_floor: in the unit of `values`.
    """
    values, size = values.double(), int(pool.max()) + 1 if len(pool) else 0
    spread = segment_std(values, pool, size)[pool]
    if form == "zscore":
        normal = zscore(values, pool, size, ddof=ddof)
    elif form == "scale":
        normal = values / segment_mean(values**2, pool, size).sqrt()[pool].clamp(min=1e-300)
    elif form == "centre":
        normal = values - segment_mean(values, pool, size)[pool]
    elif form == "loo_step":
        normal = leave_one_out(values, pool, size)
    elif form == "loo_trajectory":
        normal = leave_trajectory_out(values, pool, traj)
    else:
        normal = normal_scores(values, pool, size)
    return torch.where(spread > std_floor, normal, 0.0)


def leave_trajectory_out(values: Tensor, pool: Tensor, traj: Tensor) -> Tensor:
    """Returns values (L,) minus the mean over the pool's *other* trajectories; 0 where there are none."""
    pools, trajs = int(pool.max()) + 1 if len(pool) else 0, int(traj.max()) + 1 if len(traj) else 0
    others = count(pool, pools)[pool] - count(traj, trajs)[traj]
    total = segment_sum(values, pool, pools)[pool] - segment_sum(values, traj, trajs)[traj]
    return torch.where(others > 0, values - total / others.clamp(min=1), 0.0)


def normal_scores(values: Tensor, pool: Tensor, size: int) -> Tensor:
    """Returns the standard-normal quantile of each value's mid-rank inside its pool (L,): ties share one score."""
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(pool[order], stable=True)]
    ordered, owner = values[order], pool[order]
    fresh = torch.ones_like(owner, dtype=torch.bool)
    fresh[1:] = (ordered[1:] != ordered[:-1]) | (owner[1:] != owner[:-1])
    tie = fresh.cumsum(0) - 1
    n = count(pool, size)
    equal = count(tie, int(fresh.sum()))
    below = (equal.cumsum(0) - equal)[tie] - (n.cumsum(0) - n)[owner]
    score = torch.empty_like(values)
    score[order] = torch.special.ndtri((below + equal[tie] / 2) / n[owner])
    return score
