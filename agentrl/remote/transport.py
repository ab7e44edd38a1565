"""HTTP requests to one server: over sockets of our own where they are plain HTTP, else by httpx.

A step is answered in a tenth of a millisecond, and httpx alone spends half a millisecond (blocking) to one and a half
(asyncio) of CPU time on a request, most of it in its connection pool. So requests that need neither TLS nor a proxy go
out over HTTP/1.1 connections that are kept open; all others take httpx.

Every request is safe to repeat (`agentrl.remote.protocol`): one that meets a connection which the server has closed in
the meantime goes out again.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, NamedTuple, Protocol
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies

from agentrl.remote.errors import NoAnswer, Unreachable

CONNECT_S = 5.0
"""Seconds for a connection."""
_READ = 1 << 18
_LARGEST_HEAD = 1 << 16


class Reply(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes


class Transport(Protocol):
    """Blocking requests to one server."""

    def request(self, method: str, path: str, body: bytes, timeout_s: float) -> Reply:
        """Makes one attempt.

        Raises:
            NoAnswer: none within `timeout_s`.
            Unreachable: no connection, or no HTTP on it.
        """

    def close(self) -> None:
        """Closes the connections."""


class AsyncTransport(Protocol):
    """Requests to one server from one event loop; any number at once."""

    async def request(self, method: str, path: str, body: bytes, timeout_s: float) -> Reply:
        """As `Transport.request`."""

    async def aclose(self) -> None:
        """Closes the connections."""


def transport(url: str, headers: dict[str, str]) -> Transport:
    """Returns what makes blocking requests to the server at `url`."""
    return PlainTransport(url, headers) if _plain(url) else HttpxTransport(url, headers)


def async_transport(url: str, headers: dict[str, str]) -> AsyncTransport:
    """Returns what makes requests to the server at `url` from the running event loop."""
    return AsyncPlainTransport(url, headers) if _plain(url) else AsyncHttpxTransport(url, headers)


def _plain(url: str) -> bool:
    return url.startswith("http://") and not {"http", "all"} & getproxies().keys()


class _Bad(Exception):
    """What came is not the answer to a request."""


class _Stale(Exception):
    """The server had closed the connection before it was used again."""


class _Parser:
    """One answer, from the bytes of its connection."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._body = bytearray()
        self._length: int | None = 0
        self._chunked = False
        self.status = 0
        self.headers: dict[str, str] = {}
        self.reusable = False
        """Whether the connection can carry another request."""

    @property
    def begun(self) -> bool:
        return bool(self._buffer or self.status)

    def feed(self, data: bytes) -> bool:
        """Takes further bytes. Returns whether the answer is complete. Raises `_Bad`."""
        self._buffer += data
        try:
            while not self.status:
                if (end := self._buffer.find(b"\r\n\r\n")) < 0:
                    if len(self._buffer) > _LARGEST_HEAD:
                        raise ValueError("headers without end")
                    return False
                self._read_head(self._buffer[:end].decode("latin-1"))
                del self._buffer[: end + 4]
            if self._chunked:
                return self._read_chunks()
            return self._length is not None and len(self._buffer) >= self._length
        except ValueError as error:
            raise _Bad(f"no HTTP: {error}") from error

    def end(self) -> None:
        """Nothing more comes. Raises `_Bad`: the answer is not complete."""
        if not self.status or self._chunked or self._length is not None:
            raise _Bad("the connection was closed " + ("in the middle of" if self.begun else "without") + " an answer")

    def reply(self) -> Reply:
        """Returns the complete answer."""
        body = self._body if self._chunked else self._buffer[: self._length]
        return Reply(self.status, self.headers, bytes(body))

    def _read_head(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        version, status, *_ = first.split(" ", 2)
        if not version.startswith("HTTP/1."):
            raise ValueError(f"the answer begins with {version[:20]!r}")
        if 100 <= int(status) < 200:  # "continue": the answer itself follows
            return
        self.status = int(status)
        for line in lines:
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()
        self._chunked = self.headers.get("transfer-encoding", "").lower().endswith("chunked")
        length = self.headers.get("content-length")
        self._length = 0 if status in ("204", "304") else None if length is None else int(length)
        delimited = self._chunked or self._length is not None
        self.reusable = delimited and version != "HTTP/1.0" and self.headers.get("connection", "").lower() != "close"

    def _read_chunks(self) -> bool:
        while (end := self._buffer.find(b"\r\n")) >= 0:
            size = int(self._buffer[:end].split(b";")[0], 16)
            if size == 0:  # trailers, then an empty line
                return self._buffer.find(b"\r\n\r\n", end) >= 0
            if len(self._buffer) < end + 4 + size:
                return False
            self._body += self._buffer[end + 2 : end + 2 + size]
            del self._buffer[: end + 4 + size]
        return False


class _Plain:
    """What plain requests to one server have in common."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        parts: SplitResult = urlsplit(url)
        self._url, self._where = url, (parts.hostname or "", parts.port or 80)
        self._base = parts.path
        lines = {"host": parts.netloc, **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())

    def _bytes(self, method: str, path: str, body: bytes) -> bytes:
        head = f"{method} {self._base}{path} HTTP/1.1\r\n{self._head}content-length: {len(body)}\r\n\r\n"
        return head.encode("latin-1") + body


class PlainTransport(_Plain):
    """Blocking requests over one connection."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        super().__init__(url, headers)
        self._idle: socket.socket | None = None

    def request(self, method: str, path: str, body: bytes, timeout_s: float) -> Reply:
        data = self._bytes(method, path, body)
        connection, self._idle = self._idle, None
        try:
            if connection is not None:
                try:
                    return self._exchange(connection, data, timeout_s, fresh=False)
                except _Stale:
                    pass
            connection = socket.create_connection(self._where, CONNECT_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return self._exchange(connection, data, timeout_s, fresh=True)
        except (OSError, _Bad) as error:
            raise Unreachable(f"{self._url}: {error}") from error

    def close(self) -> None:
        if self._idle is not None:
            self._idle.close()
            self._idle = None

    def _exchange(self, connection: socket.socket, data: bytes, timeout_s: float, *, fresh: bool) -> Reply:
        parser = _Parser()
        try:
            connection.settimeout(timeout_s)
            try:
                connection.sendall(data)
                got = connection.recv(_READ)
            except ConnectionError:
                if fresh:
                    raise
                raise _Stale from None
            if not got and not fresh:
                raise _Stale
            while got and not parser.feed(got):
                got = connection.recv(_READ)
            if not got:
                parser.end()
            elif parser.reusable:
                self._idle = connection
            return parser.reply()
        except TimeoutError:
            raise NoAnswer(f"{self._url}: no answer") from None
        finally:
            if self._idle is not connection:
                connection.close()


class _Connection(asyncio.Protocol):
    """One connection of an event loop, with one request at a time."""

    def __init__(self) -> None:
        self.open = False
        self.parser = _Parser()
        self._transport: Any = None
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self.open = transport, True

    def data_received(self, data: bytes) -> None:
        if self._done is None or self._done.done():  # nobody asked
            self.close()
            return
        try:
            if self.parser.feed(data):
                self._done.set_result(None)
        except _Bad as error:
            self._done.set_exception(error)

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        if self._done is None or self._done.done():
            return
        try:
            if error is not None:
                raise _Bad(str(error))
            self.parser.end()
            self._done.set_result(None)
        except _Bad as bad:
            self._done.set_exception(bad)

    async def exchange(self, data: bytes) -> Reply:
        """Sends a request. Returns its answer. Raises `_Bad`."""
        self.parser = _Parser()
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        try:
            await self._done
        finally:
            self._done = None
        return self.parser.reply()

    def close(self) -> None:
        self.open = False
        self._transport.abort()


class AsyncPlainTransport(_Plain):
    """Requests over as many connections as there are requests under way."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        super().__init__(url, headers)
        self._idle: list[_Connection] = []

    async def request(self, method: str, path: str, body: bytes, timeout_s: float) -> Reply:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._request(self._bytes(method, path, body))
        except TimeoutError:
            raise NoAnswer(f"{self._url}: no answer") from None
        except (OSError, _Bad) as error:
            raise Unreachable(f"{self._url}: {error}") from error

    async def aclose(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _request(self, data: bytes) -> Reply:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                try:
                    return await self._exchange(connection, data)
                except _Bad:
                    if connection.parser.begun:
                        raise
        return await self._exchange(await self._connect(), data)

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(CONNECT_S):
                _, made = await asyncio.get_running_loop().create_connection(_Connection, *self._where)
        except TimeoutError:
            raise _Bad(f"no connection within {CONNECT_S:g} s") from None
        return made

    async def _exchange(self, connection: _Connection, data: bytes) -> Reply:
        kept = False
        try:
            reply = await connection.exchange(data)
            if kept := connection.parser.reusable and connection.open:
                self._idle.append(connection)
            return reply
        finally:
            if not kept:
                connection.close()


class HttpxTransport:
    """Blocking requests by httpx: TLS, proxies."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        import httpx

        self._url, self._http = url, httpx.Client(headers=headers)

    def request(self, method: str, path: str, body: bytes, timeout_s: float) -> Reply:
        import httpx

        timeout = httpx.Timeout(timeout_s, connect=CONNECT_S)
        try:
            answer = self._http.request(method, self._url + path, content=body, timeout=timeout)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _of_httpx(self._url, error) from error
        return Reply(answer.status_code, dict(answer.headers), answer.content)

    def close(self) -> None:
        self._http.close()


class AsyncHttpxTransport:
    """Requests by httpx from an event loop: TLS, proxies."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        import httpx

        # A batch that is slow holds a connection, and so does each that it is split into.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._url, self._http = url, httpx.AsyncClient(headers=headers, limits=limits)

    async def request(self, method: str, path: str, body: bytes, timeout_s: float) -> Reply:
        import httpx

        timeout = httpx.Timeout(timeout_s, connect=CONNECT_S)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._http.request(method, self._url + path, content=body, timeout=timeout)
        except TimeoutError:
            raise NoAnswer(f"{self._url}: no answer") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _of_httpx(self._url, error) from error
        return Reply(answer.status_code, dict(answer.headers), answer.content)

    async def aclose(self) -> None:
        await self._http.aclose()


def _of_httpx(url: str, error: Exception) -> Unreachable:
    import httpx

    if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
        return NoAnswer(f"{url}: no answer")
    return Unreachable(f"{url}: {str(error) or type(error).__name__}")
