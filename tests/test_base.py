"""A base model made from lessons: what it writes, that it repeats itself, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentrl.config import EnvConfig, RolloutConfig
from agentrl.errors import UnknownNameError, UserError
from agentrl.evaluate import evaluate
from agentrl.policy import Sampling, load_policy
from agentrl.train.base import TEACHING_SEEDS, Lesson, demonstrate, make_base

LOCK = EnvConfig(id="Lock-v0", kwargs={"length": 3, "symbols": 2, "split": "train"}, max_turns=6, instructions="")
SHORT = [
    Lesson(policy="lock-solver", episodes=20),
    Lesson(policy="lock-noisy-solver", options={"skill": 0.5}, episodes=9),
]


def base(out: Path, lessons: list[Lesson] = SHORT, **options: Any) -> Path:
    return make_base(LOCK, out, lessons, **{"history": "window(0)", "threads": 1, **options})


def weights(model: Path) -> bytes:
    return (model / "model.safetensors").read_bytes()


class Watched:
    """Notes what happens, in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def made(self, facts: Any) -> None:
        self.events.append(("made", facts["preset"]))

    @contextmanager
    def playing(self, lesson: Lesson) -> Iterator[Any]:
        seeds: list[int] = []
        yield lambda trajectory: seeds.append(trajectory.seed)
        self.events.append((lesson.policy, sorted(seeds)))

    @contextmanager
    def cloning(self, number: int) -> Iterator[Any]:
        steps: list[float] = []
        yield lambda state: steps.append(state["step"])
        self.events.append((number, steps == list(range(1, len(steps) + 1)) and len(steps) > 0))


def test_the_same_arguments_give_the_same_files_and_leave_nothing_beside(tmp_path: Path) -> None:
    one, two = base(tmp_path / "new" / "one", seed=1), base(tmp_path / "new" / "two", seed=1)
    assert one == tmp_path / "new" / "one"
    assert weights(one) == weights(two)
    assert weights(base(two, seed=2)) != weights(one)
    assert weights(base(two, SHORT[:1], seed=1)) != weights(one), "the last lesson counts"
    assert weights(base(two, SHORT[1:], seed=1)) != weights(one), "so does the first"
    assert sorted(path.name for path in one.parent.iterdir()) == ["one", "two"]


def test_progress_is_told_in_order_and_no_task_is_played_twice(tmp_path: Path) -> None:
    watched = Watched()
    base(tmp_path / "base", progress=watched, seed=3)
    first = TEACHING_SEEDS + 30_000_000
    assert watched.events == [
        ("made", "tiny"),
        ("lock-solver", list(range(first, first + 20))),
        (1, True),
        ("lock-noisy-solver", list(range(first + 20, first + 29))),
        (2, True),
    ]


def test_lessons_are_learnt(tmp_path: Path) -> None:
    out = base(tmp_path / "base", [Lesson(policy="lock-solver", episodes=250, lr=3e-3)], batch_tokens=512)
    player, greedy = load_policy("transformers", model=str(out)), Sampling(temperature=0.0, max_new_tokens=3)
    rollout = RolloutConfig(history="window(0)", max_new_tokens=3)
    held_out = LOCK.model_copy(update={"kwargs": {**LOCK.kwargs, "split": "test"}})
    assert evaluate(player, held_out, episodes=20, rollout=rollout, sampling=greedy).success.value == 1


def test_demonstrations_are_of_the_training_split_by_the_lessons_player() -> None:
    episodes = demonstrate(LOCK, SHORT[0], first=7)
    assert [episode.seed for episode in episodes] == list(range(7, 27))
    assert all(episode.success and len(episode.turns) == 3 for episode in episodes)


def test_what_cannot_work_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("my own work")
    with pytest.raises(UserError, match="holds something that is no model"):
        base(tmp_path / "mine")
    with pytest.raises(UserError, match="at least one lesson"):
        base(tmp_path / "none", [])
    with pytest.raises(UnknownNameError, match=r"no policy 'lock-sovler'; did you mean 'lock-solver'"):
        base(tmp_path / "typo", [SHORT[0], Lesson(policy="lock-sovler", episodes=1)])
    with pytest.raises(UnknownNameError, match="huge"):
        base(tmp_path / "huge", preset="huge")
    with pytest.raises(UserError, match=r"cannot be made with.*skil"):
        base(tmp_path / "typo", [Lesson(policy="lock-noisy-solver", options={"skil": 1}, episodes=1)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(ValueError, match="episodes"):
        Lesson(policy="lock-solver", episodes=0)
