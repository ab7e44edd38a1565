"""Ctrl-C and SIGTERM end a run in good order; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """While it is open, the first SIGINT or SIGTERM sets `requested`; the second ends the process (exit 130).

    Outside the main thread signals cannot be handled; then it does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(130)
        self.requested = True
        print("\nstopping after this iteration (once more to stop at once)", file=sys.stderr, flush=True)
