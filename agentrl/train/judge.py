"""`Judge`: computes the signals that a credit method declares it needs, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from agentrl.batch import Batch, build_batch, score
from agentrl.batch.rows import in_words
from agentrl.config import RunConfig
from agentrl.credit import Signals
from agentrl.credit.base import Need
from agentrl.errors import DataError
from agentrl.models.lora import load_trainable, reference_of, twin
from agentrl.prm import ImplicitPRM
from agentrl.train.critic import Critic
from agentrl.train.shaping import shaped_outcome, shaped_turn_rewards
from agentrl.types import Trajectory, text_of

Metrics = dict[str, Any]


class Judge:
    """The models beside the policy (PRM, initial policy, critic) and what they say about a batch.

    Args:
        config: the run.
        model: the policy before training; copied where a copy is needed (with LoRA: the adapter alone).
        needs: of the credit method.
    """

    def __init__(self, config: RunConfig, model: Any, needs: frozenset[Need]) -> None:
        self.config, self.needs = config, needs
        self.budget = config.policy_update.tokens_per_microbatch
        self.temperature = config.rollout.temperature
        self.initial = self.prm = self.critic = self.served = None
        self.wants_reference = "reference" in needs or config.policy_update.kl_coef > 0
        if self.wants_reference or ("prm" in needs and config.prm.reference == "frozen"):
            self.initial = reference_of(model)
        if "prm" in needs:
            self.prm = ImplicitPRM(
                self._start(config.prm.init, model),
                model,
                config.prm,
                config.pairs,
                temperature=self.temperature,
                budget=self.budget,
                seed=config.seed,
                frozen=self.initial,
            )
        if "values" in needs:
            self.critic = Critic(self._start(config.critic.init, model), config.critic, budget=self.budget)
        if "turn_scores" in needs:
            from agentrl.prm.served import ServedPRM

            assert config.prm.served_url is not None, "checked before the run"
            self.served = ServedPRM(config.prm.served_url, timeout_s=config.prm.served_timeout_s)

    def judge(
        self,
        batch: Batch,
        policy: Any,
        replay: Sequence[Trajectory] = (),
        iteration: int = 0,
        *,
        learn: bool = True,
    ) -> tuple[Signals, Metrics]:
        """Computes the signals of a batch; trains the PRM on the way, where there is one.

        Args:
            batch: K action tokens, M turns, N trajectories.
            policy: the model that played it, before its own update.
            replay: trajectories of earlier iterations for the PRM.
            iteration: number of this iteration.
            learn: train the PRM on the batch.

        Returns:
            the signals, and metrics of the PRM.

        Raises:
            DataError: the environment gave a turn no state key.
            InfrastructureError: a served PRM does not answer.
            NonFiniteError: the PRM's loss, gradient or rewards are not finite.
        """
        trajectories = batch.trajectories
        outcome = shaped_outcome(trajectories, self.config.shaping)
        fields: dict[str, Any] = {}
        metrics: Metrics = {}
        seen = batch
        if self.prm is not None:
            seen, replay = self._in_words(batch, replay)
            if learn:
                raw = torch.tensor([t.outcome for t in trajectories], dtype=torch.float64)
                fields["token_reward"], metrics = self.prm.step(seen, raw, policy, replay, iteration)
            else:
                fields["token_reward"], metrics = self.prm.judge(seen, policy)
            fields |= {"prm_updates": self.prm.updates, "prm_skill": metrics.get("prm_skill")}
        if self.wants_reference:
            # The PRM's frozen reference is the same model: its pass over the same batch serves both.
            shared = self.prm is not None and self.prm.reference is self.initial and seen is batch
            known = self.prm.reference_logprob if self.prm is not None and shared else None
            fields["reference_logprob"] = self._score(self.initial, batch).logprob if known is None else known
        if "entropy" in self.needs:
            fields["entropy"] = self._score(policy, batch, want_entropy=True).entropy
        if self.critic is not None:
            fields["value"] = self.critic.values(batch)
        if "turn_rewards" in self.needs:
            fields["turn_reward"] = shaped_turn_rewards(trajectories, self.config.shaping)
        if "state_keys" in self.needs:
            fields["state_key"] = state_keys(trajectories)
        if self.served is not None:
            fields["turn_score"] = self.served.score(trajectories)
        names = [t.id for t in trajectories]
        return Signals(batch.index, outcome, policy_logprob=batch.behaviour, names=names, **fields), metrics

    def models(self) -> dict[str, Any]:
        """Models that change while training: name -> model."""
        found: dict[str, Any] = {}
        if self.prm is not None:
            found["prm"] = self.prm.model
            if self.config.prm.reference == "rebase":
                found["prm_reference"] = self.prm.reference
        if self.critic is not None:
            found["critic"] = self.critic.model
        return found

    def state_dict(self) -> dict[str, Any]:
        """Optimisers and counters (weights are saved apart, as safetensors)."""
        parts = {"prm": self.prm, "critic": self.critic}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for name, part in (("prm", self.prm), ("critic", self.critic)):
            if part is not None:
                part.load_state_dict(state[name])

    def _in_words(self, batch: Batch, replay: Sequence[Trajectory]) -> tuple[Batch, Sequence[Trajectory]]:
        """The batch and the replay as a PRM reads them: it takes text only (algorithms.md 1.9), pictures in words.

        Raises:
            DataError: a picture that nothing describes.
        """
        if not any(turn.prompt_images for t in (*batch.trajectories, *replay) for turn in t.turns):
            return batch, replay
        for t in batch.trajectories:
            for number, turn in enumerate(t.turns):
                if turn.prompt_images and not text_of(turn.observation).strip():
                    raise DataError(
                        f"trajectory {t.id}, turn {number}: the PRM reads text only, and environment {t.env!r} showed "
                        "a picture without words; put a TextPart beside it, or give image_part(pixels, alt=...)"
                    )
        words = build_batch([in_words(t) for t in batch.trajectories], device=batch.device)
        return words, [in_words(t) for t in replay]

    def _start(self, path: str | None, model: Any) -> Any:
        if path is None:
            return twin(model)
        config = self.config.model
        return load_trainable(path, device=config.device, dtype=config.dtype, lora=self.config.lora)

    def _score(self, model: Any, batch: Batch, want_entropy: bool = False) -> Any:
        return score(model, batch, budget=self.budget, temperature=self.temperature, want_entropy=want_entropy)


def state_keys(trajectories: Sequence[Trajectory]) -> list[str]:
    """Returns M keys of the states that the turns acted in.

    Raises:
        DataError: a turn without one.
    """
    keys: list[str] = []
    for trajectory in trajectories:
        info = trajectory.start_info
        for number, turn in enumerate(trajectory.turns):
            key = info.get("state_key")
            if key is None:
                raise DataError(
                    f"trajectory {trajectory.id}, turn {number}: environment {trajectory.env!r} gave no state_key in "
                    f"the info after {'the turn before' if number else 'reset'}"
                )
            keys.append(str(key))
            info = turn.info
    return keys
