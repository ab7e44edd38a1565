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
    """A^E by z-score (``grpo``), leave-one-out (``rloo``) or centring alone (``dr_grpo``)."""
    step_norm: Literal["zscore", "scale", "centre", "loo_step", "loo_trajectory", "rank"] = "zscore"
    """Eq. 4; or divided by the root mean square and not centred (right for rewards the PRM has centred already); or
    without the std, leave-one-step-out, leave-one-trajectory-out, or normal scores of the ranks."""
    step_pool: Literal["group", "batch"] = "group"
    """Whose turns make the pool R_s. ``batch``: one scale for all groups, so that noise is not blown up where the PRM
    sees no difference."""
    ddof: int = 1
    """Of the standard deviations of both terms: 1 divides by n - 1."""
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
    """Returns A^S (M,) float64 from step rewards (M,), normalised over the pool of turns of `options.step_pool`."""
    acting = index.tokens_per_turn > 0
    pool = index.group_of_turn if options.step_pool == "group" else torch.zeros_like(index.group_of_turn)
    owner, values = pool[acting], step_reward.double()[acting]
    size = int(pool.max()) + 1 if len(pool) else 0
    spread = segment_std(values, owner, size)[owner]
    if options.step_norm == "zscore":
        normal = zscore(values, owner, size, ddof=options.ddof)
    elif options.step_norm == "scale":
        normal = values / segment_mean(values**2, owner, size).sqrt()[owner].clamp(min=1e-300)
    elif options.step_norm == "centre":
        normal = values - segment_mean(values, owner, size)[owner]
    elif options.step_norm == "loo_step":
        normal = leave_one_out(values, owner, size)
    elif options.step_norm == "loo_trajectory":
        normal = _leave_trajectory_out(values, owner, index.traj_of_turn[acting])
    else:
        normal = _normal_scores(values, owner, size)
    normal = torch.where(spread > options.std_floor, normal, 0.0)
    if options.clip is not None:
        normal = normal.clamp(-options.clip, options.clip)
    return torch.zeros(index.M, dtype=torch.float64).masked_scatter(acting, normal)


def _leave_trajectory_out(values: Tensor, owner: Tensor, traj: Tensor) -> Tensor:
    """Step reward minus the mean over the turns of the pool's *other* trajectories; 0 where there are none."""
    pools, trajs = int(owner.max()) + 1 if len(owner) else 0, int(traj.max()) + 1 if len(traj) else 0
    others = count(owner, pools)[owner] - count(traj, trajs)[traj]
    total = segment_sum(values, owner, pools)[owner] - segment_sum(values, traj, trajs)[traj]
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
    quantile: Tensor = torch.special.ndtri((below + equal / 2) / n)
    return quantile


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
