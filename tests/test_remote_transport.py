"""HTTP over sockets of our own: what servers and proxies may answer, in however many pieces, and what is no answer."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from served import served

from agentrl.remote import transport as module
from agentrl.remote.client import CREATE, Client, Settings, adrive, anywhere, drive
from agentrl.remote.errors import NoAnswer, Unreachable
from agentrl.remote.lanes import Lanes
from agentrl.remote.servers import server_at
from agentrl.remote.transport import HttpxTransport, PlainTransport, Reply, async_transport, transport

HEADERS = {"content-type": "application/json", "authorization": "Bearer a-secret-of-16-characters"}
OK = b"HTTP/1.1 200 OK\r\n"


class Raw:
    """Answers each request with the next of `answers`, in the pieces given; None closes the connection instead."""

    def __init__(self, answers: list[list[bytes] | None], *, close: bool = False) -> None:
        self.answers, self.close_after = answers, close
        self.requests: list[bytes] = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/base"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        while self.answers:
            data = b""
            while b"\r\n\r\n" not in data or not data.endswith(b"}"):
                got = connection.recv(1 << 16)
                if not got:
                    return
                data += got
            self.requests.append(data)
            pieces = self.answers.pop(0)
            if pieces is None:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces:
                connection.sendall(piece)
            if self.close_after:
                return

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._listener.close()
        self._thread.join(10)
        assert not self._thread.is_alive()


@contextmanager
def raw(*answers: list[bytes] | None, **options: bool) -> Iterator[Raw]:
    server = Raw(list(answers), **options)
    try:
        yield server
    finally:
        server.stop()


def blocking(url: str, count: int, timeout_s: float = 5.0) -> list[Reply]:
    one = transport(url, HEADERS)
    try:
        return [one.request("POST", "/v1/steps", b"{}", timeout_s) for _ in range(count)]
    finally:
        one.close()


def awaited(url: str, count: int, timeout_s: float = 5.0) -> list[Reply]:
    async def ask() -> list[Reply]:
        one = async_transport(url, HEADERS)
        try:
            return [await one.request("POST", "/v1/steps", b"{}", timeout_s) for _ in range(count)]
        finally:
            await one.aclose()

    return asyncio.run(ask())


both = pytest.mark.parametrize("ask", [blocking, awaited])
Ask = Callable[..., list[Reply]]

WHOLE = OK + b"Content-Length: 5\r\nX-Odd:  a: b \r\n\r\nhello"
ANSWERS = {
    "whole": [WHOLE],
    "byte by byte": [WHOLE[i : i + 1] for i in range(len(WHOLE))],
    "chunked": [OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n", b"3;x=y\r\nl", b"lo\r\n0", b"\r\n\r\n"],
    "chunked with trailers": [OK + b"transfer-encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\nA: b\r\n\r\n"],
    "continue first": [b"HTTP/1.1 100 Continue\r\n\r\n", WHOLE],
}


@both
@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_is_read_whole_and_its_connection_used_again(ask: Ask, kind):
    with raw(ANSWERS[kind], [WHOLE]) as server:
        replies = ask(server.url, 2)
        assert [(reply.status, reply.body) for reply in replies] == [(200, b"hello")] * 2
        assert replies[1].headers["x-odd"] == "a: b"
        assert server.connections == 1
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"POST /base/v1/steps HTTP/1.1"
    assert b"authorization: Bearer a-secret-of-16-characters" in head
    assert b"content-length: 2" in head
    assert b"host: 127.0.0.1:" in head
    assert body == b"{}"


@both
@pytest.mark.parametrize("head", [OK + b"\r\n", b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\n"])
def test_an_answer_may_end_with_its_connection(ask: Ask, head):
    with raw([head + b"hello"], [head, b"hello"], close=True) as server:
        assert [reply.body for reply in ask(server.url, 2)] == [b"hello"] * 2
        assert server.connections == 2


@both
def test_a_connection_that_the_server_closed_meanwhile_is_replaced(ask: Ask):
    with raw([WHOLE], None, [WHOLE]) as server:
        assert [reply.body for reply in ask(server.url, 2)] == [b"hello"] * 2
        assert server.connections == 2
        assert server.requests[1] == server.requests[2]


@both
def test_an_answer_without_a_body(ask: Ask):
    with raw([b"HTTP/1.1 204 No Content\r\n\r\n"]) as server:
        assert ask(server.url, 1) == [Reply(204, {}, b"")]


@both
@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([b"SSH-2.0-OpenSSH_9\r\n\r\n"], "no HTTP"),
        ([b"HTTP/1.1 abc\r\n\r\n"], "no HTTP"),
        ([OK + b"content-length: many\r\n\r\n"], "no HTTP"),
        ([OK + b"transfer-encoding: chunked\r\n\r\nxyz\r\n"], "no HTTP"),
        ([OK + b"content-length: 9\r\n\r\nhello"], "in the middle of an answer"),
        ([OK + b"transfer-encoding: chunked\r\n\r\n9\r\nhello"], "in the middle of an answer"),
        ([b"HTTP/1.1 2"], "in the middle of an answer"),
        ([], "without an answer"),
        ([b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000], "headers without end"),
    ],
)
def test_what_is_no_answer_is_a_failure(ask: Ask, pieces, says):
    with raw(pieces, close=True) as server, pytest.raises(Unreachable, match=says) as told:
        ask(server.url, 1)
    assert not isinstance(told.value, NoAnswer)
    assert server.url in str(told.value)


@both
def test_nobody_there_and_nobody_answering(ask: Ask):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(NoAnswer):
            ask(url, 1, 0.05)
    with pytest.raises(Unreachable, match=url) as told:
        ask(url, 1)
    assert not isinstance(told.value, NoAnswer)


def test_tls_and_proxies_are_left_to_httpx(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert type(transport("http://a", {})) is PlainTransport
    assert type(transport("https://a", {})) is HttpxTransport
    monkeypatch.setenv("http_proxy", "http://proxy:1")
    assert type(transport("http://a", {})) is HttpxTransport


def test_httpx_plays_the_same(monkeypatch):
    monkeypatch.setattr(module, "_plain", lambda url: False)
    with served(["Sokoban-v0"]) as url:
        servers, settings = [server_at(str(url))], Settings(retry_s=0)
        request = {"env": "Sokoban-v0", "seed": 3, "request": "a"}
        client = Client(settings)
        _, one = drive(anywhere(CREATE, servers, request, settings), client)
        client.close()

        async def create() -> tuple[object, dict[str, object]]:
            made_lanes = Lanes(settings)
            made = await adrive(anywhere(CREATE, servers, {**request, "request": "b"}, settings), made_lanes)
            await made_lanes.aclose()
            return made

        _, other = asyncio.run(create())
        assert {**one, "session": ""} == {**other, "session": ""}
        assert one["session"] != other["session"]
    with pytest.raises(Unreachable, match="127"):
        transport("http://127.0.0.1:9", {}).request("GET", "/", b"", 1.0)
