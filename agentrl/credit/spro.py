"""SPRO (arXiv 2507.01551): the policy's own log-ratio to a frozen reference as process reward; no extra model.

    CPR_{i,k} = beta sum_{j <= k} (lp_policy[i,j] - lp_ref[i,j])             cumulative process reward         (Eq. 11)
    MSA_{i,k} = CPR_{i,k} - mean_{j in M_k} CPR_{j,k}                        masked step advantage             (Eq. 12)
                M_k = the group's trajectories that have a position k (i among them)
    A_{i,k}   = (R_i - mean_g R)/(std_g R + 1e-6) + MSA_{i,k}                                                  (Eq. 13)

V(s_0) of Eq. 11 is the group's own and cancels. The policy is the one that played (`Signals.policy_logprob`), so that
advantages carry no gradient. A position that one trajectory alone reaches gives 0, and so does the whole second term
where policy and reference are equal.

The paper is single-turn: its position k is a token. For agents ``align: turn`` (algorithms.md 2.2) compares episodes at
the ends of their turns, and a turn's tokens share its MSA: the token positions of two dialogues are not comparable.
Turns without action tokens are no positions. CPR is a random walk: `clip` bounds MSA in long episodes.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from agentrl.batch.index import Index, segment_mean, segment_sum, suffix_sum
from agentrl.credit.base import (
    Advantage,
    CreditMethod,
    Options,
    Signals,
    acting_turns,
    broadcast,
    broadcast_tokens,
    episode_advantage,
    step_share,
)
from agentrl.errors import UserError

Tensor = torch.Tensor


class SPROOptions(Options):
    """Options of SPRO. `beta` has no default: the paper does not give its value."""

    beta: float = Field(gt=0, description="start at 0.05 and tune it until the metric msa_abs is about 0.1 to 1")
    """Reward per nat of log-ratio; 0.05 is a good start."""
    align: Literal["turn", "token"] = "turn"
    """What trajectories are compared at: the ends of their turns, or their action tokens (the paper)."""
    clip: float | None = Field(default=None, gt=0)
    """Clip MSA at +-clip."""
    ddof: int = 1
    """Of the outcome's standard deviation: 1 divides by n - 1."""


def masked_step_advantage(index: Index, reward: Tensor, traj: Tensor, place: Tensor) -> Tensor:
    """Returns MSA (L,) float64: cumulative reward minus its mean over the group's trajectories at the same place.

    Args:
        index: of the batch.
        reward: (L,) of each position.
        traj: (L,) trajectory of each position.
        place: (L,) its rank in that trajectory.
    """
    reward = reward.double()
    to_end = suffix_sum(reward, traj, place, index.N)
    cumulative = segment_sum(reward, traj, index.N)[traj] - to_end + reward
    # Each group has as many cells as its longest trajectory has positions: together never more than L.
    group = index.group_of_traj[traj]
    cells = torch.zeros(index.G, dtype=torch.int64).scatter_reduce(0, group, place + 1, "amax")
    cell = (cells.cumsum(0) - cells)[group] + place
    return cumulative - segment_mean(cumulative, cell, int(cells.sum()))[cell]


def spro(signals: Signals, options: SPROOptions) -> Advantage:
    """Returns group-standardised outcome + MSA per action token (K,). Needs `Signals.reference_logprob`.

    Raises:
        UserError: `Signals.policy_logprob` is missing.
    """
    index = signals.index
    if signals.policy_logprob is None:
        raise UserError("credit method 'spro' needs the log-probs of the policy: give Signals.policy_logprob")
    assert signals.reference_logprob is not None
    reward = options.beta * (signals.policy_logprob.double() - signals.reference_logprob.double())
    episode = episode_advantage(index, signals.outcome, "grpo", ddof=options.ddof)
    limit = options.clip if options.clip is not None else torch.inf
    if options.align == "token":
        step = masked_step_advantage(index, reward, index.traj_of_token, index.token_rank).clamp(-limit, limit)
        return broadcast_tokens(index, episode, step, _metrics(step, episode[index.traj_of_token]))
    acting, place = acting_turns(index)
    turn_reward = segment_sum(reward, index.turn_of_token, index.M)[acting]
    own = masked_step_advantage(index, turn_reward, index.traj_of_turn[acting], place).clamp(-limit, limit)
    step = torch.zeros(index.M, dtype=torch.float64).masked_scatter(acting, own)
    return broadcast(index, episode, step, _metrics(own, episode[index.traj_of_turn[acting]]))


def _metrics(step: Tensor, episode: Tensor) -> dict[str, float]:
    """Sizes of the two terms over positions."""
    return {
        "msa_abs": float(step.abs().mean()) if len(step) else 0.0,
        "step_share": step_share(step, episode),
    }


SPRO = CreditMethod("spro", SPROOptions, spro, needs=frozenset({"reference"}))
