"""The critic of PPO: a language model with a value head, trained by regression (algorithms.md 6).

    V(state before action token k) = head(last hidden state at the position that predicts k)
    loss = mean_k 0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)

The head starts at zero, so that the first advantages are the returns themselves and no random bias.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from agentrl.batch import Batch, MicroBatch
from agentrl.batch.scoring import run_rows
from agentrl.config.schema import CriticConfig
from agentrl.errors import NonFiniteError
from agentrl.models.attention import precision
from agentrl.models.lora import trained_parameters

Tensor = torch.Tensor


class Critic:
    """A value model with its optimiser.

    Args:
        model: causal LM whose body is the critic's; trained in place. Its LM head is not used.
        config: learning rate, clip, mini-batches.
        budget: tokens per forward pass: memory, never the result.
    """

    def __init__(self, model: Any, config: CriticConfig, *, budget: int) -> None:
        self.model, self.config, self.budget = model, config, budget
        parameter = next(model.parameters())
        size = model.get_output_embeddings().weight.shape[1]
        self.head = torch.nn.Linear(size, 1, device=parameter.device, dtype=parameter.dtype)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.parameters = [*trained_parameters(model), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, eps=config.adam_eps, weight_decay=config.weight_decay
        )

    @torch.no_grad()
    def values(self, batch: Batch) -> Tensor:
        """Returns the value before every action token, (K,) float32 on the CPU, in outcome units."""
        values = torch.zeros(batch.index.K)
        for micro in batch.microbatches(self.budget):
            values[micro.tokens] = self._forward(micro).cpu()
        return values

    def update(self, batch: Batch, target: Tensor, old: Tensor, *, seed: int = 0) -> dict[str, float]:
        """Trains on one batch: `epochs` x `minibatches` optimiser steps over whole trajectories.

        Args:
            batch: N trajectories, K action tokens.
            target: (K,) returns.
            old: (K,) values before the update.
            seed: deals trajectories out to mini-batches.

        Returns:
            metrics: loss, gradient norm, and the share of the returns' variance that the old values explained.

        Raises:
            NonFiniteError: the loss or its gradient became NaN or infinite.
        """
        random = np.random.default_rng(seed)
        losses, norms = [], []
        for _ in range(self.config.epochs):
            order = random.permutation(batch.index.N)
            for members in np.array_split(order, max(1, min(self.config.minibatches, batch.index.N))):
                loss, norm = self._step(batch, target, old, members)
                losses.append(loss)
                norms.append(norm)
        spread = float(target.double().var(unbiased=False)) if len(target) else 0.0
        left = float((target.double() - old.double()).var(unbiased=False)) if len(target) else 0.0
        return {
            "critic_loss": float(np.mean(losses)),
            "critic_grad_norm": float(np.mean(norms)),
            "critic_explained": 1 - left / spread if spread > 0 else 0.0,
        }

    def _forward(self, micro: MicroBatch) -> Tensor:
        """(j,) float32 values of the tokens of one micro-batch, in the order of `micro.tokens`."""
        with precision(self.model):
            hidden = run_rows(self.model, micro)[micro.predict_at]
            values: Tensor = self.head(hidden).squeeze(-1)[micro.slot.to(hidden.device)].float()
        return values

    def _step(self, batch: Batch, target: Tensor, old: Tensor, members: np.ndarray) -> tuple[float, float]:
        inside = torch.zeros(batch.index.N, dtype=torch.bool).index_fill_(0, torch.from_numpy(members), True)
        tokens = int(inside[batch.index.traj_of_token].sum())
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for micro in batch.microbatches(self.budget, members.tolist()):
            value = self._forward(micro)
            goal, before = target[micro.tokens].to(value), old[micro.tokens].to(value)
            loss = (value - goal).square()
            if self.config.clip is not None:
                near = before + (value - before).clamp(-self.config.clip, self.config.clip)
                loss = torch.maximum(loss, (near - goal).square())
            loss = 0.5 * loss.sum() / max(1, tokens)
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NonFiniteError(f"critic loss {total}, gradient norm {norm}")
        self.optimizer.step()
        return total, norm

    def state_dict(self) -> dict[str, Any]:
        """Value head and optimiser (the body's weights are saved apart, as safetensors)."""
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
