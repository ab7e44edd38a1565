"""Rewards per action token, for the methods that know no groups (REINFORCE++, PPO).

A trajectory's outcome lands on its last action token, or the environment's reward of a turn on that turn's last action
token; a penalty for leaving the reference policy may be taken off every token.
"""

from __future__ import annotations

import torch

from agentrl.batch.index import Index
from agentrl.credit.base import Need, Signals
from agentrl.errors import UserError

Tensor = torch.Tensor


def reward_needs(turn_rewards: bool, kl_coef: float) -> frozenset[Need]:
    """What `token_rewards` reads with these options."""
    needs: set[Need] = set()
    if turn_rewards:
        needs.add("turn_rewards")
    if kl_coef > 0:
        needs.add("reference")
    return frozenset(needs)


def token_rewards(signals: Signals, *, turn_rewards: bool, kl_coef: float) -> Tensor:
    """Returns (K,) float64 rewards, in outcome units.

    Turns without action tokens are nobody's act: their rewards are left out.

    Args:
        signals: with `turn_reward` and `reference_logprob` where the options ask for them.
        turn_rewards: the environment's turn rewards instead of the outcome.
        kl_coef: reward units per nat of `policy_logprob - reference_logprob`.

    Raises:
        UserError: `kl_coef` without `Signals.policy_logprob`.
    """
    index = signals.index
    if turn_rewards:
        assert signals.turn_reward is not None
        placed, last = signals.turn_reward.double()[index.turn_of_token], last_of_turn(index)
    else:
        placed, last = signals.outcome.double()[index.traj_of_token], tokens_left(index) == 0
    return torch.where(last, placed, 0.0) - kl_penalty(signals, kl_coef)


def kl_penalty(signals: Signals, kl_coef: float) -> Tensor:
    """Returns (K,) float64 kl_coef (lp_policy - lp_reference); zeros where `kl_coef` is 0."""
    if kl_coef == 0:
        return torch.zeros(signals.index.K, dtype=torch.float64)
    if signals.policy_logprob is None or signals.reference_logprob is None:
        raise UserError("kl_coef > 0 compares policy and reference: give Signals.policy_logprob and .reference_logprob")
    return kl_coef * (signals.policy_logprob.double() - signals.reference_logprob.double())


def tokens_left(index: Index) -> Tensor:
    """Returns (K,) int64: how many action tokens of its trajectory come after each one."""
    return index.tokens_per_traj.long()[index.traj_of_token] - 1 - index.token_rank


def last_of_turn(index: Index) -> Tensor:
    """Returns (K,) bool: the last action token of each turn."""
    last = torch.zeros(index.M, dtype=torch.int64).scatter_reduce(0, index.turn_of_token, index.token_rank, "amax")
    return index.token_rank == last[index.turn_of_token]


def first_of_turn(index: Index) -> Tensor:
    """Returns (K,) bool: the first action token of each turn."""
    first = torch.full((index.M,), index.K).scatter_reduce(0, index.turn_of_token, index.token_rank, "amin")
    return index.token_rank == first[index.turn_of_token]
