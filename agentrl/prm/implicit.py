"""The implicit PRM and its online training (OPRL, arXiv 2509.19199 Eq. 1-2; PRIME, arXiv 2502.01456).

A causal LM phi whose log-ratio to a reference is a reward for every token, trained so that the trajectory scores

    Q_i = beta sum_k w_k (s_phi[k] - s_ref[k])            w = 1 (`score: sum`) or 1/T_i (`score: mean`)

order the pairs of a group by outcome, or predict each outcome: `agentrl.prm.objective` (w = 0 below `min_probability`).
`s` is the log-prob, or with `centred` the log-prob minus its expectation under the policy that acts: then the expected
reward of every turn is zero, and length alone moves nothing (the plain form gives every turn -beta KL <= 0 on average,
so that longer means lower). See algorithms.md 1.4-1.12, 4.

The update is exact whatever the micro-batch: pass 1 scores without gradient, the loss is differentiated with respect to
the N scores, pass 2 back-propagates sum_k dL/dQ_i beta w_k s_phi[k] row by row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from agentrl.batch import Batch, Centre, TokenScores, hidden_states, score, score_microbatch
from agentrl.batch.index import segment_sum
from agentrl.buffer.pairs import preference_pairs
from agentrl.config.schema import PairConfig, PRMConfig
from agentrl.errors import AgentRLError, NonFiniteError
from agentrl.models.lora import trained_parameters, twin
from agentrl.prm.health import calibration_error, group_correlation
from agentrl.prm.loss import PairTensors, pair_accuracy
from agentrl.prm.objective import Objective, make_objective
from agentrl.prm.replay import learn_from_draws
from agentrl.types import Trajectory

Tensor = torch.Tensor

SLOPE_FLOOR = 1e-6
"""dL/dQ that is worth learning from: where some score has more, a step that moves no parameter is a fault."""


class ImplicitPRM:
    """A PRM with its optimiser, reference and health metrics.

    Args:
        model: the PRM's weights; trained in place.
        initial_policy: the policy before training; copied as the reference unless `config.reference` is ``behaviour``.
        config: PRM options.
        pairs: how pairs are formed.
        temperature: the sampler's temperature, applied to every model alike.
        budget: tokens per forward pass.
        seed: of the pairs' matching, hold-out and replay draws.
        frozen: a model that nobody trains, taken as the ``frozen`` reference in place of that copy.
    """

    def __init__(
        self,
        model: Any,
        initial_policy: Any,
        config: PRMConfig,
        pairs: PairConfig,
        *,
        temperature: float = 1.0,
        budget: int = 16384,
        seed: int = 0,
        frozen: Any = None,
    ) -> None:
        self.model = model
        self.config = config
        self.pair_config = pairs
        self.temperature = temperature
        self.budget = budget
        self.seed = seed
        self.updates = 0
        self.reference: Any = None
        self.reference_logprob: Tensor | None = None
        """(K,) log-probs that the reference gave the batch judged last."""
        if config.reference == "frozen" and frozen is not None:
            self.reference = frozen
        elif config.reference != "behaviour":
            self.reference = twin(initial_policy).requires_grad_(False)
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(
            trained_parameters(self.model), lr=config.lr, eps=config.adam_eps, weight_decay=config.weight_decay
        )

    def step(
        self, batch: Batch, outcome: Tensor, policy: Any, replay: Sequence[Trajectory], iteration: int
    ) -> tuple[Tensor, dict[str, float]]:
        """One iteration: judges the new batch, learns, and gives every action token its reward.

        Args:
            batch: the new batch (K tokens, N trajectories).
            outcome: (N,) its outcomes.
            policy: the model that played it, before its own update.
            replay: trajectories of earlier iterations to learn from as well (may be empty).
            iteration: number of this iteration; seeds the draws.

        Returns:
            rewards (K,) in reward units, and health metrics (pair accuracy is measured *before* the update).
        """
        if self.config.reference == "rebase" and iteration > 0 and iteration % self.config.rebase_every == 0:
            self._rebase(policy)
        centre = self.centre(batch, policy)
        reference = self._reference_of_new(batch, policy, centre)
        pairs = self.pairs(batch.trajectories, self.draw(iteration, 0))
        objective = self.objective(batch.trajectories, outcome, pairs)
        draws = bool(replay) or self.config.holdout > 0 or self.config.groups_per_update is not None
        kept = None if draws else self._pass_to_learn_from(batch, objective, centre)
        before = self.scores(batch, centre) if kept is None else kept.detach().float().cpu()
        check_finite(batch, "the PRM", before)
        check_finite(batch, "the PRM's reference", reference)
        reward = self._reward(batch, before - reference)
        metrics = self._health(batch, reward, before, pairs)
        metrics |= objective.health(self.trajectory_scores(batch, before - reference))
        if draws:
            metrics |= learn_from_draws(self, batch, outcome, policy, replay, iteration)
        else:
            metrics |= self._learn_from_new(batch, objective, reference, centre, before, kept)
        if self.config.order == "update_then_score" and metrics["prm_steps"]:
            reward = self._reward(batch, self.scores(batch, centre) - reference)
            metrics["pair_accuracy_after"] = self._accuracy(batch, reward, pairs)
        if not torch.isfinite(reward).all():
            raise NonFiniteError("the PRM's rewards are not finite")
        return reward, metrics

    def judge(self, batch: Batch, policy: Any) -> tuple[Tensor, dict[str, float]]:
        """Rewards (K,) of a batch and its health metrics, without learning from it. Arguments as in `step`."""
        centre = self.centre(batch, policy)
        s, reference = self.scores(batch, centre), self._reference_of_new(batch, policy, centre)
        check_finite(batch, "the PRM", s)
        check_finite(batch, "the PRM's reference", reference)
        reward = self._reward(batch, s - reference)
        return reward, self._health(batch, reward, s, self.pairs(batch.trajectories, self.draw(0, 3)))

    def update(
        self,
        batch: Batch,
        objective: Objective,
        reference: Tensor,
        centre: Centre | None = None,
        before: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> dict[str, float]:
        """One exact two-pass optimiser step.

        Args:
            batch: N trajectories, K tokens.
            objective: over these N; must have members.
            reference: (K,) the reference's s.
            centre: what to centre on, with `config.centred`.
            before: (K,) the PRM's own s where it is known already; saves pass 1.
            kept: (K,) the same with their graph, where they have one; saves the forward half of pass 2.

        Returns:
            loss, gradient norm, and how far the parameters moved relative to their size.

        Raises:
            NonFiniteError: the loss or its gradient is NaN or infinite.
            AgentRLError: the parameters stay where they are although the loss has a slope.
        """
        involved = objective.members
        if before is None:
            before = self.scores(batch, centre, involved)
        loss, weight = self.token_weights(batch, objective, before - reference)
        if not math.isfinite(loss):
            raise NonFiniteError(f"the PRM's loss is {loss}")
        self.optimizer.zero_grad(set_to_none=True)
        if kept is not None:
            (kept * weight.to(kept)).sum().backward()
        for micro in batch.microbatches(self.budget, involved) if kept is None else ():
            s = self._pick(score_microbatch(self.model, micro, temperature=self.temperature, centre=centre))
            (s * weight[micro.tokens].to(s)).sum().backward()
        grad_norm = float(torch.nn.utils.clip_grad_norm_(trained_parameters(self.model), self.config.grad_clip))
        if not math.isfinite(grad_norm):
            raise NonFiniteError(f"the PRM's gradient norm is {grad_norm}")
        sample = self._sample_parameters()
        self.optimizer.step()
        self.updates += 1
        moved = float((self._sample_parameters() - sample).norm() / sample.norm())
        if moved == 0 and float(weight.abs().max()) > SLOPE_FLOOR * self.config.beta:
            reason = f"its gradient norm is {grad_norm:.3g}: is prm.lr={self.config.lr:g} too small?"
            if grad_norm == 0:
                reason = "its loss has a slope: no gradient reaches its parameters"
            raise AgentRLError(f"the PRM did not move although {reason}")
        return {"prm_loss": loss, "prm_grad_norm": grad_norm, "prm_moved": moved}

    def token_weights(self, batch: Batch, objective: Objective, log_ratio: Tensor) -> tuple[float, Tensor]:
        """Returns the loss and its derivative with respect to each token's s_phi, (K,) float64 (algorithms.md 1.7)."""
        index = batch.index
        scores = self.trajectory_scores(batch, log_ratio).requires_grad_(True)
        loss = objective.loss(scores)
        (slope,) = torch.autograd.grad(loss, scores)
        if self.config.score == "mean":
            slope = slope / index.turns_per_traj.clamp(min=1)
        return float(loss.detach()), self.config.beta * torch.where(self._known(batch), slope[index.traj_of_token], 0.0)

    def trajectory_scores(self, batch: Batch, log_ratio: Tensor) -> Tensor:
        """Returns Q (N,) float64 from log-ratios (K,)."""
        index = batch.index
        total = segment_sum(self._reward(batch, log_ratio), index.traj_of_token, index.N)
        return total / index.turns_per_traj.clamp(min=1) if self.config.score == "mean" else total

    def pairs(self, trajectories: Sequence[Trajectory], seed: int) -> PairTensors:
        """Returns the preference pairs of `trajectories`; `seed` decides matchings and ties."""
        return PairTensors.of(preference_pairs(trajectories, self.pair_config, seed=seed))

    def objective(self, trajectories: Sequence[Trajectory], outcome: Tensor, pairs: PairTensors) -> Objective:
        """Returns what `prm.loss` makes of N trajectories, their outcomes (N,) and pairs."""
        return make_objective(self.config.loss, trajectories, outcome, pairs)

    def centre(self, batch: Batch, policy: Any) -> Centre | None:
        """Returns what `config.centred` centres on; None without it."""
        if not self.config.centred:
            return None
        return Centre(policy, hidden_states(policy, batch, budget=self.budget))

    def reference_scores(self, batch: Batch, policy: Any, centre: Centre | None) -> Tensor:
        """Returns (K,) s of the reference: recorded while sampling for ``behaviour``, else one forward pass."""
        return self._pick(self._reference_pass(batch, policy, centre))

    def scores(self, batch: Batch, centre: Centre | None, trajectories: Sequence[int] | None = None) -> Tensor:
        """Returns (K,) s of the PRM, without gradient; 0 outside `trajectories` (positions; None = all)."""
        return self._pick(
            score(
                self.model,
                batch,
                budget=self.budget,
                temperature=self.temperature,
                centre=centre,
                trajectories=trajectories,
            )
        )

    def draw(self, iteration: int, purpose: int) -> int:
        """Returns the seed of one of an iteration's draws."""
        return int(np.random.SeedSequence((self.seed, iteration, purpose)).generate_state(1)[0])

    def _pass_to_learn_from(self, batch: Batch, objective: Objective, centre: Centre | None) -> Tensor | None:
        """Returns (K,) s of the PRM with their graph, so that one forward pass judges the batch and serves the update.

        None where it would not pay: the batch is more than one micro-batch (its graphs would be held at once), or too
        many of its trajectories are not learned from (the backward pass goes through all).
        """
        if not 0 < batch.tokens <= self.budget or 3 * len(objective.members) < 2 * batch.index.N:
            return None
        (micro,) = batch.microbatches(self.budget)
        s = self._pick(score_microbatch(self.model, micro, temperature=self.temperature, centre=centre))
        return torch.zeros(batch.index.K, dtype=s.dtype, device=s.device).index_copy(0, micro.tokens.to(s.device), s)

    def _learn_from_new(
        self,
        batch: Batch,
        objective: Objective,
        reference: Tensor,
        centre: Centre | None,
        before: Tensor,
        kept: Tensor | None,
    ) -> dict[str, float]:
        """The optimiser steps of an iteration on the new batch alone; what judged it serves the first step too."""
        metrics = objective.size() | {"prm_steps": 0.0}
        for number in range(self.config.updates if objective.members else 0):
            first = (before, kept) if number == 0 else (None, None)
            metrics |= self.update(batch, objective, reference, centre, *first)
            metrics["prm_steps"] += 1
        return metrics

    def _reference_of_new(self, batch: Batch, policy: Any, centre: Centre | None) -> Tensor:
        """`reference_scores` of the batch that is judged; its plain log-probs are kept."""
        scores = self._reference_pass(batch, policy, centre)
        self.reference_logprob = scores.logprob
        return self._pick(scores)

    def _reference_pass(self, batch: Batch, policy: Any, centre: Centre | None) -> TokenScores:
        if self.config.reference == "behaviour" and centre is None:
            return TokenScores(batch.behaviour, None, None)
        model = policy if self.config.reference == "behaviour" else self.reference
        return score(model, batch, budget=self.budget, temperature=self.temperature, centre=centre)

    def _known(self, batch: Batch) -> Tensor:
        """(K,) bool: tokens likely enough under the policy that sampled them for the PRM to know anything of them."""
        if self.config.min_probability == 0:
            return torch.ones(batch.index.K, dtype=torch.bool)
        return batch.behaviour >= math.log(self.config.min_probability)

    def _reward(self, batch: Batch, log_ratio: Tensor) -> Tensor:
        """(K,) process rewards from log-ratios."""
        return self.config.beta * torch.where(self._known(batch), log_ratio, 0.0)

    def _pick(self, scores: TokenScores) -> Tensor:
        return scores.logprob if scores.centred is None else scores.centred

    def _health(self, batch: Batch, reward: Tensor, s: Tensor, pairs: PairTensors) -> dict[str, float]:
        """Metrics of the new batch, before the PRM has seen it."""
        metrics = {}
        if not self.config.centred and batch.index.K:
            metrics["prm_drift"] = float((batch.behaviour - s).mean())
        if len(pairs.winner) == 0:
            return metrics
        index = batch.index
        scores = segment_sum(reward, index.traj_of_token, index.N)
        per_turn = scores / index.turns_per_traj.clamp(min=1)
        metrics["pair_accuracy"] = pair_accuracy(scores, pairs)
        metrics["pair_accuracy_per_turn"] = pair_accuracy(per_turn, pairs)
        metrics["pair_accuracy_length"] = pair_accuracy(-index.turns_per_traj, pairs)
        metrics["pair_margin"] = float((scores[pairs.winner] - scores[pairs.loser]).mean())
        # The mean over turns does not know how long an episode was: what it orders right is skill, not length.
        metrics["prm_skill"] = max(0.0, 2 * metrics["pair_accuracy_per_turn"] - 1)
        metrics["prm_calibration_error"] = calibration_error(scores[pairs.winner] - scores[pairs.loser])
        outcome = torch.tensor([t.outcome for t in batch.trajectories], dtype=torch.float64)
        metrics["prm_return_correlation"] = group_correlation(index, scores, outcome)
        return metrics

    def _accuracy(self, batch: Batch, reward: Tensor, pairs: PairTensors) -> float:
        if len(pairs.winner) == 0:
            return 0.5
        return pair_accuracy(segment_sum(reward, batch.index.traj_of_token, batch.index.N), pairs)

    @torch.no_grad()
    def _rebase(self, policy: Any) -> None:
        for model in (self.model, self.reference):
            for mine, theirs in zip(model.parameters(), policy.parameters(), strict=True):
                if mine is not theirs:  # a frozen base is one for all
                    mine.copy_(theirs)
        self.optimizer = self._make_optimizer()

    def _sample_parameters(self) -> Tensor:
        """A fixed sample of every tensor: enough to see whether the PRM moves, at no memory worth naming."""
        return torch.cat([p.detach().flatten()[:256].float().cpu() for p in trained_parameters(self.model)])

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and counters (weights are saved apart, as safetensors)."""
        return {"optimizer": self.optimizer.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]


def check_finite(batch: Batch, who: str, logprob: Tensor) -> None:
    """Raises NonFiniteError where a log-prob (K,) is NaN or infinite; names the trajectory and the turn."""
    if torch.isfinite(logprob).all():
        return
    index = batch.index
    token = int((~torch.isfinite(logprob)).nonzero()[0])
    turn = int(index.turn_of_token[token])
    name = batch.trajectories[int(index.traj_of_turn[turn])].id
    raise NonFiniteError(
        f"trajectory {name}, turn {int(index.turn_rank[turn])}: a log-prob of {who} is {float(logprob[token])}"
    )
