"""An environment in a worker process of its own: it may block, crash or leak without taking the run along.

Spawned, never forked (threads and CUDA do not survive a fork), spoken to over a pipe, one request at a time. The worker
leads a process group, so that killing it also ends what the environment started (a Java VM, a browser), and it watches
its parent, so that nothing outlives a parent that was killed.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import gymnasium as gym

from agentrl.envs.registry import load_plugins
from agentrl.errors import EnvironmentFailure, UserError
from agentrl.rollout.executors import LocalHost
from agentrl.rollout.values import jsonable

_LIVE: weakref.WeakSet[ProcessHost] = weakref.WeakSet()
"""Hosts whose worker may be running."""

_START = threading.Lock()
"""`Process.start` keeps module-level books: one at a time."""


class ProcessHost:
    """Host of an environment in a worker process. Its methods block: the collector calls them from a thread."""

    fast = False

    def __init__(
        self, env_id: str, max_turns: int | None, kwargs: dict[str, Any], wrappers: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._env_id = env_id
        self._arguments = (env_id, max_turns, kwargs, wrappers)
        self._process: Any = None
        self._pipe: Connection | None = None
        self._killed = False

    @property
    def pid(self) -> int | None:
        """Process id of the worker; None before `make`."""
        return self._process.pid if self._process is not None else None

    def make(self) -> None:
        load_plugins()
        spec = gym.registry.get(self._env_id.rpartition(":")[2])
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        try:
            parcel = pickle.dumps((spec, self._arguments))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(
                f"environment {self._env_id!r} cannot be sent to a worker process ({error}); register it from a module "
                "that can be imported (no lambda, no local class), or set rollout.executor=thread"
            ) from error
        process = context.Process(target=_serve, args=(theirs, parcel), name=f"env-{self._env_id}", daemon=True)
        with _START:
            if self._killed:
                raise EnvironmentFailure("was ended before it started")
            process.start()
            _LIVE.add(self)
            self._process, self._pipe = process, ours
        theirs.close()
        self._answer()

    def reset(self, seed: int, options: dict[str, Any]) -> Any:
        return self._ask("reset", seed, options)

    def step(self, action: str) -> Any:
        return self._ask("step", action)

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = self._ask("describe")
        return described

    def close(self) -> None:
        if self._process is None:
            return
        assert self._pipe is not None
        with contextlib.suppress(OSError):
            self._pipe.send(("close", ()))
        self._process.join(2.0)
        if self._process.is_alive():
            self.kill()
            self._process.join()
        _LIVE.discard(self)
        self._pipe.close()

    def kill(self) -> None:
        """Ends the worker and its children at once. A call under way then raises `EnvironmentFailure`."""
        with _START:
            self._killed = True
        if self._process is None:
            return
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def _ask(self, method: str, *arguments: Any) -> Any:
        assert self._pipe is not None
        try:
            self._pipe.send((method, arguments))
        except OSError:
            raise EnvironmentFailure(self._death()) from None
        return self._answer()

    def _answer(self) -> Any:
        assert self._pipe is not None
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            raise EnvironmentFailure(self._death()) from None
        if kind == "user error":
            raise UserError(value)
        if kind == "error":
            raise EnvironmentFailure(value)
        return value

    def _death(self) -> str:
        self.kill()  # the children it may have left; its own exit code is settled once the pipe is closed
        self._process.join(5.0)
        code = self._process.exitcode
        hint = "; see its traceback above, and guard the script with `if __name__ == '__main__':`" if code == 1 else ""
        return f"worker process {self._process.pid} died (exit code {code}){hint}"


@atexit.register  # before multiprocessing's own hook, which would wait for a worker that hangs
def _kill_all() -> None:
    for host in list(_LIVE):
        host.kill()


def _serve(pipe: Connection, parcel: bytes) -> None:
    """Body of the worker: makes the environment, then answers one request at a time until told to close."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C at the terminal is the parent's affair
    threading.Thread(target=_die_with_parent, daemon=True).start()
    host = _unpack(parcel)
    method, arguments = "make", ()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while method != "close":
            pipe.send(_reply(host, method, arguments))
            method, arguments = pipe.recv()
    host.close()
    sys.stdout.flush()
    sys.stderr.flush()
    _end_group()


def _reply(host: LocalHost, method: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        result = getattr(host, method)(*arguments)
    except UserError as error:
        return "user error", str(error)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "error", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
    try:
        pickle.dumps(result)
    except Exception:  # an info that holds what cannot be sent: its JSON-compatible part goes
        return "ok", tuple(jsonable(part) if isinstance(part, dict) else part for part in result)
    return "ok", result


def _unpack(parcel: bytes) -> LocalHost:
    load_plugins()
    spec, arguments = pickle.loads(parcel)
    if spec is not None:
        gym.registry.setdefault(spec.id, spec)
    return LocalHost(*arguments)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        _end_group()


def _end_group() -> None:
    """Ends this process together with whatever the environment started."""
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(0)
