"""`compare`: is B better than A? Two evaluations of the same tasks, paired task by task."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel

from agentrl.buffer import read_jsonl
from agentrl.errors import DataError, UserError
from agentrl.evaluate.stats import Interval, bootstrap_mean, sign_flip_p
from agentrl.evaluate.store import EPISODES
from agentrl.types import Trajectory


class Difference(BaseModel):
    """B minus A in one quantity."""

    a: float
    """Mean of A over the paired tasks, each weighing the same."""
    b: float
    difference: Interval
    """With its 95 % bootstrap interval over tasks."""
    p: float
    """Of a two-sided sign-flip permutation test over tasks."""


class Comparison(BaseModel):
    """Two evaluations, paired by task: environment, arguments and seed."""

    a: str
    b: str
    environments: list[str]
    tasks: int
    """Tasks that both played; all else is in no figure."""
    only_a: int
    """Tasks that only A played (or where B has infrastructure failures alone)."""
    only_b: int
    episodes_a: int
    """Scored episodes of the paired tasks."""
    episodes_b: int
    failures_a: int
    """Infrastructure failures, in no figure."""
    failures_b: int
    success: Difference
    outcome: Difference


@dataclass(frozen=True)
class _Task:
    env: str
    arguments: str
    """Keyword arguments and reset options, as canonical JSON."""
    seed: int


@dataclass
class _Side:
    name: str
    success: dict[_Task, list[float]]
    outcome: dict[_Task, list[float]]
    failures: int

    @property
    def environments(self) -> set[tuple[str, str]]:
        return {(task.env, task.arguments) for task in self.success}


def load_episodes(source: str | os.PathLike[str]) -> list[Trajectory]:
    """Returns the trajectories of a file, or of all files of an evaluation's or a run's folder.

    Raises:
        DataError: no such file, no trajectory in it, or a broken line.
    """
    path = Path(source)
    files = [path]
    if path.is_dir():
        folder = path / EPISODES if (path / EPISODES).is_dir() else path
        files = sorted(folder.glob("*.jsonl"))
        if not files:
            raise DataError(f"no trajectory file in {str(folder)!r} (an evaluation writes them with --out)")
    found = [trajectory for file in files for trajectory in read_jsonl(file)]
    if not found:
        raise DataError(f"{str(path)!r} holds no trajectory")
    return found


def compare(
    a: str | os.PathLike[str] | Iterable[Trajectory],
    b: str | os.PathLike[str] | Iterable[Trajectory],
    *,
    env: str | None = None,
    seed: int = 0,
) -> Comparison:
    """Returns how much better B is than A on the tasks that both played, with interval and p-value.

    A task's value is the mean of its scored episodes. The difference is the mean over tasks, its interval a bootstrap
    that draws whole tasks, and p that of flipping the signs of the tasks' differences.

    Args:
        a: folder of an evaluation, trajectory file, or trajectories.
        b: likewise.
        env: compare in this environment alone.
        seed: of the resampling.

    Raises:
        UserError: other environments or arguments on the two sides (names them), or no task in common.
        DataError: as `load_episodes`.
    """
    left, right = _side(a, "A", env), _side(b, "B", env)
    _check_same(left, right)
    tasks = [task for task in left.success if task in right.success]
    if not tasks:
        raise UserError(
            f"{left.name} and {right.name} have no task in common (seeds {_seeds(left)} and {_seeds(right)}); evaluate "
            "both with the same --seed"
        )
    return Comparison(
        a=left.name,
        b=right.name,
        environments=sorted({task.env for task in tasks}),
        tasks=len(tasks),
        only_a=len(left.success) - len(tasks),
        only_b=len(right.success) - len(tasks),
        episodes_a=sum(len(left.success[task]) for task in tasks),
        episodes_b=sum(len(right.success[task]) for task in tasks),
        failures_a=left.failures,
        failures_b=right.failures,
        success=paired([fmean(left.success[t]) for t in tasks], [fmean(right.success[t]) for t in tasks], seed=seed),
        outcome=paired([fmean(left.outcome[t]) for t in tasks], [fmean(right.outcome[t]) for t in tasks], seed=seed),
    )


def paired(a: Sequence[float], b: Sequence[float], *, seed: int = 0) -> Difference:
    """Returns B minus A, given the values (T,) of the same tasks on both sides."""
    differences = [right - left for left, right in zip(a, b, strict=True)]
    interval = bootstrap_mean(differences, range(len(differences)), seed=seed)
    return Difference(a=fmean(a), b=fmean(b), difference=interval, p=sign_flip_p(differences, seed=seed))


def _side(source: Any, name: str, env: str | None) -> _Side:
    from_file = isinstance(source, str | os.PathLike)
    episodes = load_episodes(source) if from_file else list(source)
    if env is not None:
        known = sorted({one.env for one in episodes})
        episodes = [one for one in episodes if one.env == env]
        if not episodes:
            raise UserError(f"{name} has no episode of {env!r}; it has: {', '.join(known)}")
    side = _Side(str(source) if from_file else name, defaultdict(list), defaultdict(list), 0)
    for one in episodes:
        if not one.scorable:
            side.failures += 1
            continue
        task = _Task(one.env, json.dumps(one.task, sort_keys=True, separators=(",", ":")), one.seed)
        side.success[task].append(float(one.success))
        side.outcome[task].append(one.outcome)
    if not side.success:
        raise DataError(f"{side.name} has no episode that can be scored ({side.failures} infrastructure failures)")
    return side


def _check_same(left: _Side, right: _Side) -> None:
    """Refuses sides that did not play the same environments with the same arguments."""
    if left.environments == right.environments:
        return
    for side, other in ((left, right), (right, left)):
        here, there = ({env for env, _ in one.environments} for one in (side, other))
        if extra := sorted(here - there):
            raise UserError(
                f"{side.name} has episodes of {', '.join(extra)}, {other.name} has none; compare one environment that "
                "both played (--env ID)"
            )
    env, ours = sorted(left.environments - right.environments or right.environments - left.environments)[0]
    theirs = next(arguments for name, arguments in sorted(right.environments) if name == env and arguments != ours)
    raise UserError(
        f"{env}: {left.name} and {right.name} were played with other arguments ({_shown(ours)} and {_shown(theirs)}); "
        "evaluate both with the same"
    )


def _shown(arguments: str) -> str:
    task = json.loads(arguments)
    given = {**task.get("kwargs", {}), **task.get("options", {})}
    return ", ".join(f"{key}={value!r}" for key, value in given.items()) or "none"


def _seeds(side: _Side) -> str:
    seeds = [task.seed for task in side.success]
    return f"{min(seeds)}..{max(seeds)}"
