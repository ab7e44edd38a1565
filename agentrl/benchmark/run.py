"""Runs of a benchmark, side by side and resumable: each is a process ``agentrl train`` with a folder of its own.

    OUT/benchmark.lock              held by the benchmark and by its runs: one benchmark at a time in a folder
    OUT/ENVIRONMENT/base/           the model that the runs start from, base.json beside it says how it was made
    OUT/ENVIRONMENT/METHOD/seed-N/  a run, as `agentrl train` leaves it, and
        benchmark.json              with what settings it was begun, and whether it is complete
        log.txt                     all that it printed

What is complete with the same settings is not run again; what was interrupted goes on from its checkpoint; what was
begun with other settings, or from another base model, starts afresh; a complete one is kept as ``seed-N.old``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from agentrl.benchmark.suite import Run, Suite, base_sha256, run_config
from agentrl.config import RunConfig, config_sha256, dump_config, load_config
from agentrl.errors import DataError, UserError
from agentrl.files import atomic_write, check_writable
from agentrl.train.base import TeachingProgress, make_base
from agentrl.train.metrics import read_metrics

LOCK = "benchmark.lock"
STAMP = "benchmark.json"
LOG = "log.txt"

POLL_S = 0.2
"""Seconds between two looks at the running processes: small against an iteration, large against a look."""

LOG_LINES = 12
"""Lines of a failed run's log that are shown."""


class State(StrEnum):
    """What lies in a run's folder."""

    MISSING = "missing"
    BEGUN = "begun"
    CHANGED = "changed"
    COMPLETE = "complete"


class Failure(NamedTuple):
    """A run that ended by itself before its last iteration."""

    run: Run
    code: int
    """Exit code; minus the signal that ended it."""
    log: str
    """The end of what it printed."""


def state_of(run: Run) -> State:
    """Returns what lies in the run's folder, compared with what the run would be now."""
    stamp = _read_json(run.folder / STAMP)
    if not stamp:
        return State.MISSING
    if stamp.get("base") != run.base:
        return State.CHANGED
    if stamp.get("complete"):
        return State.COMPLETE if _same_settings(run, stamp) else State.CHANGED
    return State.BEGUN if stamp.get("config_sha256") == _sha256(run, run.config) else State.CHANGED


def changed_settings(run: Run) -> str:
    """Returns in words how the run in the folder differs from what it would be now."""
    try:
        old = _leaves(load_config(run.folder / "config.yaml").model_dump(mode="json"))
    except UserError:
        return "the settings that it was begun with cannot be read any more"
    new = _leaves(run.config.model_dump(mode="json"))
    found = [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted({**old, **new})
        if old.get(key) != new.get(key) and key.partition(".")[0] not in ("name", "run_dir", "log")
    ]
    return ", ".join(found) or "its base model or agentrl's own settings have changed since it was begun"


def iterations_of(run: Run) -> tuple[int, float | None]:
    """Returns the finished iterations of a run, and its newest held-out success."""
    try:
        records = read_metrics(run.folder)
    except DataError:
        return 0, None
    success = next((r["eval"]["success"]["value"] for r in reversed(records) if r.get("eval")), None)
    return (records[-1]["iteration"] if records else 0), success


@contextmanager
def locked(out: str | os.PathLike[str]) -> Iterator[int]:
    """Holds the folder of a benchmark, and yields the lock's file descriptor, which the runs inherit.

    So the lock outlives a benchmark that was killed until its last run has ended: nobody begins a run twice.

    Raises:
        UserError: the folder holds something else, or another benchmark is at work there.
    """
    folder = Path(out)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / LOCK).exists()):
        raise UserError(f"{str(out)!r} holds something that is no benchmark; give another folder (--out)")
    check_writable(folder)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"a benchmark, or a run that it left behind, is at work in {str(out)!r}") from None
        yield file.fileno()


def make_bases(
    suite: Suite, runs: Sequence[Run], say: Callable[[str], None], progress: TeachingProgress | None = None
) -> None:
    """Makes the base model of every environment in `runs` that has none, or one that was made otherwise.

    Args:
        suite: the benchmark.
        runs: the runs that are about to start.
        say: told what is being made.
        progress: told how far it is.

    Raises:
        UserError: an unknown teacher, preset or environment, or the disk is full.
    """
    for name in dict.fromkeys(run.environment for run in runs):
        base = suite.environments[name].base
        if base is None:
            continue
        folder = Path(suite.out, name)
        config = run_config(suite, name, None, suite.seeds[0])
        sha256 = base_sha256(suite, name)
        if (_read_json(folder / "base.json") or {}).get("sha256") == sha256:
            continue
        say(f"base model of {name}")
        (folder / "base.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "base", ignore_errors=True)
        make_base(
            config.env,
            folder / "base",
            base.lessons,
            history=config.rollout.history,
            preset=base.preset,
            seed=base.seed,
            threads=config.model.threads,
            progress=progress,
        )
        _write_json(folder / "base.json", {"sha256": sha256, **base.model_dump(mode="json")})


class Runner:
    """Trains runs side by side, each in a process group of its own.

    A run that fails stops no other. The first SIGINT or SIGTERM lets the running ones finish their iteration and save;
    the second kills them.

    Args:
        runs: in the order in which they are begun.
        jobs: how many at once.
        lock: file descriptor of `locked`.
        say: told, in a line, what happens.
    """

    def __init__(self, runs: Sequence[Run], jobs: int, lock: int, say: Callable[[str], None]) -> None:
        self.waiting = deque(runs)
        self.running: dict[Run, subprocess.Popen[bytes]] = {}
        self.complete: list[Run] = []
        self.failed: list[Failure] = []
        self._signals = self._forwarded = 0
        self._jobs, self._lock, self._say = jobs, lock, say

    @property
    def stopping(self) -> bool:
        """Whether a signal came."""
        return self._signals > 0

    @property
    def total(self) -> int:
        """Number of runs, finished or not."""
        return len(self.waiting) + len(self.running) + len(self.complete) + len(self.failed)

    def run(self, watch: Callable[[Runner], None] = lambda _: None) -> None:
        """Runs them all; `watch` is called several times a second."""
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.running or (self.waiting and not self.stopping):
                while self.waiting and len(self.running) < self._jobs and not self.stopping:
                    self._start(self.waiting.popleft())
                self._forward()
                time.sleep(POLL_S)
                for run, process in list(self.running.items()):
                    if process.poll() is not None:
                        del self.running[run]
                        self._ended(run, process.returncode)
                watch(self)
        finally:
            self._signal(signal.SIGKILL)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _start(self, run: Run) -> None:
        state = state_of(run)
        if state == State.COMPLETE:
            self.complete.append(run)
            return
        if state == State.CHANGED:
            self._say(f"{run}: {changed_settings(run)}; it starts afresh")
        if state == State.CHANGED and (_read_json(run.folder / STAMP) or {}).get("complete"):
            # Hours of work: one generation of it is kept.
            old = run.folder.with_name(f"{run.folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            run.folder.rename(old)
            self._say(f"{run}: the complete run is kept as {old}")
        if state != State.BEGUN:
            shutil.rmtree(run.folder, ignore_errors=True)
        _write_json(run.folder / STAMP, _stamp(run, complete=False))
        dump_config(run.config, run.folder / "config.yaml")
        command = [sys.executable, "-m", "agentrl", "train", str(run.folder / "config.yaml"), "--resume"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(run.config.model.threads or 1)}
        with (run.folder / LOG).open("ab") as log:
            self.running[run] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=(self._lock,),
            )

    def _ended(self, run: Run, code: int) -> None:
        done, success = iterations_of(run)
        if code == 0 and done == run.config.iterations:
            _write_json(run.folder / STAMP, _stamp(run, complete=True))
            self.complete.append(run)
            self._say(f"{len(self.complete)}/{self.total} {run}: held-out success {success or 0:.1%}")
        elif self.stopping:
            self.waiting.appendleft(run)
        else:
            self.failed.append(Failure(run, code, _tail(run.folder / LOG)))
            self._say(f"{run}: failed (exit code {code}) after {done} of {run.config.iterations} iterations")

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals += 1

    def _forward(self) -> None:
        """Passes on the signals that came since the last call: the first as SIGTERM, any other as SIGKILL."""
        if self._signals > self._forwarded:
            if not self._forwarded:
                self._say("stopping after this iteration of each run (once more to stop at once)")
            self._forwarded = self._signals
            self._signal(signal.SIGTERM if self._signals == 1 else signal.SIGKILL)

    def _signal(self, number: int) -> None:
        """Sends a signal to every running process and its children."""
        for process in self.running.values():
            if process.poll() is None:
                os.killpg(process.pid, number)


def _stamp(run: Run, complete: bool) -> dict[str, Any]:
    return {"config_sha256": _sha256(run, run.config), "base": run.base, "complete": complete}


def _sha256(run: Run, config: RunConfig) -> str:
    """The hash of a run's settings, without the path of a base model that the suite makes: a benchmark may be moved,
    and one base is told from another by `Run.base`."""
    if run.base is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": ""})})
    return config_sha256(config)


def _same_settings(run: Run, stamp: dict[str, Any]) -> bool:
    """Whether a complete run had the settings of `run`; one from before a setting existed had its default."""
    if stamp.get("config_sha256") == _sha256(run, run.config):
        return True
    try:
        return _sha256(run, load_config(run.folder / "config.yaml")) == _sha256(run, run.config)
    except UserError:
        return False


def _leaves(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    return "\n".join(lines[-LOG_LINES:])


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _write_json(path: Path, data: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(data, indent=1).encode() + b"\n")
