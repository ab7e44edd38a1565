"""The engine that sampled against the trainer that learns: how far apart, and what is done (algorithms.md 7.6).

An engine of other kernels, another precision or older weights samples from mu, while the trainer takes its ratios from
pi, its own log-probs of the same tokens before the update. With r = pi / mu at a token, or the product over its turn,

    tis:     w = min(r, cap)                    detached, times the token's policy loss
    reject:  no loss where r < low or r > high

The ratio of the update is then new / pi, not new / mu. Neither changes how losses are averaged: weights are not divided
by their sum, and rejected tokens stay in the counts, so that what is left is no louder for what is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from agentrl.batch import Batch, score
from agentrl.config.schema import PolicyUpdateConfig
from agentrl.train.policy_loss import log_ratio_of

Tensor = torch.Tensor


class Importance(NamedTuple):
    """What the mismatch of some tokens makes of their loss."""

    weight: Tensor
    """(k,) of the surrogate: 1 without `tis`."""
    kept: Tensor
    """(k,) bool: False where a token carries no loss at all."""
    truncated: Tensor
    """(k,) bool: the weight is the cap."""


def corrects(config: PolicyUpdateConfig) -> bool:
    """Whether a mismatch would be corrected."""
    return config.tis != "none" or config.reject != "none"


def importance(ours: Tensor, engine: Tensor, turn: Tensor, config: PolicyUpdateConfig) -> Importance:
    """Weights and rejections of some tokens.

    Args:
        ours: (k,) the trainer's log-probs before the update.
        engine: (k,) those recorded while sampling.
        turn: (k,) int64 the turn of each token; all tokens of a turn must be present.
        config: `tis`, `reject` and their bounds.
    """
    difference = (ours - engine).detach()
    weight, truncated = torch.ones_like(difference), torch.zeros_like(difference, dtype=torch.bool)
    kept = ~truncated
    if config.tis != "none":
        ratio = log_ratio_of(difference, turn, config.tis).clamp(-20, 20).exp()
        weight, truncated = ratio.clamp(max=config.tis_cap), ratio > config.tis_cap
    if config.reject != "none":
        ratio = log_ratio_of(difference, turn, config.reject).clamp(-20, 20).exp()
        kept = (ratio >= config.reject_low) & (ratio <= config.reject_high)
    return Importance(weight, kept, truncated)


def disagree(
    model: Any, batch: Batch, config: PolicyUpdateConfig, temperature: float, chosen: Sequence[int], seed: int
) -> bool:
    """Whether some trajectories' log-probs show a mismatch beyond the tolerance; one forward pass over the sample."""
    if not len(chosen):
        return False
    size = max(1, round(config.mismatch_sample * len(chosen)))
    sample = np.random.default_rng((seed, 1)).choice(np.asarray(chosen), size=size, replace=False).tolist()
    return differ(own_logprobs(model, batch, config, temperature, sample), batch, config, sample)


def differ(ours: Tensor, batch: Batch, config: PolicyUpdateConfig, chosen: Sequence[int]) -> bool:
    """Whether the trainer's log-probs (K,) of some trajectories are beyond the tolerance from those recorded."""
    looked = torch.isin(batch.index.traj_of_token, torch.tensor(chosen))
    return bool(((ours - batch.behaviour)[looked].abs() > config.mismatch_tolerance).any())


def own_logprobs(
    model: Any, batch: Batch, config: PolicyUpdateConfig, temperature: float, chosen: Sequence[int] | None = None
) -> Tensor:
    """Returns (K,) the trainer's log-probs, 0 outside the trajectories `chosen` (None: all); one forward pass."""
    return score(
        model, batch, budget=config.tokens_per_microbatch, temperature=temperature, trajectories=chosen
    ).logprob


def measure(model: Any, batch: Batch, config: PolicyUpdateConfig, temperature: float) -> dict[str, float]:
    """`compare` of a whole batch that no update reads; one forward pass."""
    return compare(own_logprobs(model, batch, config, temperature), batch.behaviour, config.tis_cap)


def compare(ours: Tensor, engine: Tensor, bound: float) -> dict[str, float]:
    """Metrics of a mismatch, over the tokens given.

    Args:
        ours: (k,) the trainer's log-probs.
        engine: (k,) those recorded while sampling.
        bound: of the ratio, for the share outside.

    Returns:
        largest and mean difference (nats), KL of the engine's distribution from the trainer's (k3: its samples are the
        engine's, so that exp(d) - 1 - d is unbiased), share of tokens whose ratio is outside [1/bound, bound]. Empty
        without tokens: nothing was compared, which is not agreement.
    """
    d = (ours - engine).double()
    if not len(d):
        return {}
    return {
        "logprob_mismatch": float(d.abs().max()),
        "logprob_mismatch_mean": float(d.abs().mean()),
        "mismatch_kl": float((d.clamp(-20, 20).exp() - 1 - d).mean()),
        "mismatch_outside": float((d.abs() > np.log(bound)).double().mean()),
    }


def correction_metrics(part: Importance) -> dict[str, float]:
    """Mean weight, share of weights at the cap, and number of tokens rejected."""
    tokens = max(1, len(part.weight))
    return {
        "tis_weight": float(part.weight.sum()) / tokens,
        "tis_truncated": float(part.truncated.sum()) / tokens,
        "tokens_rejected": float((~part.kept).sum()),
    }
