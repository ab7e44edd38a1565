"""The policy update: mini-batches of whole trajectories, micro-batches by token budget, one AdamW step each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from agentrl.batch import Batch, score_microbatch
from agentrl.config.schema import PolicyUpdateConfig
from agentrl.errors import NonFiniteError
from agentrl.models.lora import trained_parameters
from agentrl.train.mismatch import compare, correction_metrics, corrects, differ, disagree, importance, own_logprobs
from agentrl.train.policy_loss import kl_penalty, policy_loss, token_weights

Tensor = torch.Tensor


def make_optimizer(model: Any, config: PolicyUpdateConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters of `model` that take gradients."""
    return torch.optim.AdamW(
        trained_parameters(model),
        lr=config.lr,
        betas=config.betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )


def learning_rate(config: PolicyUpdateConfig, iteration: int, iterations: int) -> float:
    """Learning rate of `iteration` (from 0) out of `iterations`: linear warm-up, then the schedule down to a tenth."""
    warm = config.warmup_iterations
    if iteration < warm:
        return config.lr * (iteration + 1) / (warm + 1)
    done = (iteration - warm) / max(1, iterations - warm)
    if config.schedule == "linear":
        return config.lr * (1 - 0.9 * done)
    if config.schedule == "cosine":
        return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
    return config.lr


def update_policy(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    advantage: Tensor,
    config: PolicyUpdateConfig,
    *,
    temperature: float = 1.0,
    reference: Tensor | None = None,
    seed: int = 0,
    trajectories: Sequence[int] | None = None,
) -> dict[str, float]:
    """Trains `model` on one batch: `epochs` x `minibatches` optimiser steps.

    Args:
        model: the policy; trained in place.
        optimizer: over its parameters, learning rate already set.
        batch: N trajectories, K action tokens, behaviour log-probs.
        advantage: (K,) from the credit method.
        config: ratio, clip, aggregation, KL, entropy.
        temperature: of the sampler.
        reference: (K,) log-probs of the initial policy, if `kl_coef` > 0.
        seed: deals trajectories out to mini-batches.
        trajectories: positions of those that carry loss; None = all.

    Returns:
        metrics: loss, gradient norm, clip fraction, mean ratio, KL to the behaviour policy, entropy; the mismatch of
        the log-probs recorded while sampling and the trainer's own before its first step, on all tokens that carry
        loss (left out where none does), and what the correction did.

    Raises:
        NonFiniteError: the advantage, the loss or the gradient became NaN or infinite.
    """
    if not torch.isfinite(advantage).all():
        raise NonFiniteError("an advantage is not finite")
    log = _Log()
    random = np.random.default_rng(seed)
    chosen = np.arange(batch.index.N) if trajectories is None else np.asarray(trajectories, dtype=np.int64)
    parts = max(1, min(config.minibatches, len(chosen)))
    own = _Own(batch)
    if parts > 1:
        own.logprob, own.known = own_logprobs(model, batch, config, temperature, chosen.tolist()), True
    corrected = corrects(config) and (
        differ(own.logprob, batch, config, chosen.tolist())
        if own.known
        else disagree(model, batch, config, temperature, chosen.tolist(), seed)
    )
    for _ in range(config.epochs):
        order = random.permutation(chosen)
        for members in np.array_split(order, parts):
            _step(model, optimizer, batch, advantage, config, temperature, reference, members, own, corrected, log)
        own.known = True
    metrics = log.means()
    seen = torch.isin(batch.index.traj_of_token, torch.from_numpy(chosen))
    ours, engine = own.logprob[seen], batch.behaviour[seen]
    metrics |= compare(ours, engine, config.tis_cap)
    if corrects(config):
        metrics["mismatch_corrected"] = float(corrected)
    if corrected:
        metrics |= correction_metrics(importance(ours, engine, batch.index.turn_of_token[seen], config))
    return metrics


class _Own:
    """The trainer's own log-probs (K,) before its first step: compared with those recorded while sampling, and taken in
    their place where the two differ and that is corrected.

    With one mini-batch its own forward pass gives them (until then they are not `known`); with several they are
    computed beforehand, as all but the first are read when the model has moved.
    """

    def __init__(self, batch: Batch) -> None:
        self.known = False
        self.logprob = torch.zeros(batch.index.K)

    def of(self, tokens: Tensor, new: Tensor) -> Tensor:
        """Returns those of some tokens, whose log-probs are now `new`."""
        if self.known:
            return self.logprob[tokens].to(new)
        self.logprob[tokens] = new.detach().float().cpu()
        return new.detach()


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    advantage: Tensor,
    config: PolicyUpdateConfig,
    temperature: float,
    reference: Tensor | None,
    members: np.ndarray,
    own: _Own,
    corrected: bool,
    log: _Log,
) -> None:
    """One optimiser step on the trajectories `members`."""
    index = batch.index
    weight = token_weights(index, config, torch.from_numpy(members))
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for micro in batch.microbatches(config.tokens_per_microbatch, members.tolist()):
        k = micro.tokens
        scores = score_microbatch(
            model, micro, temperature=temperature, want_entropy=True, entropy_gradient=config.entropy_coef > 0
        )
        new, entropy = scores.logprob, scores.entropy
        assert entropy is not None
        engine, mine, turn = batch.behaviour[k].to(new), weight[k].to(new), index.turn_of_token[k].to(new.device)
        before = own.of(k, new)
        old, scaled = engine, mine
        if corrected:
            old = before
            correction = importance(old, engine, turn, config)
            mine = mine * correction.kept
            scaled = mine * correction.weight
        part = policy_loss(new, old, advantage[k].to(new), scaled, turn, config)
        loss = part.loss
        if config.kl_coef > 0 and reference is not None:
            loss = loss + config.kl_coef * (mine * kl_penalty(new, reference[k].to(new), config.kl_estimator)).sum()
        if config.entropy_coef > 0:
            loss = loss - config.entropy_coef * (mine * entropy).sum()
        loss.backward()
        total += float(loss.detach())
        log.tokens(new.detach(), engine, part.ratio, part.clipped, entropy.detach())
    grad_norm = float(torch.nn.utils.clip_grad_norm_(trained_parameters(model), config.grad_clip))
    if not (math.isfinite(total) and math.isfinite(grad_norm)):
        raise NonFiniteError(f"policy loss {total}, gradient norm {grad_norm}")
    optimizer.step()
    log.step(total, grad_norm)


class _Log:
    """Sums over tokens and steps."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.count = self.steps = 0

    def tokens(self, new: Tensor, engine: Tensor, ratio: Tensor, clipped: Tensor, entropy: Tensor) -> None:
        self.count += len(ratio)
        difference = new - engine
        # k3 of old against new: the KL from the behaviour policy.
        kl = torch.exp(difference.clamp(-20, 20)) - 1 - difference
        for name, values in (("ratio", ratio), ("clip_fraction", clipped), ("entropy", entropy), ("kl_behaviour", kl)):
            self.sums[name] = self.sums.get(name, 0.0) + float(values.float().sum())

    def step(self, loss: float, grad_norm: float) -> None:
        self.steps += 1
        for name, value in (("policy_loss", loss), ("policy_grad_norm", grad_norm)):
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        per_step = {"policy_loss", "policy_grad_norm"}
        out = {n: v / max(1, self.steps if n in per_step else self.count) for n, v in self.sums.items()}
        return out | {"policy_steps": float(self.steps)}
