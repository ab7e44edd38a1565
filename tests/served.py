"""A real server for tests: uvicorn in a thread, on a free loopback port."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn

from agentrl.serve import Settings, create_app
from agentrl.serve.server import Server, listen, url_of


class Url(str):
    """The base URL of a server; `app` and `server` are its parts, for tests that look inside."""

    app: Any
    server: Server


@contextmanager
def served(envs: Sequence[str], **settings: Any) -> Iterator[Url]:
    """Serves `envs` with `Settings(**settings)`. Yields the base URL, ``http://127.0.0.1:PORT``.

    ``clock=`` is passed to `create_app`; no rate applies unless one is given.
    """
    clock = {"clock": settings.pop("clock")} if "clock" in settings else {}
    checked = Settings(envs=list(envs), port=0, **{"rate": 0.0, "grace_s": 0.0} | settings)
    app = create_app(checked, **clock)
    listener = listen(checked)
    server = Server(app, checked)
    up = threading.Event()
    thread = threading.Thread(target=_serve, args=(server, listener, up), name="served")
    thread.start()
    try:
        assert up.wait(30), "the server did not start in time"
        assert server.started, "the server did not start"
        url = Url(url_of(checked, listener))
        url.app, url.server = app, server
        yield url
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def _serve(server: uvicorn.Server, listener: Any, up: threading.Event) -> None:
    startup = server.startup

    async def started(sockets: Any = None) -> None:
        await startup(sockets)
        up.set()

    server.startup = started  # type: ignore[method-assign]
    try:
        server.run(sockets=[listener])
    finally:
        up.set()
        listener.close()
