"""PPO's generalised advantage estimate (arXiv 1707.06347, 1506.02438) with a critic, per action token or per turn.

    delta_k = r_k + gamma V_{k+1} - V_k
    A_k     = delta_k + gamma lam A_{k+1}          k+1: the trajectory's next action token; V = A = 0 after the last
    target  = A_k + V_k                            before whitening: what the critic should have said

`level: turn` reads the same with turns for tokens [our extension]: V of a turn is the critic's value before its first
action token, r its summed rewards, gamma and lam count turns, and all tokens of the turn share advantage and target.

An episode that was cut off is treated as one that ended: no value is bootstrapped after its last action token. Turns
without action tokens are skipped, and so are their rewards. Nothing is compared inside groups, so that a group of one
learns as well as any; the whole advantage counts as the turn's own (`Advantage.step`).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from agentrl.batch.index import following, rank, segment_mean, segment_sum, suffix_sum
from agentrl.credit.base import Advantage, CreditMethod, Need, Options, Signals, broadcast_tokens, whiten
from agentrl.credit.rewards import first_of_turn, reward_needs, token_rewards

Tensor = torch.Tensor


class PPOOptions(Options):
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token, or per turn with `level: turn`."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda: 1 trusts returns, 0 trusts the critic."""
    level: Literal["token", "turn"] = "token"
    """Whether a step of time is an action token or a turn."""
    whiten: bool = True
    """Whiten the advantages over all action tokens of the batch; the critic's targets are never whitened."""
    turn_rewards: bool = False
    """The environment's turn rewards instead of the outcome."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Reward units per nat taken off for leaving the reference policy. Needs ``reference`` where positive."""


def gae(reward: Tensor, value: Tensor, owner: Tensor, place: Tensor, size: int, gamma: float, lam: float) -> Tensor:
    """Returns float64 advantages of steps in time (tokens or turns).

    Args:
        reward, value: of each step.
        owner: its trajectory.
        place: its rank in the trajectory, 0 first, without gaps.
        size: number of trajectories.
        gamma, lam: discount and lambda per step.
    """
    delta = reward.double() + gamma * following(value, owner, place, size) - value.double()
    return suffix_sum(delta, owner, place, size, gamma * lam)


def ppo(signals: Signals, options: PPOOptions) -> Advantage:
    """Returns the GAE of every action token (K,) and the critic's targets. Needs `Signals.value`."""
    index, value = signals.index, signals.value
    assert value is not None
    owner, place, value = index.traj_of_token, index.token_rank, value.double()
    reward = token_rewards(signals, turn_rewards=options.turn_rewards, kl_coef=options.kl_coef)
    if options.level == "token":
        token = gae(reward, value, owner, place, index.N, options.gamma, options.lam)
        target = token + value
    else:
        acting = index.tokens_per_turn > 0
        turn_value = segment_sum(torch.where(first_of_turn(index), value, 0.0), index.turn_of_token, index.M)
        turn_reward = segment_sum(reward, index.turn_of_token, index.M)
        turn_owner = index.traj_of_turn[acting]
        turn_place = rank(turn_owner, index.N, index.turn_rank[acting])
        played = gae(
            turn_reward[acting], turn_value[acting], turn_owner, turn_place, index.N, options.gamma, options.lam
        )
        per_turn = torch.zeros(index.M, dtype=torch.float64).masked_scatter(acting, played)
        token, target = per_turn[index.turn_of_token], (per_turn + turn_value)[index.turn_of_token]
    owner_all = torch.zeros_like(owner)
    metrics = {
        "return_mean": float(segment_mean(target, owner_all, 1)),
        "value_mean": float(segment_mean(value, owner_all, 1)),
    }
    if options.whiten:
        token = whiten(token)
    episode = torch.zeros(index.N, dtype=torch.float64)
    return broadcast_tokens(index, episode, token, metrics, value_target=target.float())


def _needs(options: PPOOptions) -> frozenset[Need]:
    return reward_needs(options.turn_rewards, options.kl_coef) | {"values"}


PPO = CreditMethod("ppo", PPOOptions, ppo, needs=_needs, group_relative=False)
