"""Says what a collection waits for when nothing happens. A thread, since what hangs may be the event loop itself."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentrl.rollout.batcher import Clock
    from agentrl.rollout.episode import Episode

log = logging.getLogger("agentrl.rollout")


class Watchdog:
    """Context manager around a collection; logs a warning for every `patience_s` seconds without an event."""

    def __init__(self, name: str, clock: Clock, live: Iterable[Episode], patience_s: float) -> None:
        self._name, self._clock, self._live, self._patience_s = name, clock, live, patience_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="agentrl-watchdog", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        told = 0.0
        wait = self._patience_s
        while not self._over.wait(wait):
            now = perf_counter()
            quiet = now - max(self._clock.last_event, told)
            if quiet >= self._patience_s:
                told = now
                quiet = 0.0
                log.warning("%s", self.describe(now))
            wait = self._patience_s - quiet

    def describe(self, now: float) -> str:
        """Returns what the live episodes wait for: how many in which state, and the one that waits longest."""
        episodes = list(self._live)
        head = f"{self._name}: nothing has happened for {now - self._clock.last_event:.0f} s; "
        if not episodes:
            return head + "the first environment is being made"
        states = Counter(episode.state for episode in episodes)
        oldest = min(episodes, key=lambda episode: episode.since)
        counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
        what = f"{oldest.trajectory.id} (seed {oldest.trajectory.seed}, turn {oldest.played})"
        return (
            head + f"of {len(episodes)} live episodes: {counts}; oldest: episode {what}, {oldest.state} for "
            f"{now - oldest.since:.0f} s"
        )
