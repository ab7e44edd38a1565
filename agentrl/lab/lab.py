"""One policy plays and learns; every credit method judges each batch; dynamic programming says who is right.

The policy is trained by the baseline method's advantages, so that it moves away from its start (a method that leans on
the reference would otherwise have nothing to say) and all methods see the very same episodes. Each method has judges of
its own (PRM, critic), trained on these episodes as in its own run; methods with equal settings for them share one.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from agentrl.batch import Batch, build_batch
from agentrl.batch.index import segment_mean, segment_sum
from agentrl.config import RunConfig
from agentrl.credit import Advantage, CreditMethod, Options, Signals, load_credit
from agentrl.envs import Tabular, make
from agentrl.errors import ConfigError, UserError
from agentrl.lab.exact import ExactValues
from agentrl.lab.measure import explained, luck, sign_accuracy, spearman
from agentrl.train.judge import Judge, state_keys
from agentrl.train.trainer import Trainer
from agentrl.types import Trajectory

SHARED = ("env", "model", "rollout", "outcome", "policy_update")
"""Sections that all methods of a lab must agree on: they decide what is played."""

RESAMPLE_SEED = 7_000_000
"""Added to the seed of the actions for each resample, so that none repeats what training played."""


@dataclass
class MethodScore:
    """What one method's advantages were worth, one entry per iteration unless said otherwise."""

    rank: list[float] = field(default_factory=list)
    """Spearman correlation of the turn's whole advantage with the truth."""
    rank_step: list[float] = field(default_factory=list)
    """The same of its step term alone; 0 where it has none."""
    sign: list[float] = field(default_factory=list)
    """Share of decisive turns with the right sign."""
    explained: list[float] = field(default_factory=list)
    """Share of the truth's variance that episode and step term together explain linearly."""
    rank_reward: list[float] = field(default_factory=list)
    """Spearman correlation of the implicit PRM's turn rewards, untouched by normalisation; empty without a PRM."""
    rank_reward_before: float | None = None
    """The same on the first batch, before the PRM learned anything."""
    pair_accuracy: list[float] = field(default_factory=list)
    """Of the PRM on the new batch, before it learned from it (where there were pairs)."""
    fresh_rank: float = 0.0
    """Spearman correlation of the whole advantage on the resampled batches after training, which no judge learned
    from."""
    fresh_rank_reward: float | None = None
    """The same of the PRM's turn rewards."""
    luck: float = float("nan")
    """Share of the advantage's variance over resamples that is not the move's own (see `agentrl.lab.measure.luck`)."""


class Judged(NamedTuple):
    """One method's view of a batch, per turn."""

    total: np.ndarray
    episode: np.ndarray
    step: np.ndarray
    reward: np.ndarray | None
    pair_accuracy: float | None


class Panel:
    """The methods of a lab with their judges."""

    def __init__(self, configs: Mapping[str, RunConfig], model: Any) -> None:
        self.methods: dict[str, tuple[CreditMethod, Options, str]] = {}
        wanted: dict[str, tuple[RunConfig, frozenset[Any]]] = {}
        for name, config in configs.items():
            method, options = load_credit(config.credit.method, config.credit.options)
            needs = method.needs_of(options)
            key = _judge_key(config, needs)
            wanted[key] = (config, needs | wanted.get(key, (config, frozenset()))[1])
            self.methods[name] = method, options, key
        self.judges = {key: Judge(config, model, needs) for key, (config, needs) in wanted.items()}
        self.played: deque[list[Trajectory]] = deque(
            maxlen=max(config.prm.replay_iterations for config in configs.values()) - 1
        )
        self.skill: dict[str, float | None] = {}

    def judge(self, batch: Batch, policy: Any, iteration: int, *, learn: bool) -> dict[str, Judged]:
        """Every method's view of `batch`; with `learn` PRMs and critics are trained on it."""
        found: dict[str, tuple[Signals, dict[str, Any]]] = {}
        for key, judge in self.judges.items():
            share = judge.config.prm.replay_iterations - 1
            replay = [t for old in list(self.played)[len(self.played) - share :] for t in old] if share else []
            signals, metrics = judge.judge(batch, policy, replay, iteration, learn=learn)
            if learn:
                self.skill[key] = signals.prm_skill
            else:  # a gate opens as far as it did when training ended
                signals = dataclasses.replace(signals, prm_skill=self.skill.get(key))
            found[key] = signals, metrics
        views, targets = {}, {}
        for name, (method, options, key) in self.methods.items():
            signals, metrics = found[key]
            advantage = method(signals, options)
            views[name] = _view(advantage, signals, metrics)
            if advantage.value_target is not None:
                targets[key] = advantage.value_target
        for key, target in targets.items():
            critic, value = self.judges[key].critic, found[key][0].value
            assert critic is not None
            assert value is not None
            if learn:
                critic.update(batch, target, value, seed=iteration)
        if learn:
            self.played.append(list(batch.trajectories))
        return views


def _judge_key(config: RunConfig, needs: frozenset[Any]) -> str:
    """Equal for methods whose judges would learn the very same."""
    parts: dict[str, Any] = {"shaping": config.shaping.model_dump(mode="json")}
    if "prm" in needs:
        parts |= {"prm": config.prm.model_dump(mode="json"), "pairs": config.pairs.model_dump(mode="json")}
    if "values" in needs:
        # A critic learns the targets of its own method.
        parts |= {"critic": config.critic.model_dump(mode="json"), "credit": config.credit.model_dump(mode="json")}
    return json.dumps(parts, sort_keys=True)


def _view(advantage: Advantage, signals: Signals, metrics: Mapping[str, Any]) -> Judged:
    index = signals.index
    reward = None
    if signals.token_reward is not None:
        reward = segment_sum(signals.token_reward, index.turn_of_token, index.M).numpy()
    return Judged(
        segment_mean(advantage.token, index.turn_of_token, index.M).numpy(),
        advantage.episode.double().numpy(),
        advantage.step.double().numpy(),
        reward,
        metrics.get("pair_accuracy"),
    )


class Lab(Trainer):
    """A trainer whose batches are judged by a panel before each update."""

    def __init__(self, configs: Mapping[str, RunConfig], baseline: str) -> None:
        _check_shared(configs, baseline)
        super().__init__(configs[baseline])
        config = self.config
        if config.rollout.history != "window(0)" or config.env.instructions is None:
            raise UserError(
                "the lab needs a policy that sees the state and nothing else: set rollout.history='window(0)' and "
                "env.instructions"
            )
        self.panel = Panel(configs, self.model)
        self.env = make(config.env.id, max_turns=config.env.max_turns, **config.env.kwargs)
        spec = self.env.spec
        self.horizon = config.env.max_turns or (spec.max_episode_steps if spec is not None else None) or 0
        if not self.horizon:
            raise UserError(f"environment {config.env.id!r} has no turn limit; set env.max_turns")
        self.scores = {name: MethodScore() for name in configs}
        self.tables: dict[str, Tabular] = {}
        self.exact: tuple[Any, ExactValues] | None = None

    def close(self) -> None:
        self.env.close()
        super().close()

    def play(self) -> None:
        """Trains to the last iteration, judged on the way; nothing is evaluated or saved."""
        while self.iteration < self.config.iterations:
            self._log(self.iterate())

    def truth(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        """(M,) exact advantage of every turn under the current policy.

        nan for turns that follow text that was no action: the agent then reads an error line above the state, which is
        no observation of the table.
        """
        for trajectory in trajectories:
            task = f"{trajectory.seed}"
            if task not in self.tables:
                self.env.reset(seed=trajectory.seed)
                self.tables[task] = self._tabular()
        tasks = {f"{t.seed}": self.tables[f"{t.seed}"] for t in trajectories}
        known = (self.iteration, *sorted(tasks))
        if self.exact is None or self.exact[0] != known:  # resamples play the same tasks with the same policy
            made = ExactValues(
                self.model,
                self.policy.chat,  # type: ignore[attr-defined]
                tasks,
                instructions=self.config.env.instructions or "",
                horizon=self.horizon,
                temperature=self.config.rollout.temperature,
            )
            self.exact = known, made
        exact = self.exact[1]
        keys = iter(state_keys(trajectories))
        values = []
        for t in trajectories:
            clear = True
            for number, turn in enumerate(t.turns):
                key, action = next(keys), self._action(turn)
                value = exact.advantage(str(t.seed), key, action, self.horizon - number)
                values.append(value if clear else np.nan)
                clear = action is not None
        return np.array(values)

    def _tabular(self) -> Tabular:
        inner = self.env.unwrapped
        try:
            table: Tabular = inner.tabular()  # type: ignore[attr-defined]
        except (AttributeError, NotImplementedError):
            raise UserError(
                f"environment {self.config.env.id!r} has no exact values: it does not say what its states are "
                "(TextEnv.tabular); take Sokoban-v0 or Lock-v0"
            ) from None
        return table

    def _action(self, turn: Any) -> str | None:
        """Canonical text of the action that a turn played; None where it played none."""
        if turn.info.get("valid_action") is False:
            return None
        inner: Any = self.env.unwrapped
        meant = inner.parse_action(turn.action)
        table = next(iter(self.tables.values()))
        return next(action for action in table.actions if inner.parse_action(action) == meant)

    def _update(self, batch: Batch, signals: Signals, advantage: Advantage) -> dict[str, Any]:
        truth = self.truth(batch.trajectories)
        known = np.isfinite(truth)
        if self.iteration == 0:
            for name, view in self.panel.judge(batch, self.model, 0, learn=False).items():
                if view.reward is not None:
                    self.scores[name].rank_reward_before = spearman(view.reward[known], truth[known])
        for name, view in self.panel.judge(batch, self.model, self.iteration, learn=True).items():
            score, right = self.scores[name], truth[known]
            score.rank.append(spearman(view.total[known], right))
            score.rank_step.append(spearman(view.step[known], right))
            score.sign.append(sign_accuracy(view.total[known], right))
            score.explained.append(explained(right, view.episode[known], view.step[known]))
            if view.reward is not None:
                score.rank_reward.append(spearman(view.reward[known], right))
            if view.pair_accuracy is not None:
                score.pair_accuracy.append(view.pair_accuracy)
        return super()._update(batch, signals, advantage)

    def resample(self, times: int) -> None:
        """Plays the next tasks `times` times over with the final policy.

        `fresh_rank` judges with PRMs and critics as they are, which have seen none of these episodes. `luck` lets
        copies of them learn from each play as in training: what a PRM picks up by chance is luck as well.
        """
        tasks = self.dealer.deal(self.config.rollout.groups, self.iteration)
        truths: list[np.ndarray] = []
        fresh: dict[str, list[Judged]] = {name: [] for name in self.scores}
        learned: dict[str, list[np.ndarray]] = {name: [] for name in self.scores}
        moves: list[Any] = []
        for number in range(times):
            seed = self.config.seed + RESAMPLE_SEED * (number + 1)
            played = self.collector.collect(tasks, seed=seed, iteration=self.iteration).trajectories
            truths.append(self.truth(played))
            keys = iter(state_keys(played))
            moves += [(t.seed, next(keys), self._action(turn), n) for t in played for n, turn in enumerate(t.turns)]
            batch = build_batch(played, device=self.config.model.device)
            for name, view in self.panel.judge(batch, self.model, self.iteration, learn=False).items():
                fresh[name].append(view)
            for name, view in copy.deepcopy(self.panel).judge(batch, self.model, self.iteration, learn=True).items():
                learned[name].append(view.total)
        truth = np.concatenate(truths)
        known = np.isfinite(truth)
        for name, score in self.scores.items():
            total = np.concatenate([view.total for view in fresh[name]])
            score.fresh_rank = spearman(total[known], truth[known])
            score.luck = luck(np.concatenate(learned[name]), moves)
            rewards = [view.reward for view in fresh[name] if view.reward is not None]
            if rewards:
                score.fresh_rank_reward = spearman(np.concatenate(rewards)[known], truth[known])


def run_lab(
    configs: Mapping[str, RunConfig],
    baseline: str,
    *,
    resamples: int = 4,
    on_iteration: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, MethodScore]:
    """Trains one policy and scores every method on its episodes.

    Args:
        configs: one run per method, equal but for credit and judges (`SHARED` names the sections that must be).
        baseline: the method whose advantages train the policy; its config says how long, where and from what model.
        resamples: how often the tasks after the last iteration are played again for `MethodScore.luck`.
        on_iteration: called with every iteration's metrics.

    Returns:
        scores by method.

    Raises:
        ConfigError: methods that would not see the same episodes.
        UserError: an environment without exact values, or a policy that sees more than the state.
    """
    torch.manual_seed(configs[baseline].seed)
    lab = Lab(configs, baseline)
    lab.on_iteration = on_iteration
    try:
        lab.play()
        lab.resample(resamples)
    finally:
        lab.close()
    return lab.scores


def _check_shared(configs: Mapping[str, RunConfig], baseline: str) -> None:
    ours = configs[baseline]
    for name, config in configs.items():
        for section in SHARED:
            if getattr(config, section) != getattr(ours, section):
                raise ConfigError(
                    f"methods {baseline!r} and {name!r} differ in {section!r}: in the lab all methods judge the same "
                    "episodes; set it for all of them"
                )
