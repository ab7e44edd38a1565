"""The event loop under everything that is called without `await`."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import pytest

from agentrl.rollout.loop import run


def test_ctrl_c_wakes_a_sleeping_loop_whichever_thread_the_signal_reaches():
    def interrupt() -> None:
        time.sleep(0.2)  # the loop sleeps by now
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        started = time.monotonic()
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run(asyncio.sleep(20))
        assert time.monotonic() - started < 10
    finally:
        signal.signal(signal.SIGINT, before)
        thread.join()


def test_signals_wake_whoever_they_woke_before():
    assert run(asyncio.sleep(0, "done")) == "done"
    assert signal.set_wakeup_fd(-1) == -1
