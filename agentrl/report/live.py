"""``agentrl view``: the report on a local address, which follows a run while it trains.

The page asks every two seconds whether the run's files have changed (`/stamp`) and takes the data anew (`/data`) where
they have. Only this machine is served, and only under its own name: a page of elsewhere that resolves to this address
gets nothing.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from agentrl.errors import UserError
from agentrl.evaluate.store import RESULT, SETTINGS
from agentrl.report.data import IMAGE_MB, TRAJECTORIES, Report, make_report
from agentrl.report.episodes import Cache
from agentrl.report.page import payload, render
from agentrl.versions import VERSIONS

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")


class LiveReport:
    """A report that is made again when the files under it have changed.

    Args:
        paths: as `make_report`.
        trajectories: as there.
        image_mb: as there.
    """

    def __init__(self, paths: Sequence[Any], *, trajectories: int = TRAJECTORIES, image_mb: float = IMAGE_MB) -> None:
        self.paths = [Path(path) for path in paths]
        self._options: dict[str, Any] = {"trajectories": trajectories, "image_mb": image_mb}
        self._cache: Cache = {}
        self._lock = threading.Lock()
        self._made: tuple[str, Report] | None = None

    def stamp(self) -> str:
        """Changes whenever a file changes that the report is made of."""
        digest = hashlib.sha256()
        for path in self.paths:
            for file in sorted([path] if path.is_file() else _watched(path)):
                try:
                    state = file.stat()
                except OSError:  # replaced while we looked
                    continue
                digest.update(f"{file}|{state.st_mtime_ns}|{state.st_size}\n".encode())
        return digest.hexdigest()[:16]

    def current(self) -> tuple[str, Report]:
        """Returns the stamp and the report of now.

        Raises:
            DataError: the runs are gone.
        """
        with self._lock:
            stamp = self.stamp()
            if self._made is None or self._made[0] != stamp:
                self._made = (stamp, make_report(self.paths, cache=self._cache, **self._options))
            return self._made

    def answer(self, path: str) -> tuple[str, bytes] | None:
        """Returns content type and body of a path; None: there is no such thing."""
        if path == "/":
            stamp, report = self.current()
            page = render(report, live=True).replace(b"<body ", f'<body data-stamp="{stamp}" '.encode(), 1)
            return "text/html; charset=utf-8", page
        if path == "/stamp":
            return "application/json", json.dumps({"stamp": self.stamp()}).encode()
        if path == "/data":
            stamp, report = self.current()
            return "application/json", json.dumps({"stamp": stamp, "parts": payload(report)}).encode()
        return None


def make_server(report: LiveReport, port: int) -> ThreadingHTTPServer:
    """Returns a server on this machine's loopback address; port 0 takes a free one.

    Raises:
        UserError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in NAMES:
                return self.send_error(403, "ask for this machine by its own name")
            try:
                found = report.answer(self.path.partition("?")[0])
            except UserError as error:
                return self.send_error(503, str(error)[:200])
            if found is None:
                return self.send_error(404)
            kind, body = found
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """The terminal is for the address alone."""

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise UserError(f"port {port} cannot be used: {error.strerror or error}; choose another --port") from error
    server.daemon_threads = True
    return server


def _watched(folder: Path) -> list[Path]:
    kinds = ("*.jsonl", "config.yaml", "plan.txt", VERSIONS, SETTINGS, RESULT)
    return [
        file for kind in kinds for file in folder.rglob(kind) if "checkpoints" not in file.relative_to(folder).parts
    ]
