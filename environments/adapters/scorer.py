"""Scores answers for `ReasoningGymEnv`. Some verifiers of reasoning-gym pass the answer to `eval` or to sympy.

An agent's text must not be able to hang the run or to touch the machine: ``9**9**9`` computes for ever, and `eval` runs
what it is given. Where a verifier does that, only plain answers are scored here and now. What could be code goes to a
worker process with limits on time and memory, whose audit hook refuses to write files, start processes, open sockets.
That stops accidents, which is what an agent in training produces; it is no sandbox against an attacker.

Run as ``python -m environments.adapters.scorer`` this file is the worker: one JSON object a line, in and out.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from typing import Any

from agentrl.errors import EnvironmentFailure
from environments.adapters.base import BorrowedRandom

log = logging.getLogger("environments.adapters")

MEMORY_BYTES = 4 * 2**30
_START_S = 60.0
_PLAIN = re.compile(r"[\w\s.,:;'\"?\[\]{}|#$+-]{0,2000}", re.ASCII)
_REFUSED = (
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "os.putenv", "os.unsetenv"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.ch"),
    *("subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "webbrowser."),
)
"""Prefixes of audit events. Reading folders and modules stays allowed: verifiers import what they need late."""
_WORDS = re.compile(r"\b(for|import|lambda|\w*__\w*)\b")
"""Comprehensions can run for long; the rest is never an answer."""


class Scorer:
    """Scores answers to questions of one data set. All scorers share one worker, which ends with the last of them.

    Args:
        name, settings: the data set and its settings, as `reasoning_gym.create_dataset` takes them.
        dataset: the data set itself.
        timeout_s: seconds for one answer.
    """

    def __init__(self, name: str, settings: dict[str, Any], dataset: Any, timeout_s: float) -> None:
        self._name, self._settings, self._dataset, self._timeout_s = name, settings, dataset, timeout_s
        self._evaluates = _evaluates(dataset)

    def score(self, answer: str, item: int, entry: dict[str, Any]) -> tuple[float, str]:
        """Scores an answer to `entry`, question `item`.

        Returns:
            The score in [0, 1], and what went wrong with scoring (a score of 0) or "".
        """
        longest = max(10_000, 4 * len(str(entry["answer"])))
        if not answer or len(answer) > longest:
            return 0.0, "" if not answer else f"the answer has {len(answer)} characters, more than {longest}"
        plain = _PLAIN.fullmatch(answer) and not _WORDS.search(answer)
        if not self._evaluates or plain or answer == entry["answer"]:
            value, error = scored(self._dataset, answer, entry)
        else:
            task = {"name": self._name, "settings": self._settings, "item": item, "timeout_s": self._timeout_s}
            value, error = _WORKER.ask(self, {**task, "answer": answer}, self._timeout_s)
        if error:
            log.info("reasoning-gym %s could not score %.80r: %s; taken as wrong", self._name, answer, error)
        return value, error

    def close(self) -> None:
        """Gives the worker up."""
        _WORKER.leave(self)


class Worker:
    """The process that scores what could be code: started on demand, killed when an answer takes too long."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._users: set[int] = set()
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process id; None where none runs."""
        return self._process.pid if self._process is not None else None

    def ask(self, user: object, request: dict[str, Any], limit_s: float) -> tuple[float, str]:
        """Returns score and error of one answer.

        Raises:
            EnvironmentFailure: the process did not start.
        """
        with self._lock:
            self._users.add(id(user))
            try:
                if self._process is None:
                    self._start()
                value, error = self._exchange(request, limit_s)
            except (OSError, ValueError):
                self._end()
                return 0.0, f"no score within {limit_s:g} s, or the scoring process died"
            return float(value), str(error)

    def leave(self, user: object) -> None:
        """Ends the process when `user` was its last."""
        with self._lock:
            self._users.discard(id(user))
            if not self._users:
                self._end()

    def _start(self) -> None:
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        home = str(pathlib.Path(__file__).resolve().parents[2])  # where `environments` is, installed or not
        command = [sys.executable, "-m", "environments.adapters.scorer"]
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, cwd=home)
        try:
            self._exchange({}, _START_S)
        except (OSError, ValueError) as error:  # nobody's answer is to blame
            self._end()
            raise EnvironmentFailure(f"the scoring process did not start: {' '.join(command)}") from error

    def _exchange(self, request: dict[str, Any], limit_s: float) -> Any:
        """Sends a line and reads one. A worker that is over its time is killed: the line is then empty, no JSON."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        finally:
            timer.cancel()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what could not be sent any more
                    pipe.close()


_WORKER = Worker()


def _evaluates(dataset: Any) -> bool:
    """Whether the verifier of a data set may run an answer as code: its module mentions it, or cannot be read."""
    try:
        source = inspect.getsource(inspect.getmodule(type(dataset).score_answer) or dataset)
    except (OSError, TypeError):
        return True
    return "datasets" in vars(dataset) or re.search(r"\b(eval|exec|parse_expr|sympify)\b", source) is not None


def generated(dataset: Any, item: int) -> dict[str, Any]:
    """Returns question `item` of a data set. Some generators draw from the global generators: they get their own."""
    with BorrowedRandom((dataset.seed + item) % 2**32).lend():
        return dict(dataset[item])


def scored(dataset: Any, answer: str, entry: dict[str, Any]) -> tuple[float, str]:
    """Returns the data set's score, clipped to [0, 1], and the exception's text where it raised (a score of 0)."""
    try:
        value = float(dataset.score_answer(answer, entry))
    except Exception as error:
        return 0.0, f"{type(error).__name__}: {error}"
    return (min(max(value, 0.0), 1.0), "") if math.isfinite(value) else (0.0, f"a score of {value}")


def _home() -> str:
    """The folder that holds the package `environments`, so that the worker finds it wherever it is installed."""
    return str(pathlib.Path(__file__).resolve().parents[2])


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: no files written, no processes, no sockets."""
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    if event == "open" and isinstance(arguments[2], int) and not arguments[2] & writes:
        return
    if event == "open" or event.startswith(_REFUSED):
        raise PermissionError(f"an answer may not do that: {event}")


def _serve() -> None:
    """The worker: reads requests, writes scores."""
    from reasoning_gym import create_dataset

    lines, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "w", buffering=1)
    sys.stdout = sys.stderr  # verifiers print
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; its end closes stdin
    _limit_memory()
    sys.dont_write_bytecode = True
    sys.addaudithook(_refuse)
    lines.readline()
    print(json.dumps([0.0, ""]), file=answers)
    datasets: dict[str, Any] = {}
    for line in lines:
        request = json.loads(line)
        if hasattr(signal, "alarm"):  # should the parent be gone
            signal.alarm(int(request["timeout_s"]) + 10)
        key = json.dumps([request["name"], request["settings"]])
        if key not in datasets:
            datasets[key] = create_dataset(request["name"], **request["settings"])
        entry = generated(datasets[key], request["item"])
        print(json.dumps(scored(datasets[key], request["answer"], entry)), file=answers)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows: time is limited, memory is not
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


if __name__ == "__main__":
    _serve()
