"""OPRL / iStar (arXiv 2509.19199): an episode advantage plus a step advantage from the implicit PRM.

    r_t   = beta sum_{tokens of turn t} (lp_prm - lp_ref)                       implicit step reward   (Eq. 1)
    A^E_i = (R_i - mean_g R) / std_g R                                          episode                (Eq. 3)
    A^S_t = (r_t - mean(R_s)) / std(R_s),   R_s = all turns of all trajectories of the group           (Eq. 4)
    A_t   = A^E_i + alpha A^S_t,            shared by the turn's tokens                                (Eq. 5)

No discount, no return-to-go: a turn gets its own r only. `r` arrives as `Signals.token_reward`, so that what the PRM
does to it (centring, reference, temperature) is the PRM's business.

Edge cases: a group whose pool of step rewards has no spread above `std_floor` gets A^S = 0 (at the start PRM and policy
are equal and the spread is float noise); a pool of one gets 0; turns without action tokens are left out of the pool.

The paper's ablations (Table 3) are options: `rewards` (the environment's step rewards in place of r), `granularity`
(r per token), `combine` (R + alpha sum_t r_t as one reward). Options beyond the paper are the remedies of algorithms.md
1.12 and are off by default.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from agentrl.batch.index import Index, count, segment_mean, segment_std, segment_sum, suffix_sum
from agentrl.credit.base import (
    EPS,
    Advantage,
    CreditMethod,
    EpisodeEstimator,
    Need,
    Options,
    Signals,
    broadcast,
    broadcast_tokens,
    episode_advantage,
    step_share,
)
from agentrl.credit.step_norm import StepNorm, normalise

Tensor = torch.Tensor


_FIRST_TURNS = ("zscore", "loo_step")


class OPRLOptions(Options):
    """Options of OPRL; the defaults are the paper's."""

    alpha: float = Field(default=1.0, ge=0)
    """Weight of the step advantage."""
    episode: EpisodeEstimator = "grpo"
    """A^E by z-score (``grpo``), leave-one-out (``rloo``) or centring alone (``dr_grpo``)."""
    step_norm: StepNorm = "zscore"
    """Eq. 4; or divided by the root mean square and not centred (right for rewards the PRM has centred already); or
    without the std, leave-one-step-out, leave-one-trajectory-out, or normal scores of the ranks."""
    step_pool: Literal["group", "batch", "first_turns"] = "group"
    """Whose turns make the pool R_s. ``batch``: one scale for all groups, so that noise is not blown up where the PRM
    sees no difference. ``first_turns``: of each trajectory its first turn alone, as in the released code (which takes
    the first of a shuffled batch; with ``zscore`` or ``loo_step``; for reproducing its numbers, not for use)."""
    step_unit: Literal["reward", "largest_return"] = "reward"
    """``largest_return``: step rewards divided by the batch's largest |return-to-go| + 1e-6 before all else, as in the
    released code: A^S in [-1, 1] beside an A^E in outcome units."""
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
    rewards: Literal["prm", "environment"] = "prm"
    """Whose step rewards: the implicit PRM's, or the environment's own (the ablation "ground-truth PR")."""
    granularity: Literal["turn", "token"] = "turn"
    """What has a step reward: a turn, the sum over its tokens, or each token its own, with a pool of tokens."""
    combine: Literal["separate", "merged"] = "separate"
    """A^E + alpha A^S, or one advantage by the `episode` estimator from R_i + alpha sum_t r_t, without an A^S."""

    @model_validator(mode="after")
    def _fit_together(self) -> OPRLOptions:
        """Refuses options that would be ignored."""
        if self.rewards == "environment":
            self._refuse("rewards=environment has no PRM", "skill_gate", "warmup_updates")
            self._refuse("rewards=environment gives one reward per turn", "granularity")
        if self.granularity == "token":
            self._refuse("granularity=token rewards single tokens", "per_token", "step_unit")
        if self.combine == "merged":
            self._refuse("combine=merged has no step advantage", "granularity", "step_norm", "step_pool", "clip")
        if self.step_pool == "first_turns":
            self._refuse("step_pool=first_turns is about turns", "granularity")
            if self.step_norm not in _FIRST_TURNS:
                raise ValueError(f"step_pool=first_turns needs step_norm {' or '.join(_FIRST_TURNS)}")
        return self

    def _refuse(self, why: str, *names: str) -> None:
        for name in names:
            value, default = getattr(self, name), OPRLOptions.model_fields[name].default
            if value != default:
                raise ValueError(f"{why}: leave {name} at {default} (got {value})")


def step_advantage(index: Index, step_reward: Tensor, options: OPRLOptions) -> Tensor:
    """Returns A^S float64 like `step_reward`: of turns (M,), or of tokens (K,) with granularity ``token``.

    Normalised over the pool `options.step_pool`.
    """
    if options.granularity == "token":
        counted = torch.ones(index.K, dtype=torch.bool)
        traj = index.traj_of_token
    else:
        counted = index.tokens_per_turn > 0
        traj = index.traj_of_turn
    if options.step_pool == "first_turns":
        normal = first_turn_norm(index, step_reward, options)
        return normal if options.clip is None else normal.clamp(-options.clip, options.clip)
    pool = index.group_of_traj[traj] if options.step_pool == "group" else torch.zeros_like(traj)
    normal = normalise(
        step_reward[counted],
        pool[counted],
        traj[counted],
        options.step_norm,
        ddof=options.ddof,
        std_floor=options.std_floor,
    )
    if options.clip is not None:
        normal = normal.clamp(-options.clip, options.clip)
    return torch.zeros(len(traj), dtype=torch.float64).masked_scatter(counted, normal)


def first_turn_norm(index: Index, step_reward: Tensor, options: OPRLOptions) -> Tensor:
    """Returns A^S (M,) float64 against the statistics of each trajectory's first acting turn (algorithms.md 1.6)."""
    counted = (index.tokens_per_turn > 0).nonzero().squeeze(1)
    traj = index.traj_of_turn[counted]
    first = counted[torch.cat([torch.ones(1, dtype=torch.bool), traj[1:] != traj[:-1]])[: len(traj)]]
    group, owner = index.group_of_traj[index.traj_of_turn], index.group_of_traj[index.traj_of_turn[first]]
    size, spread = count(owner, index.G), segment_std(step_reward[first], owner, index.G, options.ddof)
    centred = step_reward - segment_mean(step_reward[first], owner, index.G)[group]
    if options.step_norm == "zscore":
        normal = centred / (spread[group] + EPS)
    else:
        normal = centred * (size / (size - 1).clamp(min=1))[group]
    applies = (index.tokens_per_turn > 0) & (spread[group] > options.std_floor)
    return torch.where(applies, normal, 0.0)


def step_rewards(signals: Signals, options: OPRLOptions) -> Tensor:
    """Returns r float64: of turns (M,), 0 without action tokens; of tokens (K,) with granularity ``token``."""
    index = signals.index
    if options.rewards == "environment":
        assert signals.turn_reward is not None
        reward = torch.where(index.tokens_per_turn > 0, signals.turn_reward.double(), 0.0)
    else:
        assert signals.token_reward is not None
        if options.granularity == "token":
            return signals.token_reward.double()
        reward = segment_sum(signals.token_reward, index.turn_of_token, index.M)
    if options.per_token:
        reward = reward / index.tokens_per_turn.clamp(min=1)
    if options.step_unit == "largest_return" and len(reward):
        returns = suffix_sum(reward, index.traj_of_turn, index.turn_rank, index.N)
        reward = reward / (returns.abs().max() + EPS)
    return reward


def oprl(signals: Signals, options: OPRLOptions) -> Advantage:
    """Returns A^E + alpha A^S per action token (K,). Needs `Signals.token_reward` or, by option, `turn_reward`."""
    index = signals.index
    reward = step_rewards(signals, options)
    alpha = options.alpha if signals.prm_updates >= options.warmup_updates else 0.0
    if options.skill_gate:
        alpha *= signals.prm_skill or 0.0
    applied = _applied(signals, options)
    outcome = signals.outcome
    if options.combine == "merged":
        total, acting = segment_sum(reward, index.traj_of_turn, index.N), index.tokens_per_traj > 0
        spread = segment_std(total[acting], index.group_of_traj[acting], index.G)[index.group_of_traj]
        outcome = outcome + alpha * torch.where(applied & (spread > options.std_floor), total, 0.0)
        step = torch.zeros(index.M, dtype=torch.float64)
    else:
        step = alpha * step_advantage(index, reward, options)
    episode = episode_advantage(index, outcome, options.episode, ddof=options.ddof)
    by_token = options.granularity == "token"
    traj = index.traj_of_token if by_token else index.traj_of_turn
    step = torch.where(applied[traj], step, 0.0)
    metrics = {
        "alpha": alpha,
        "step_reward_mean": float(reward.mean()) if len(reward) else 0.0,
        "step_reward_std": float(reward.std()) if len(reward) > 1 else 0.0,
        "step_share": step_share(step, episode[traj]),
    }
    return (broadcast_tokens if by_token else broadcast)(index, episode, step, metrics)


def _applied(signals: Signals, options: OPRLOptions) -> Tensor:
    """Returns (N,) bool: trajectories whose step rewards count (see `OPRLOptions.uniform_groups`)."""
    index = signals.index
    if options.uniform_groups:
        return torch.ones(index.N, dtype=torch.bool)
    acting = index.tokens_per_traj > 0
    mixed = segment_std(signals.outcome[acting], index.group_of_traj[acting], index.G) > 0
    return mixed[index.group_of_traj]


def needs(options: OPRLOptions) -> frozenset[Need]:
    """The PRM, or the environment's rewards in its place."""
    return frozenset({"prm"} if options.rewards == "prm" else {"turn_rewards"})


OPRL = CreditMethod("oprl", OPRLOptions, oprl, needs=needs)
