"""One event loop per thread for everything that is called without `await`.

Policies may hold what belongs to a loop (an HTTP connection pool): successive collections, and the `aclose` at the end,
must run on the same one. Inside a running loop (a notebook) the coroutine runs on a loop in a background thread.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_local = threading.local()
_background: asyncio.AbstractEventLoop | None = None
_lock = threading.Lock()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs `coroutine` to its end and returns its result. Ctrl-C cancels it and raises `KeyboardInterrupt`."""
    if not _inside_a_loop():  # asked first: errors of the coroutine are to have no context of ours
        return _run_here(coroutine)
    future = asyncio.run_coroutine_threadsafe(coroutine, _background_loop())
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _inside_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run_here(coroutine: Coroutine[Any, Any, T]) -> T:
    if not hasattr(_local, "runner"):
        _local.runner = asyncio.Runner()
    runner: asyncio.Runner = _local.runner
    # Not `return runner.run(coroutine)`: Python 3.11 takes the repr of a finished task, result included, when the
    # runner puts back the SIGINT handler. For a thousand trajectories that is a third of a second.
    result: list[T] = []

    async def keep() -> None:
        result.append(await coroutine)

    with _woken_by_signals(runner.get_loop()):
        runner.run(keep())
    return result[0]


@contextmanager
def _woken_by_signals(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Lets every signal wake `loop`.

    Python notes a signal and handles it between two instructions of the main thread. One that comes just before the
    loop goes to sleep, or that the kernel gives to another thread, interrupts no system call: Ctrl-C would wait for the
    next timer, minutes where a rollout hangs. A byte in a socket wakes the loop (asyncio does this for its own signal
    handlers, not for those of `asyncio.Runner`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        loop.add_reader(ours, ours.recv, 4096)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            loop.remove_reader(ours)


def _background_loop() -> asyncio.AbstractEventLoop:
    global _background
    with _lock:
        if _background is None:
            _background = asyncio.new_event_loop()
            threading.Thread(target=_background.run_forever, name="agentrl-loop", daemon=True).start()
    return _background
