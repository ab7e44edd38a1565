"""Which server a session goes to, and how long failures are tried again.

What this process knows of a server (live sessions, recent failures) is kept in one place, whoever plays there.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from time import monotonic

from agentrl.remote.errors import RemoteError, ServerFull, Unreachable

FIRST_S, LONGEST_S = 0.1, 8.0
"""Pause after the first failure, at most; and after many."""
FIRST_SILENT_S = 4.0
"""Seconds that new sessions stay away from a server that has not answered, at first."""
FAILOVER_S = 2.0
"""Seconds after which a session is given up whose server cannot be reached, where other servers can."""

_lock = threading.Lock()
_random = random.Random()
"""Jitter and ties: no business of the run's seeds, and not the global generator, which belongs to the user."""


class Server:
    """One server, as this process sees it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.live = 0
        """Sessions that this process has there."""
        self.failures = 0
        """In a row."""
        self.down_until = 0.0
        """`time.monotonic` before which no new session goes there, if there is another server."""
        self._heard = 0.0
        """`time.monotonic` of its last answer."""

    def count(self, change: int) -> None:
        """`change`: +1 when a session begins there, -1 when it ends. Threads may count at once."""
        with _lock:
            self.live += change

    def failed(self, error: RemoteError) -> None:
        """Notes a failure, and in `error` when to try again: after an exponential pause with full jitter."""
        if isinstance(error, Unreachable):
            self.failures += 1
        longest = min(LONGEST_S, FIRST_S * 2 ** min(max(self.failures - 1, 0), 16))
        pause = _random.uniform(0, longest) + (error.retry_after_s or 0.0)
        error.retry_at = monotonic() + pause
        self.down_until = monotonic() + max(longest, pause)

    def silent(self, since: float) -> None:
        """Notes that a request for a new session, made at `since`, got no answer.

        One that is only slow to begin it answers others meanwhile; from one that does not, new sessions stay away.
        """
        if self._heard < since:
            self.failures += 1
            self.down_until = monotonic() + min(LONGEST_S, FIRST_SILENT_S * 2 ** min(self.failures - 1, 16))

    def answered(self) -> None:
        """Notes that it works."""
        self.failures = 0
        self.down_until = 0.0
        self._heard = monotonic()

    @property
    def up(self) -> bool:
        """Whether nothing speaks against a new session there."""
        return monotonic() >= self.down_until


_known: dict[str, Server] = {}


def server_at(url: str) -> Server:
    """Returns what this process knows of the server at `url`."""
    with _lock:
        return _known.setdefault(url, Server(url))


def choose(servers: Sequence[Server]) -> Server:
    """Returns the server for a new session: the one with the fewest of those that are up, else the first to be."""
    up = [server for server in servers if server.up]
    if not up:
        return min(servers, key=lambda server: server.down_until)
    fewest = min(server.live for server in up)
    return _random.choice([server for server in up if server.live == fewest])


class Budget:
    """Bounds the attempts at one call.

    Args:
        retry_s: seconds from the first failure on in which further attempts may begin.
        timeout_s: seconds from the start in which the answer must come.
        started: `time.monotonic` of the start; None is now.
    """

    def __init__(self, retry_s: float, timeout_s: float, started: float | None = None) -> None:
        self.retry_s, self.timeout_s = retry_s, timeout_s
        self.started = monotonic() if started is None else started
        self._failed: float | None = None
        self._attempts = 0

    @property
    def left_s(self) -> float:
        """Seconds until `timeout_s` are over."""
        return self.started + self.timeout_s - monotonic()

    def spend(self, error: RemoteError, limit_s: float | None = None) -> None:
        """Allows another attempt at `error.retry_at`.

        Args:
            error: why the last attempt failed.
            limit_s: a smaller `retry_s`.

        Raises:
            RemoteError: a copy of `error`, where the budget does not allow it.
        """
        now = monotonic()
        self._attempts += 1
        if self._failed is None:
            self._failed = now
        limit = self.retry_s if limit_s is None else min(limit_s, self.retry_s)
        if error.retry_at - self._failed <= limit and error.retry_at - now < self.left_s:
            return
        way_out = "; lower rollout.concurrency, or raise the server's --max-sessions" * isinstance(error, ServerFull)
        tries = "1 attempt" if self._attempts == 1 else f"{self._attempts} attempts in {now - self.started:.1f} s"
        raise error.again(f" ({tries}{way_out})") from error
