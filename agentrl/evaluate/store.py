"""The folder of an evaluation: its settings, its episodes as they end, its result.

    settings.json                       what was asked for
    versions.json                       what played: packages, system; an evaluation that goes on writes it anew
    trajectories/0-Sokoban-v0.jsonl     one episode a line, appended when it ends; one file for each environment
    result.json                         `EvalReport`, once complete

A line is in the file before the next episode is counted, and on the disk within a second, so that a kill costs at most
the episode whose line was being written. The same evaluation opened again plays what is missing.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from agentrl.buffer import read_jsonl, write_jsonl
from agentrl.buffer.jsonl import append_line
from agentrl.config import dotted
from agentrl.config.schema import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.errors import DataError, UserError
from agentrl.evaluate.functions import function_hash, function_of
from agentrl.evaluate.result import EvalReport
from agentrl.files import atomic_write, check_writable
from agentrl.policy import ModelPolicy, Policy, Sampling
from agentrl.rollout import Summary, summarise
from agentrl.types import Trajectory
from agentrl.versions import write_versions

SETTINGS, RESULT, EPISODES, LOCK = "settings.json", "result.json", "trajectories", ".lock"
_SYNC_S = 1.0


def identity(
    policy: Policy,
    policy_options: Mapping[str, Any] | None,
    envs: Sequence[EnvConfig],
    episodes: int,
    per_task: int,
    seed: int,
    rollout: RolloutConfig,
    sampling: Sampling,
    outcome: OutcomeConfig,
) -> dict[str, Any]:
    """Returns the settings that decide what is played: an evaluation with others is another evaluation.

    A function is told by its code and the values that it uses. How it is played (concurrency, executor, deadlines,
    retries) is left out: it does not change the episodes.
    """
    who: dict[str, Any] = {"name": policy.name, "options": dict(policy_options or {})}
    if isinstance(policy, ModelPolicy):
        who["weights"] = policy.fingerprint()
    elif (function := function_of(policy)) is not None:
        # Two functions may have one name: two lambdas, or one that was edited.
        who["function"] = function_hash(function)
    played: dict[str, Any] = {"history": rollout.history, "max_context_tokens": rollout.max_context_tokens}
    if rollout.max_episode_tokens is not None:  # not there without one, as in evaluations from before there was any
        played["max_episode_tokens"] = rollout.max_episode_tokens
    return {
        "policy": who,
        "environments": [one.model_dump(mode="json") for one in envs],
        "episodes": episodes,
        "per_task": per_task,
        "seed": seed,
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_new_tokens": sampling.max_new_tokens,
        },
        "rollout": played,
        "outcome": outcome.model_dump(mode="json"),
    }


class OtherEvaluation(UserError):
    """A folder holds something else than the evaluation that is to be completed in it."""


def read_settings(path: Path) -> dict[str, Any]:
    """Returns what a ``settings.json`` holds.

    Raises:
        DataError: it cannot be read, or holds no settings of an evaluation.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}; choose another folder") from None
    if not isinstance(found, dict) or not {"policy", "environments", "outcome"} <= found.keys():
        raise DataError(f"cannot read {path}: no settings of an evaluation; choose another folder")
    return found


class EvalStore:
    """The folder `folder` of the evaluation that `settings` (`identity`) define.

    Raises:
        OtherEvaluation: it holds episodes of other settings (names the first that differs), or something else.
        UserError: it cannot be written, or another evaluation is at work in it.
        DataError: its settings cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        self.folder = check_writable(folder)
        self._settings = json.loads(json.dumps(settings, default=repr))
        self._file: Any = None
        self._synced = 0.0
        path = self.folder / SETTINGS
        if not path.exists() and any(self.folder.iterdir()):
            raise OtherEvaluation(f"{str(self.folder)!r} holds something that is no evaluation; choose another folder")
        self._lock = _locked(self.folder)
        try:
            self._open(path)
        except BaseException:
            self._lock.close()
            raise
        write_versions(self.folder)

    def _open(self, path: Path) -> None:
        if path.exists():
            try:
                self._check(path)
                return
            except OtherEvaluation:
                # What failed at once (a wrong name, a function with a fault) is not what its repair has to complete.
                if self._has_episodes():
                    raise
            for file in (self.folder / EPISODES).glob("*.jsonl"):
                file.unlink()
        _write_json(path, self._settings)

    def _has_episodes(self) -> bool:
        """Whether any episode here can be scored, or cannot be read."""
        for file in (self.folder / EPISODES).glob("*.jsonl"):
            broken: list[DataError] = []
            if any(one.scorable for one in read_jsonl(file, on_error="skip", on_skip=broken.append)) or broken:
                return True
        return False

    def _check(self, path: Path) -> None:
        ours, theirs = dotted(self._settings, lists=True), dotted(read_settings(path), lists=True)
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if key in theirs and key in ours and ours[key] == theirs[key]:
                continue
            if key == "policy.function":
                name = self._settings["policy"]["name"]
                raise OtherEvaluation(
                    f"{str(self.folder)!r} holds episodes of another function than this {name!r}: its code, its "
                    "defaults or the values that it uses are not the same (or Python's version is not); choose another "
                    "folder to evaluate this one"
                )
            raise OtherEvaluation(
                f"{str(self.folder)!r} holds an evaluation with {key}={theirs.get(key, 'not set')!r}, now "
                f"{key}={ours.get(key, 'not set')!r}; give it the same settings to complete it, or choose another "
                "folder"
            )

    def path(self, place: int, env_id: str) -> Path:
        """Returns the file of the environment at `place`."""
        return self.folder / EPISODES / f"{place}-{re.sub(r'[^A-Za-z0-9._-]+', '_', env_id).strip('_')}.jsonl"

    def load(self, place: int, env_id: str, seed: int) -> list[Summary]:
        """Returns the scorable episodes of an environment that an earlier call played.

        What must be played again (infrastructure failures, a line that a kill cut off) is taken out of the file.

        Raises:
            DataError: an episode that nobody asked for: somebody else has written into the file.
        """
        path = self.path(place, env_id)
        if not path.exists():
            return []
        broken: list[DataError] = []
        stored = read_jsonl(path, on_error="skip", on_skip=broken.append)
        kept = {one.id: one for one in stored if one.scorable}
        if broken or len(kept) < len(stored):
            write_jsonl(path, kept.values())
        return [summarise(one, *self._place(path, one, seed)) for one in kept.values()]

    def _place(self, path: Path, one: Trajectory, seed: int) -> tuple[int, int]:
        """Returns (place of the task, member) of a stored episode."""
        per_task = self._settings["per_task"]
        task, member = one.seed - seed, one.id.rpartition("/")[2]
        if not (0 <= task < self._settings["episodes"] // per_task and member.isdecimal() and int(member) < per_task):
            raise DataError(
                f"{path}: episode {one.id!r} (seed {one.seed}) is none of this evaluation's; take it out, or choose "
                "another folder"
            )
        return task, int(member)

    def append(self, place: int, env_id: str, trajectory: Trajectory) -> None:
        """Writes an episode that has just ended."""
        if self._file is None:
            path = self.path(place, env_id)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        append_line(self._file, trajectory)
        if monotonic() - self._synced > _SYNC_S:
            os.fsync(self._file.fileno())
            self._synced = monotonic()

    def close(self) -> None:
        """Closes the file of the environment that was being played; the next `append` opens that of another."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def release(self) -> None:
        """Lets others play into the folder."""
        self.close()
        self._lock.close()

    def write_result(self, report: EvalReport) -> None:
        """Writes the result of a complete evaluation."""
        with atomic_write(self.folder / RESULT) as file:
            file.write(report.model_dump_json(indent=2).encode() + b"\n")


def _locked(folder: Path) -> Any:
    """Returns the open lock file of a folder: two that play the same evaluation would write every episode twice.

    Raises:
        UserError: another has it.
    """
    file = (folder / LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"another evaluation is at work in {str(folder)!r}; wait for it, or choose another folder"
        ) from None
    return file


def _write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")
