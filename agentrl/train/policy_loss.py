"""The clipped policy surrogate over index vectors (algorithms.md 7): pure functions, no model in sight.

    d = clamp(lp_new - lp_old, -20, 20)        per token, or its sum / mean over the turn (`ratio`)
    l = max(-A rho, -A clip(rho, 1 - low, 1 + high)),   rho = exp(d)
    A < 0:  l = min(l, -A c)                   dual clip
    loss = sum_k w_k l_k                       w from `aggregation`, over the *global* mini-batch

The weights w are normalised by counts of the whole mini-batch, so that the gradient is the same for every micro-batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from agentrl.batch.index import Index
from agentrl.config.schema import PolicyUpdateConfig

Tensor = torch.Tensor


class PolicyLoss(NamedTuple):
    """Loss of some tokens and what is worth logging about it."""

    loss: Tensor
    """Scalar: this part's share of the mini-batch's loss."""
    ratio: Tensor
    """(k,) detached."""
    clipped: Tensor
    """(k,) bool: the clip was active."""


def token_weights(index: Index, config: PolicyUpdateConfig, trajectories: Tensor) -> Tensor:
    """Returns (K,) float64 weights that turn token losses into the mini-batch's loss; 0 outside `trajectories`.

    Args:
        index: of the whole batch.
        config: `aggregation` and its constant. Sequences are trajectories, in whatever layout.
        trajectories: (n,) int64 positions in this mini-batch.
    """
    inside = torch.zeros(index.N, dtype=torch.bool).index_fill_(0, trajectories, True)
    acting = inside & (index.tokens_per_traj > 0)
    traj = index.traj_of_token
    sequences = acting.sum().clamp(min=1)
    if config.aggregation == "token-mean":
        weight = torch.ones(index.K, dtype=torch.float64) / inside[traj].sum().clamp(min=1)
    elif config.aggregation == "seq-mean-token-sum":
        weight = torch.ones(index.K, dtype=torch.float64) / sequences
    elif config.aggregation == "seq-mean-token-mean":
        weight = 1 / (sequences * index.tokens_per_traj[traj])
    elif config.aggregation == "seq-mean-token-sum-norm":
        weight = torch.ones(index.K, dtype=torch.float64) / (sequences * config.aggregation_length)
    else:
        turns = (inside[index.traj_of_turn] & (index.tokens_per_turn > 0)).sum().clamp(min=1)
        weight = 1 / (turns * index.tokens_per_turn[index.turn_of_token])
    return torch.where(inside[traj], weight, 0.0)


def policy_loss(
    new: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, turn: Tensor, config: PolicyUpdateConfig
) -> PolicyLoss:
    """The clipped surrogate of some tokens.

    Args:
        new: (k,) log-probs under the weights being trained, with gradient.
        old: (k,) log-probs of the policy before the update, as sampled or as the trainer has them.
        advantage: (k,).
        weight: (k,) from `token_weights`.
        turn: (k,) int64: which turn each token belongs to; all tokens of a turn must be present.
        config: ratio, clip range, dual clip.
    """
    ratio = log_ratio_of(new - old, turn, config.ratio).clamp(-20, 20).exp()
    plain = -advantage * ratio
    bounded = -advantage * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(plain, bounded)
    if config.dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * config.dual_clip), loss)
    return PolicyLoss((loss * weight.to(loss)).sum(), ratio.detach(), (bounded > plain).detach())


def log_ratio_of(difference: Tensor, turn: Tensor, level: str) -> Tensor:
    """Returns (k,) log-ratios: each token's own, or its turn's sum (``turn``) or mean (``turn_mean``).

    Args:
        difference: (k,) of log-probs.
        turn: (k,) int64: which turn each token belongs to; all tokens of a turn must be present.
        level: ``token``, ``turn`` or ``turn_mean``.
    """
    if level == "token":
        return difference
    owner, size = torch.unique(turn, return_inverse=True)[1], int(turn.unique().numel())
    total = torch.zeros(size, dtype=difference.dtype, device=difference.device).index_add(0, owner, difference)
    if level == "turn_mean":
        total = total / torch.bincount(owner, minlength=size)
    return total[owner]


def kl_penalty(new: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Returns per-token KL estimates (k,) of new against reference, nats (algorithms.md 7.3).

    k1 = x, k2 = x^2 / 2, k3 = exp(-x) + x - 1 with x = lp_new - lp_ref (k3: x clamped to +-20, value to +-10).
    """
    x = new - reference
    if estimator == "k1":
        return x
    if estimator == "k2":
        return x.square() / 2
    x = x.clamp(-20, 20)
    return (torch.exp(-x) + x - 1).clamp(-10, 10)
