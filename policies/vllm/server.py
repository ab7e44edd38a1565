"""A vLLM server as a child: started, watched, and ended with everything that it started."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from agentrl.errors import UserError
from policies.vllm.engine import how_to_mend

_LIVE: weakref.WeakSet[ServerProcess] = weakref.WeakSet()
_TELL_EVERY_S = 10.0
_PATIENCE_S = 10.0
"""For a server that was told to end."""
_TAIL = 15
_PREFIX = re.compile(r"^\(.*? pid=\d+\) (\w+ [\d-]+ [\d:]+ \[[\w.]+:\d+\])?")
"""Before the words of vLLM's own log lines."""


class ServerProcess:
    """One server, in a process group of its own behind `policies.vllm.guard`.

    Args:
        command: that starts it.
        environment: of the process.
        socket: its Unix socket: no port to collide on, and nobody else on the machine can reach it.
        log_file: what it prints; appended to.
        folders: to be removed where this process dies without a word.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        socket: Path,
        log_file: Path,
        folders: Sequence[Path],
    ) -> None:
        self.socket, self.log_file = socket, log_file
        socket.unlink(missing_ok=True)
        guard = [sys.executable, "-u", str(Path(__file__).with_name("guard.py")), os.pathsep.join(map(str, folders))]
        self._from = log_file.stat().st_size if log_file.exists() else 0
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*guard, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        _LIVE.add(self)

    @property
    def pid(self) -> int:
        """Process id of the guard, which is the group's too."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the server has not ended."""
        return self._process.poll() is None

    def wait_ready(self, limit_s: float) -> None:
        """Waits until the server answers; says every few seconds, on standard error, what it is doing.

        Raises:
            UserError: it ended before, or took longer; with the last lines of its log, and it is ended.
        """
        started = told = time.monotonic()
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), timeout=5.0) as client:
            while True:
                now = time.monotonic()
                if not self.alive:
                    raise self._failed("ended while it was starting")
                if now - started > limit_s:
                    self.kill()
                    raise self._failed(f"was not ready within startup_s={limit_s:g} s")
                with contextlib.suppress(httpx.HTTPError):
                    if client.get("http://vllm/health").is_success:
                        _say(f"ready after {now - started:.0f} s")
                        return
                if now - told > _TELL_EVERY_S:
                    told = now
                    last = (self.tail(1) or ["no word yet"])[0]
                    _say(f"starting, {now - started:.0f} s: {_PREFIX.sub('', last).strip()}")
                time.sleep(0.2)

    def tail(self, lines: int = _TAIL) -> list[str]:
        """The last lines of its log, since it was started."""
        with contextlib.suppress(OSError), self.log_file.open("rb") as log:
            log.seek(max(self._from, os.fstat(log.fileno()).st_size - 20_000))
            text = log.read().decode(errors="replace")
            return [line for line in text.splitlines() if line.strip()][-lines:]
        return []

    def describe_end(self) -> str:
        """The end of a sentence: the last lines of its log."""
        shown = "\n  ".join(self.tail())
        return f"the last lines of its log:\n  {shown}"

    def stop(self) -> None:
        """Tells the server to end, and after a while ends it and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE_S)
        self.kill()

    def kill(self) -> None:
        """Ends the server and all that it started, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        _LIVE.discard(self)
        self.socket.unlink(missing_ok=True)

    def _failed(self, what: str) -> UserError:
        mend = how_to_mend("\n".join(self.tail(200)))
        self.kill()
        return UserError(f"the vLLM server {what}{mend}; {self.describe_end()}")


def _say(what: str) -> None:
    print(f"vLLM server: {what:.160}", file=sys.stderr, flush=True)


@atexit.register
def _kill_all() -> None:
    for server in list(_LIVE):
        server.kill()
