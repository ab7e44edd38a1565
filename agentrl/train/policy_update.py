"""The policy update: mini-batches of whole trajectories, micro-batches by token budget, one AdamW step each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from agentrl.batch import Batch, score, score_microbatch
from agentrl.config.schema import PolicyUpdateConfig
from agentrl.errors import NonFiniteError
from agentrl.models.lora import trained_parameters
from agentrl.train.mismatch import compare, correction_metrics, corrects, disagree, importance
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
        the log-probs recorded while sampling and the trainer's own before its first step (on the first mini-batch, or
        on all tokens where it is corrected), and what the correction did.

    Raises:
        NonFiniteError: the advantage, the loss or the gradient became NaN or infinite.
    """
    if not torch.isfinite(advantage).all():
        raise NonFiniteError("an advantage is not finite")
    log = _Log(config.tis_cap)
    random = np.random.default_rng(seed)
    chosen = np.arange(batch.index.N) if trajectories is None else np.asarray(trajectories, dtype=np.int64)
    parts = max(1, min(config.minibatches, len(chosen)))
    own = None
    if corrects(config) and disagree(model, batch, config, temperature, chosen.tolist(), seed):
        own = _Own(batch, single=config.epochs * parts == 1)
        if not own.single:
            own.logprob = score(
                model,
                batch,
                budget=config.tokens_per_microbatch,
                temperature=temperature,
                trajectories=chosen.tolist(),
            ).logprob
    for epoch in range(config.epochs):
        order = random.permutation(chosen)
        for number, members in enumerate(np.array_split(order, parts)):
            first = epoch == 0 and number == 0
            _step(model, optimizer, batch, advantage, config, temperature, reference, members, own, log, first)
    metrics = log.means()
    if corrects(config):
        metrics["mismatch_corrected"] = float(own is not None)
    if own is not None:
        seen = torch.isin(batch.index.traj_of_token, torch.from_numpy(chosen))
        ours, engine = own.logprob[seen], batch.behaviour[seen]
        metrics |= compare(ours, engine, config.tis_cap)
        metrics |= correction_metrics(importance(ours, engine, batch.index.turn_of_token[seen], config))
    return metrics


class _Own:
    """The trainer's own log-probs (K,) before its first step, where they stand in for those recorded while sampling.

    With a `single` step its own forward pass gives them; else they were computed beforehand.
    """

    def __init__(self, batch: Batch, single: bool) -> None:
        self.single = single
        self.logprob = torch.zeros(batch.index.K)

    def of(self, tokens: Tensor, new: Tensor) -> Tensor:
        """Returns those of some tokens, whose log-probs are now `new`."""
        if not self.single:
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
    own: _Own | None,
    log: _Log,
    first: bool,
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
        old, scaled = engine, mine
        if own is not None:
            old = own.of(k, new)
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
        log.tokens(new.detach(), engine, part.ratio, part.clipped, entropy.detach(), first)
    grad_norm = float(torch.nn.utils.clip_grad_norm_(trained_parameters(model), config.grad_clip))
    if not (math.isfinite(total) and math.isfinite(grad_norm)):
        raise NonFiniteError(f"policy loss {total}, gradient norm {grad_norm}")
    optimizer.step()
    log.step(total, grad_norm)


class _Log:
    """Sums over tokens and steps."""

    def __init__(self, bound: float) -> None:
        self.sums: dict[str, float] = {}
        self.count = self.steps = 0
        self.bound = bound
        self.first: list[tuple[Tensor, Tensor]] = []

    def tokens(self, new: Tensor, engine: Tensor, ratio: Tensor, clipped: Tensor, entropy: Tensor, first: bool) -> None:
        self.count += len(ratio)
        difference = new - engine
        # k3 of old against new: the KL from the behaviour policy.
        kl = torch.exp(difference.clamp(-20, 20)) - 1 - difference
        for name, values in (("ratio", ratio), ("clip_fraction", clipped), ("entropy", entropy), ("kl_behaviour", kl)):
            self.sums[name] = self.sums.get(name, 0.0) + float(values.float().sum())
        if first:
            self.first.append((new, engine))

    def step(self, loss: float, grad_norm: float) -> None:
        self.steps += 1
        for name, value in (("policy_loss", loss), ("policy_grad_norm", grad_norm)):
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        per_step = {"policy_loss", "policy_grad_norm"}
        out = {n: v / max(1, self.steps if n in per_step else self.count) for n, v in self.sums.items()}
        ours, engine = (torch.cat(x) for x in zip(*self.first, strict=True)) if self.first else (torch.zeros(0),) * 2
        return out | compare(ours, engine, self.bound) | {"policy_steps": float(self.steps)}
