"""`compare`: is B better than A? Two evaluations of the same tasks, paired task by task."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import gymnasium as gym
from pydantic import BaseModel, Field

from agentrl.buffer import read_jsonl
from agentrl.config import dotted
from agentrl.config.schema import EnvConfig, OutcomeConfig
from agentrl.envs.registry import load_plugins
from agentrl.errors import DataError, UserError
from agentrl.evaluate.stats import Interval, bootstrap_mean, sign_flip_p
from agentrl.evaluate.store import EPISODES, SETTINGS, read_settings
from agentrl.remote.address import name_of
from agentrl.types import Trajectory

_RULES = ("max_turns", "wrappers", "instructions")
"""Settings of an environment that decide how its tasks are played; its arguments are in the episodes themselves."""


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
    differences: list[str] = Field(default_factory=list)
    """Settings that the two evaluations do not share, policies apart; known where both folders have ``settings.json``.
    Those of the environment and the outcome rule are here only where they were compared `anyway`."""


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
    settings: Mapping[str, Any] | None = None
    """``settings.json`` of its folder, where it has one."""
    hosts: set[str] = field(default_factory=set)
    """Ids of the environments as they were given: a served one has an address."""
    played: int = 0
    wanted: int = 0
    """Episodes that it asked for; 0 where that is not known."""

    @property
    def incomplete(self) -> str:
        return f"{self.name} is not complete ({self.played} of {self.wanted} episodes)"

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
    anyway: bool = False,
) -> Comparison:
    """Returns how much better B is than A on the tasks that both played, with interval and p-value.

    A task's value is the mean of its scored episodes. The difference is the mean over tasks, its interval a bootstrap
    that draws whole tasks, and p that of flipping the signs of the tasks' differences.

    Args:
        a: folder of an evaluation, trajectory file, or trajectories.
        b: likewise.
        env: compare in this environment alone.
        seed: of the resampling.
        anyway: compare what was played under other turn limits, wrappers, instructions or outcome rules, or is not
            complete, and list that (`Comparison.differences`).

    Raises:
        UserError: other environments, arguments or rules on the two sides (names them), an evaluation that was
            interrupted, or no task in common. Rules (turn limit, wrappers, instructions, outcome) are known where both
            sides are of an evaluation's folder.
        DataError: as `load_episodes`, or settings that cannot be read.
    """
    left, right = _side(a, "A", env), _side(b, "B", env)
    _check_same(left, right)
    cut = [side for side in (left, right) if side.played < side.wanted]
    if cut and not anyway:
        raise UserError(
            f"{cut[0].incomplete}: those that ended first, which are not like the rest; the command that began it "
            "plays what is missing (--anyway compares them as they are)"
        )
    rules = _other_rules(left, right)
    if rules and not anyway:
        raise UserError(
            f"{left.name} and {right.name} were not played under the same rules: {rules[0]}; evaluate both with "
            "the same (--anyway compares them as they are)"
        )
    differences = [side.incomplete for side in cut] + rules + _other_hosts(left, right)
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
        differences=differences + _other_play(left, right),
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
        episodes = [one for one in episodes if env in (one.env, name_of(one.env))]
        if not episodes:
            raise UserError(f"{name} has no episode of {env!r}; it has: {', '.join(known)}")
    settings = _settings(Path(source)) if from_file else None
    side = _Side(str(source) if from_file else name, defaultdict(list), defaultdict(list), 0, settings)
    side.hosts = {one.env for one in episodes}
    if settings is not None:
        side.played, side.wanted = len(episodes), _wanted(Path(source), settings, env)
    for one in episodes:
        if not one.scorable:
            side.failures += 1
            continue
        task = _Task(name_of(one.env), json.dumps(one.task, sort_keys=True, separators=(",", ":")), one.seed)
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


def _settings(source: Path) -> dict[str, Any] | None:
    """Returns the settings of the evaluation that `source` is, or is a trajectory file of; None where it is neither."""
    folder = source if source.is_dir() else source.parent.parent
    inside = source.is_dir() or source.parent.name == EPISODES
    return read_settings(folder / SETTINGS) if inside and (folder / SETTINGS).exists() else None


def _wanted(source: Path, settings: Mapping[str, Any], env: str | None) -> int:
    """Returns how many episodes the evaluation of a folder, or of one of its files, was to have (in `env` alone)."""
    if not source.is_dir():
        return int(settings.get("episodes", 0))
    ids = [one["id"] for one in settings["environments"]]
    return int(settings.get("episodes", 0)) * sum(env is None or env in (one, name_of(one)) for one in ids)


def _other_hosts(left: _Side, right: _Side) -> list[str]:
    """Returns which environments were played at one place by A and at another by B: a server may set arguments too."""
    pairs = [(a, b) for a in sorted(left.hosts) for b in sorted(right.hosts) if name_of(a) == name_of(b) and a != b]
    return [f"{name_of(a)}: {a!r} of A, {b!r} of B (arguments that a server's owner set are unknown)" for a, b in pairs]


def _other_rules(left: _Side, right: _Side) -> list[str]:
    """Returns which rules of the environments and of the outcome differ: the values of A and of B."""
    if left.settings is None or right.settings is None:
        return []
    settings = left.settings, right.settings
    found = []
    for env in sorted({task.env for task in left.success}):
        # One environment may stand there several times, with other arguments; `_check_same` has seen that both have it.
        ours, theirs = ([one for one in side["environments"] if name_of(one["id"]) == env] for side in settings)
        for mine, other in zip(ours, theirs, strict=False):
            rules = {key: (_rule(mine, key), _rule(other, key)) for key in _RULES}
            found += [f"{env}: {_values(key, a, b)}" for key, (a, b) in rules.items() if a != b]
    before, after = (OutcomeConfig().model_dump(mode="json") | side["outcome"] for side in settings)
    return found + [_values(f"outcome.{key}", before[key], after[key]) for key in before if before[key] != after[key]]


def _other_play(left: _Side, right: _Side) -> list[str]:
    """Returns which settings differ that are the players' own affair: what a model sees, and how it is sampled from."""
    if left.settings is None or right.settings is None:
        return []
    ours, theirs = (
        dotted({key: settings.get(key, {}) for key in ("rollout", "sampling")})
        for settings in (left.settings, right.settings)
    )
    return [_values(key, ours[key], theirs[key]) for key in ours if key in theirs and ours[key] != theirs[key]]


def _rule(env: Mapping[str, Any], key: str) -> Any:
    """Returns a setting of an environment; a turn limit that is not set is the registered one, where that is known."""
    value = env.get(key, EnvConfig.model_fields[key].get_default(call_default_factory=True))
    if key == "max_turns" and value is None:
        load_plugins()
        spec = gym.registry.get(name_of(env["id"]))
        return spec.max_episode_steps if spec is not None else None
    return value


def _values(key: str, ours: Any, theirs: Any) -> str:
    a, b = ("not set" if value is None else repr(value) for value in (ours, theirs))
    return f"{key}: {a} of A, {b} of B"


def _shown(arguments: str) -> str:
    task = json.loads(arguments)
    given = {**task.get("kwargs", {}), **task.get("options", {})}
    return ", ".join(f"{key}={value!r}" for key, value in given.items()) or "none"


def _seeds(side: _Side) -> str:
    seeds = [task.seed for task in side.success]
    return f"{min(seeds)}..{max(seeds)}"
