"""OPRL / iStar (arXiv 2509.19199): an episode advantage plus a step advantage from the implicit PRM.

    r_t   = beta sum_{tokens of turn t} (lp_prm - lp_ref)                       implicit step reward   (Eq. 1)
    A^E_i = (R_i - mean_g R) / std_g R                                          episode                (Eq. 3)
    A^S_t = (r_t - mean(R_s)) / std(R_s),   R_s = all turns of all trajectories of the group           (Eq. 4)
    A_t   = A^E_i + alpha A^S_t,            shared by the turn's tokens                                (Eq. 5)

No discount, no return-to-go: a turn gets its own r only. `r` arrives as `Signals.token_reward`, so that what the PRM
does to it (centring, reference, temperature) is the PRM's business.

Edge cases: a group whose pool of step rewards has no spread above `std_floor` gets A^S = 0 (at the start PRM and policy
are equal and the spread is float noise); a pool of one gets 0; turns without action tokens are left out of the pool.
Options beyond the paper are the remedies of algorithms.md 1.12 and are off by default.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from agentrl.batch.index import Index, count, segment_mean, segment_std, segment_sum
from agentrl.credit.base import (
    Advantage,
    CreditMethod,
    EpisodeEstimator,
    Options,
    Signals,
    broadcast,
    episode_advantage,
    leave_one_out,
    zscore,
)

Tensor = torch.Tensor


class OPRLOptions(Options):
    """Options of OPRL; the defaults are the paper's."""

    alpha: float = Field(default=1.0, ge=0)
    """Weight of the step advantage."""
    episode: EpisodeEstimator = "grpo"
    step_norm: Literal["zscore", "centre", "loo_step", "loo_trajectory", "rank"] = "zscore"
    """Eq. 4, or without the std, leave-one-step-out, leave-one-trajectory-out, or normal scores of the ranks."""
    ddof: int = 1
    std_floor: float = Field(default=1e-6, ge=0)
    """Reward units: spread of a group's step rewards below which A^S is 0."""
    clip: float | None = Field(default=None, gt=0)
    """Clip A^S at +-clip (3 is a good value): rare actions make heavy tails."""
    per_token: bool = False
    """Divide each step reward by its turn's number of tokens."""
    warmup_updates: int = Field(default=0, ge=0)
    """alpha is 0 until the PRM has had this many updates."""
    skill_gate: bool = False
    """Scale alpha by the PRM's measured skill on the new batch."""
    uniform_groups: bool = True
    """Apply A^S in groups without outcome variance, where the PRM is the only signal."""


def step_advantage(index: Index, step_reward: Tensor, options: OPRLOptions) -> Tensor:
    """Returns A^S (M,) float64 from step rewards (M,), normalised over each group's pool of turns."""
    acting = index.tokens_per_turn > 0
    owner, values = index.group_of_turn[acting], step_reward.double()[acting]
    spread = segment_std(values, owner, index.G)[owner]
    if options.step_norm == "zscore":
        normal = zscore(values, owner, index.G, ddof=options.ddof)
    elif options.step_norm == "centre":
        normal = values - segment_mean(values, owner, index.G)[owner]
    elif options.step_norm == "loo_step":
        normal = leave_one_out(values, owner, index.G)
    elif options.step_norm == "loo_trajectory":
        normal = _leave_trajectory_out(index, values, acting)
    else:
        normal = _normal_scores(values, owner, index.G)
    normal = torch.where(spread > options.std_floor, normal, 0.0)
    if options.clip is not None:
        normal = normal.clamp(-options.clip, options.clip)
    return torch.zeros(index.M, dtype=torch.float64).masked_scatter(acting, normal)


def _leave_trajectory_out(index: Index, values: Tensor, acting: Tensor) -> Tensor:
    """Step reward minus the mean over the turns of the group's *other* trajectories; 0 where there are none."""
    traj = index.traj_of_turn[acting]
    owner = index.group_of_turn[acting]
    others = count(owner, index.G)[owner] - count(traj, index.N)[traj]
    total = segment_sum(values, owner, index.G)[owner] - segment_sum(values, traj, index.N)[traj]
    return torch.where(others > 0, values - total / others.clamp(min=1), 0.0)


def _normal_scores(values: Tensor, owner: Tensor, size: int) -> Tensor:
    """Standard-normal quantile of each value's mid-rank inside its segment: ties share one score."""
    below, equal = torch.empty_like(values), torch.empty_like(values)
    for segment in range(size):
        inside = owner == segment
        mine = values[inside]
        ordered = mine.sort().values
        low = torch.searchsorted(ordered, mine)
        below[inside] = low.double()
        equal[inside] = (torch.searchsorted(ordered, mine, right=True) - low).double()
    n = count(owner, size)[owner]
    return torch.special.ndtri((below + equal / 2) / n)


def oprl(signals: Signals, options: OPRLOptions) -> Advantage:
    """Returns A^E + alpha A^S per action token (K,). Needs `Signals.token_reward`."""
    index = signals.index
    assert signals.token_reward is not None, "the trainer gives token rewards to methods that need a PRM"
    step_reward = segment_sum(signals.token_reward, index.turn_of_token, index.M)
    if options.per_token:
        step_reward = step_reward / index.tokens_per_turn.clamp(min=1)
    episode = episode_advantage(index, signals.outcome, options.episode, ddof=options.ddof)
    alpha = options.alpha if signals.prm_updates >= options.warmup_updates else 0.0
    if options.skill_gate:
        alpha *= signals.prm_skill or 0.0
    step = alpha * step_advantage(index, step_reward, options)
    if not options.uniform_groups:
        acting = index.tokens_per_traj > 0
        mixed = segment_std(signals.outcome[acting], index.group_of_traj[acting], index.G) > 0
        step = torch.where(mixed[index.group_of_turn], step, 0.0)
    metrics = {
        "alpha": alpha,
        "step_reward_mean": float(step_reward.mean()) if index.M else 0.0,
        "step_reward_std": float(step_reward.std()) if index.M > 1 else 0.0,
        "step_share": float(step.abs().sum() / (step.abs().sum() + episode[index.traj_of_turn].abs().sum() + 1e-12)),
    }
    return broadcast(index, episode, step, metrics)


OPRL = CreditMethod("oprl", OPRLOptions, oprl, needs_prm=True)
