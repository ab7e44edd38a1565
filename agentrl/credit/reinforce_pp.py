"""REINFORCE++ (arXiv 2501.03262): the return-to-go, whitened over all action tokens of the batch.

    reinforce_pp            A_k = whiten( sum_{s >= k} gamma^(s-k) r_s )      s, k: action tokens, observations skipped
    reinforce_pp_baseline   A_k = whiten( R_i - mean_g R )

r is the outcome on the trajectory's last action token, or the environment's turn rewards on the last token of each
turn; the original also takes kl_coef (lp_policy - lp_reference) off every token. whiten(x) = (x - m)/sqrt(v + 1e-8),
m and v over all action tokens, so that a long trajectory weighs more than a short one.

Edge cases: in the baseline form a group of one enters the whitening as 0 and therefore leaves it as -m/sqrt(v): as far
above or below the others as an average outcome of its group. A batch with one return everywhere gives 0. The first form
compares with no group, only with the batch.
"""

from __future__ import annotations

import torch
from pydantic import Field

from agentrl.batch.index import segment_mean, suffix_sum
from agentrl.credit.base import (
    Advantage,
    CreditMethod,
    Need,
    Options,
    Signals,
    Singleton,
    broadcast,
    broadcast_tokens,
    episode_advantage,
    whiten,
)
from agentrl.credit.rewards import kl_penalty, reward_needs, token_rewards, tokens_left


class ReinforcePPOptions(Options):
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token."""
    turn_rewards: bool = False
    """The environment's turn rewards instead of the outcome."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Reward units per nat taken off for leaving the reference policy. Needs ``reference`` where positive."""


def reinforce_pp(signals: Signals, options: ReinforcePPOptions) -> Advantage:
    """Returns the whitened return-to-go of every action token (K,); the episode's part is its mean over the tokens."""
    index = signals.index
    owner, place, gamma = index.traj_of_token, index.token_rank, options.gamma
    if options.turn_rewards:
        rewards = token_rewards(signals, turn_rewards=True, kl_coef=options.kl_coef)
        returns = suffix_sum(rewards, owner, place, index.N, gamma)
    else:
        # Without a running sum equal outcomes stay exactly equal, and whitening has no noise to blow up.
        returns = signals.outcome.double()[owner] * gamma ** tokens_left(index).double()
        if options.kl_coef > 0:
            returns = returns - suffix_sum(kl_penalty(signals, options.kl_coef), owner, place, index.N, gamma)
    token = whiten(returns)
    episode = segment_mean(token, owner, index.N)
    return broadcast_tokens(index, episode, token - episode[owner])


def _needs(options: ReinforcePPOptions) -> frozenset[Need]:
    return reward_needs(options.turn_rewards, options.kl_coef)


class ReinforcePPBaselineOptions(Options):
    singleton: Singleton = "zero"
    """What a group of one enters the whitening as: 0, or (``raw``) its outcome, as in verl."""


def reinforce_pp_baseline(signals: Signals, options: ReinforcePPBaselineOptions) -> Advantage:
    """Returns the group-centred outcome on every action token (K,), whitened over the batch's tokens."""
    index = signals.index
    centred = episode_advantage(index, signals.outcome, "dr_grpo", singleton=options.singleton)
    token = whiten(centred[index.traj_of_token])
    # Equal over a trajectory's tokens, and 0 where it has none.
    episode = segment_mean(token, index.traj_of_token, index.N)
    return broadcast(index, episode, torch.zeros(index.M, dtype=torch.float64))


REINFORCE_PP = CreditMethod("reinforce_pp", ReinforcePPOptions, reinforce_pp, needs=_needs, group_relative=False)
REINFORCE_PP_BASELINE = CreditMethod("reinforce_pp_baseline", ReinforcePPBaselineOptions, reinforce_pp_baseline)
