"""PRIME (arXiv 2502.01456): dense token rewards of an implicit PRM, and a leave-one-out baseline for each term.

    paper (Eq. 5)   A_k = sum_{s >= k} gamma^(s-k) [r_s - mean_{j != i} rbar_j]  +  [R_i - mean_{j != i} R_j]
    recipe (code)   A   = whiten( sum_{s >= k} gamma^(s-k) [5 r'_s + 5 LOO(R)_i at the last token] ),
                    r'_s = n/(n-1) r_s - 1/(n-1) sum_j rbar_j

r is `Signals.token_reward`, rbar_j the mean over the action tokens of trajectory j of the group of n. Sums run over the
action tokens of all turns, observations skipped (the paper has one turn). The recipe's r' is Eq. 5's bracket plus
(r_s - rbar_i)/(n-1), which sums to 0 over a trajectory; with gamma < 1 it discounts the outcome as well.

The PRM is trained by cross-entropy of sigmoid(sum r) against success: a run needs `prm.loss: ce` and is refused
otherwise. Edge cases: a group of one has nobody to leave out and gets 0 for both terms (in the recipe
form before whitening); trajectories without action tokens are no members.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from agentrl.batch.index import Index, count, segment_mean, segment_std, segment_sum, suffix_sum
from agentrl.credit.base import (
    Advantage,
    CreditMethod,
    Options,
    Signals,
    broadcast_tokens,
    episode_advantage,
)
from agentrl.credit.rewards import tokens_left
from agentrl.errors import UserError

Tensor = torch.Tensor


class PRIMEOptions(Options):
    form: Literal["paper", "recipe"] = "paper"
    """Eq. 5, or what the released recipe computes (usual with both weights 5)."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token."""
    process_weight: float | None = Field(default=None, ge=0)
    """Of the process term; default 1 (paper) or 5 (recipe)."""
    outcome_weight: float | None = Field(default=None, ge=0)
    """Of the outcome term; default 1 (paper) or 5 (recipe)."""
    batch_norm: bool = False
    """Divide the token rewards by the batch's largest |sum from a token to the end| first."""


def prime(signals: Signals, options: PRIMEOptions) -> Advantage:
    """Returns Eq. 5 or the recipe's advantage per action token (K,). Needs `Signals.token_reward`."""
    index = signals.index
    assert signals.token_reward is not None
    owner, place = index.traj_of_token, index.token_rank
    reward = signals.token_reward.double()
    if options.batch_norm:
        reward = batch_normed(index, reward)
    usual = 1.0 if options.form == "paper" else 5.0
    process_weight = usual if options.process_weight is None else options.process_weight
    outcome_weight = usual if options.outcome_weight is None else options.outcome_weight
    centred = centred_rewards(index, reward, options.form)
    process = process_weight * suffix_sum(centred, owner, place, index.N, options.gamma)
    episode = outcome_weight * episode_advantage(index, signals.outcome, "rloo")
    if options.form == "recipe":
        # Whitened: (process + discounted outcome - mean) / std. The episode's part is its outcome over that std.
        total = process + episode[owner] * options.gamma ** tokens_left(index).double()
        everyone = torch.zeros_like(owner)
        scale = (segment_std(total, everyone, 1) ** 2 + 1e-8).rsqrt()
        episode = episode * scale
        process = (total - segment_mean(total, everyone, 1)) * scale - episode[owner]
    return broadcast_tokens(index, episode, process)


def centred_rewards(index: Index, reward: Tensor, form: Literal["paper", "recipe"]) -> Tensor:
    """Returns (K,) float64 token rewards minus what the group's other trajectories earn per token; 0 in groups of one.

    Args:
        index: who belongs to whom.
        reward: (K,) token rewards.
        form: ``paper``: minus the others' mean of means; ``recipe``: r' above.
    """
    acting = index.tokens_per_traj > 0
    mean = segment_mean(reward, index.traj_of_token, index.N)
    n = count(index.group_of_traj[acting], index.G)[index.group_of_traj]
    total = segment_sum(mean[acting], index.group_of_traj[acting], index.G)[index.group_of_traj]
    others = (n - 1).clamp(min=1)
    if form == "paper":
        factor, baseline = torch.ones_like(n), (total - mean) / others
    else:
        factor, baseline = n / others, total / others
    owner = index.traj_of_token
    return torch.where(n[owner] > 1, factor[owner] * reward.double() - baseline[owner], 0.0)


def batch_normed(index: Index, reward: Tensor) -> Tensor:
    """Returns (K,) float64 rewards over the batch's largest |sum from a token to its trajectory's end| + 1e-6."""
    to_go = suffix_sum(reward, index.traj_of_token, index.token_rank, index.N)
    largest = to_go.abs().max() if len(to_go) else torch.zeros(())
    return reward.double() / (largest + 1e-6)


def _check(config: Any) -> None:
    """Refuses a run whose PRM learns from pairs: it would be called PRIME and be something else."""
    if config.prm.loss != "ce":
        raise UserError(
            f"credit.method=prime wants a PRM trained on labels, not prm.loss={config.prm.loss}; set prm.loss=ce"
        )


PRIME = CreditMethod("prime", PRIMEOptions, prime, needs=frozenset({"prm"}), check=_check)
