"""The process: a socket, uvicorn, and how it stops.

The first SIGTERM or SIGINT lets running sessions go on for a grace period and refuses new ones. When the last session
or the period is over, or a second signal comes, calls under way are answered with `stopping`, environments are closed,
and the process ends; a third signal ends it where it stands.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from agentrl.errors import UserError
from agentrl.serve.app import App
from agentrl.serve.settings import Settings

log = logging.getLogger("agentrl.serve")

MAX_HEAD = 65_536
"""Bytes of a request's first line and headers, about: what has come at once is read first."""
BACKLOG = 4096
"""Connections that may wait to be accepted."""


def listen(settings: Settings) -> socket.socket:
    """Returns a socket that listens at the server's address: who connects before the server is up waits.

    Raises:
        UserError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        where, why = f"{settings.host}:{settings.port}", error.strerror or error
        raise UserError(f"cannot listen at {where}: {why}; try another --port (0: any free one)") from error
    return listener


def url_of(settings: Settings, listener: socket.socket) -> str:
    """Returns the server's URL, with the port it got."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listener.getsockname()[1]}"


class Server(uvicorn.Server):
    """uvicorn that drains before it stops."""

    def __init__(self, app: App, settings: Settings, log_level: str = "warning") -> None:
        self._app, self._grace_s = app, settings.grace_s
        self._enough = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        super().__init__(_config(app, settings, log_level))
        logging.getLogger("uvicorn.error").addFilter(_no_fault)

    async def main_loop(self) -> None:
        """Serves until told to stop."""
        self._loop = asyncio.get_running_loop()
        await super().main_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain; the second time has had enough of it; the third time stops."""
        self._captured_signals.append(sig)
        self.drain()

    def drain(self) -> None:
        """What a signal does; may be called from any thread."""
        if self._loop is None:  # not serving yet
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._next)

    def _next(self) -> None:
        if self._draining is None:
            self._app.api.sessions.stopping = True
            self._draining = asyncio.create_task(self._drain())
        elif not self._enough.is_set():
            self._enough.set()
        else:
            self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        sessions = self._app.api.sessions
        log.warning("stopping: no new sessions; %d go on for at most %g s", sessions.active, self._grace_s)
        waits = [asyncio.create_task(event.wait()) for event in (sessions.idle, self._enough)]
        await asyncio.wait(waits, timeout=self._grace_s, return_when=asyncio.FIRST_COMPLETED)
        for each in waits:
            each.cancel()
        if sessions.active:
            log.warning("stopping: %d sessions are closed", sessions.active)
        await sessions.stop()
        self.should_exit = True


class Protocol(HttpToolsProtocol):
    """uvicorn's parser, which by itself collects a request's head for as long as it goes on."""

    head = body = 0
    """Bytes of the request so far: of its head, trailers and the marks between chunks; of its body."""

    def data_received(self, data: bytes) -> None:
        """Parses what has come."""
        self.head += len(data)
        super().data_received(data)
        # Marks between chunks may grow with what they mark.
        if self.head > MAX_HEAD + self.body and not self.transport.is_closing():
            log.info("a connection was closed: its request has a head of more than %d bytes", MAX_HEAD)
            self.transport.close()

    def on_message_begin(self) -> None:
        """A request begins."""
        self.head = self.body = 0
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        """A piece of the body has come."""
        self.head -= len(body)
        self.body += len(body)
        super().on_body(body)


def _no_fault(record: logging.LogRecord) -> bool:
    """Whether a line of uvicorn's says something: it takes a WebSocket refused with an HTTP answer for a fault."""
    return "without completing handshake" not in record.getMessage()


def _config(app: App, settings: Settings, log_level: str) -> uvicorn.Config:
    options: dict[str, Any] = {
        "http": Protocol,
        "log_level": log_level,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        # Behind a proxy every request comes from it: its own rate limit is the better one.
        "proxy_headers": False,
        "ws_max_size": settings.max_body,
        "timeout_keep_alive": 60,
        "timeout_graceful_shutdown": 5,
        "backlog": BACKLOG,
    }
    return uvicorn.Config(app, **options)
