"""PRM steps on groups drawn from the new batch and from replayed ones, stopped early by groups held out.

Remedy 2 of algorithms.md 1.12: a batch is soon memorised, so each step sees other groups, older batches enter with the
log-probs of the policy that played them, and steps end once the loss on groups that no step has seen rises.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from agentrl.batch import Batch, build_batch
from agentrl.prm.objective import Objective
from agentrl.types import Trajectory

if TYPE_CHECKING:
    from agentrl.prm.implicit import ImplicitPRM

Tensor = torch.Tensor


def learn_from_draws(
    prm: ImplicitPRM, batch: Batch, outcome: Tensor, policy: Any, replay: Sequence[Trajectory], iteration: int
) -> dict[str, float]:
    """The optimiser steps of an iteration, each on groups drawn from the new batch and what is replayed.

    Args:
        prm: what learns.
        batch: the new batch (N trajectories).
        outcome: (N,).
        policy: the model that played `batch`, where a centre or a reference is computed.
        replay: trajectories of earlier iterations.
        iteration: seeds the draws.

    Returns:
        metrics of the last step, their number, and the last loss on groups held out.
    """
    config = prm.config
    if replay:
        batch = build_batch([*batch.trajectories, *replay], device=batch.device)
        earlier = torch.tensor([t.outcome for t in replay], dtype=torch.float64)
        outcome = torch.cat([outcome.double(), earlier])
    objective = prm.objective(batch.trajectories, outcome, prm.pairs(batch.trajectories, prm.draw(iteration, 1)))
    metrics = objective.size() | {"prm_steps": 0.0}
    groups = sorted({int(batch.index.group_of_traj[n]) for n in objective.members})
    if not groups:
        return metrics
    random = np.random.default_rng(prm.draw(iteration, 2))
    held = {group for group in groups if _held(prm, batch, group)}
    trained = [group for group in groups if group not in held]
    best = _loss(prm, batch, objective, held, policy) if held and trained else math.inf
    for _ in range(config.updates if trained else 0):
        chosen = set(trained)
        if (limit := config.groups_per_update) is not None and limit < len(trained):
            chosen = set(random.choice(trained, size=limit, replace=False).tolist())
        part, goal = _restrict(batch, objective, chosen)
        centre = prm.centre(part, policy)
        metrics |= prm.update(part, goal, prm.reference_scores(part, policy, centre), centre)
        metrics["prm_steps"] += 1
        if held:
            loss = _loss(prm, batch, objective, held, policy)
            metrics["prm_holdout_loss"] = loss
            if loss > best:
                break
            best = loss
    return metrics


def _held(prm: ImplicitPRM, batch: Batch, group: int) -> bool:
    """Whether a group is kept out of every update: decided by its name, once and for all, so that replay never trains
    on what was held out before."""
    first = int((batch.index.group_of_traj == group).nonzero()[0])
    name = f"{prm.seed}/{batch.trajectories[first].group_id}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "big") < prm.config.holdout * 2**32


def _loss(prm: ImplicitPRM, batch: Batch, objective: Objective, groups: set[int], policy: Any) -> float:
    """The loss on some groups, without learning from them."""
    part, goal = _restrict(batch, objective, groups)
    centre = prm.centre(part, policy)
    log_ratio = prm.scores(part, centre) - prm.reference_scores(part, policy, centre)
    return float(goal.loss(prm.trajectory_scores(part, log_ratio)))


def _restrict(batch: Batch, objective: Objective, groups: set[int]) -> tuple[Batch, Objective]:
    """The trajectories of `groups` that the objective looks at, as a batch of their own, and the objective on it."""
    of = batch.index.group_of_traj.tolist()
    kept = [n for n in objective.members if of[n] in groups]
    return build_batch([batch.trajectories[n] for n in kept], device=batch.device), objective.restrict(kept)
