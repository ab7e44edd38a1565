"""A base model to start RL from: a small network made from nothing, which lessons of scripted players then teach.

RL needs a policy that sometimes succeeds. A lesson is demonstrations and a pass of supervised learning over them. A
first lesson from a skilled player teaches the task, a second from an unsure one teaches doubt: the model then knows
more than it shows when sampled, as a pretrained model does, and leaves RL something to bring out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from agentrl.config import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.config.schema import Section
from agentrl.errors import UserError
from agentrl.policy import Policy, load_policy
from agentrl.types import Trajectory

TEACHING_SEEDS = 500_000_000
"""First seed of the demonstrations: far from those of training and evaluation. What keeps held-out tasks out of the
lessons in any case is the environment's split."""


class Lesson(Section):
    """One lesson: who plays, how often, and how fast the model learns from it."""

    policy: str
    """Player, by name (``agentrl policies`` lists all)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the player."""
    episodes: int = Field(ge=1)
    """Episodes that it plays, each of another task."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate (see `agentrl.train.sft.sft`)."""


class TeachingProgress(Protocol):
    """Who watches `make_base`."""

    def made(self, facts: Mapping[str, Any]) -> None:
        """The blank model is there: what `init_model` returns."""

    def playing(self, lesson: Lesson) -> AbstractContextManager[Callable[[Trajectory], None]]:
        """Around the demonstrations of a lesson; what it yields is called with each finished episode."""

    def cloning(self, number: int) -> AbstractContextManager[Callable[[dict[str, float]], None]]:
        """Around the learning of lesson `number` (from 1); what it yields is `sft`'s `on_step`."""


class _Silent:
    def made(self, facts: Mapping[str, Any]) -> None: ...

    def playing(self, lesson: Lesson) -> AbstractContextManager[Callable[[Trajectory], None]]:
        return nullcontext(lambda trajectory: None)

    def cloning(self, number: int) -> AbstractContextManager[Callable[[dict[str, float]], None]]:
        return nullcontext(lambda state: None)


def make_base(
    env: EnvConfig,
    out: str | Path,
    lessons: Sequence[Lesson],
    *,
    history: str = "full",
    preset: str = "tiny",
    batch_tokens: int = 2048,
    seed: int = 0,
    threads: int | None = None,
    progress: TeachingProgress | None = None,
) -> Path:
    """Writes a model directory: a new network, taught by `lessons` in their order. The same arguments, the same files.

    Args:
        env: environment, with the keyword arguments of training.
        out: directory to write; it appears when the last lesson is learnt. An existing model is replaced.
        lessons: at least one.
        history: context policy, as in training (``full`` or ``window(k)``).
        preset: shape of the network (`agentrl.models.init.PRESETS`).
        batch_tokens: tokens of one optimiser step.
        seed: of tasks, players, weights and the order of learning.
        threads: torch threads on a CPU.
        progress: told what happens; None is silent.

    Returns:
        `out`.

    Raises:
        UserError: no lesson, an unknown player, preset or environment, or `out` cannot be written.
        DataError: a lesson without a finished episode.
    """
    from agentrl.evaluate.texts import environment_texts
    from agentrl.models.init import init_model
    from agentrl.models.load import check_model_output
    from agentrl.train.sft import sft

    if not lessons:
        raise UserError("lessons=[]: a base model needs at least one lesson")
    for lesson in lessons:
        _player(lesson)  # a misspelt one is refused now, not after the lessons before it
    out, progress = check_model_output(out), progress or _Silent()
    first = TEACHING_SEEDS + seed * 10_000_000
    texts, words = environment_texts(env, 64, seed=first)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        pupil = Path(scratch) / "model"
        progress.made(init_model(pupil, texts, preset=preset, words=words, seed=seed))
        for number, lesson in enumerate(lessons, 1):
            with progress.playing(lesson) as on_episode:
                episodes = demonstrate(env, lesson, first, seed=seed, on_episode=on_episode)
            first += lesson.episodes
            with progress.cloning(number) as on_step:
                sft(
                    str(pupil),
                    episodes,
                    str(out if number == len(lessons) else pupil),
                    history=history,
                    lr=lesson.lr,
                    batch_tokens=batch_tokens,
                    seed=seed,
                    threads=threads,
                    on_step=on_step,
                )
    return out


def demonstrate(
    env: EnvConfig,
    lesson: Lesson,
    first: int,
    *,
    seed: int = 0,
    on_episode: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """Returns the episodes of a lesson: tasks `first`, `first` + 1, ..., one episode each; `seed` is the player's."""
    from agentrl.rollout import Collector, Task

    tasks = [Task(task, str(task)) for task in range(first, first + lesson.episodes)]
    with Collector(_player(lesson), env, RolloutConfig(), OutcomeConfig(), on_episode=on_episode) as collector:
        return collector.collect(tasks, seed=seed).trajectories


def _player(lesson: Lesson) -> Policy:
    try:
        return load_policy(lesson.policy, **lesson.options)
    except TypeError as error:
        raise UserError(f"policy {lesson.policy!r} cannot be made with {lesson.options}: {error}") from error
