"""Requests that nobody would send: from the OpenAPI schema and against it, and bytes that are no HTTP at all.

Whatever comes, the server answers in its own format or closes the connection; the only answers above 499 are typed
errors of an environment; and when all is over, no session and no thread is left. ``make fuzz`` sends ten thousand.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks as openapi
from serve_toys import Client, Clock, client_of
from served import served

from agentrl.remote.protocol import STATUS, Code, ErrorAnswer

TOKEN = "a-token-that-nobody-guesses"
ENVS = ("QuickTrial-v0", "Trial-v0", "Lock-v0")
ACTIONS = ("go", "win", "crash", "exit", "nan", "odd", "user", "say", "picture", "big5000", "a")
CHECKS = [
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
]
TYPED = {Code.ENVIRONMENT, Code.DEADLINE}

AMOUNTS = [200, pytest.param(7_000, marks=pytest.mark.slow)]
RAW_AMOUNTS = [800, pytest.param(3_000, marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive(), thread


def check(answer: httpx.Response) -> None:
    """An answer is ours, and no fault of the server."""
    if answer.status_code < 400:
        return
    error = ErrorAnswer.model_validate_json(answer.content).error
    assert answer.status_code == STATUS[error.code]
    assert answer.status_code < 500 or error.code in TYPED, error
    assert "internal error" not in error.message
    assert "Traceback" not in error.message


def smaller(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema with short lists and texts: long ones take most of the time to draw, and say nothing new.

    Pairs become lists of two: schemathesis turns `prefixItems` into what its own validator refuses.
    """
    for model in schema["components"]["schemas"].values():
        for field in model.get("properties", {}).values():
            for part in [field, *field.get("anyOf", [])]:
                for name, limit in (("maxItems", 4), ("maxLength", 200)):
                    if name in part:
                        part[name] = min(part[name], limit)
                if "prefixItems" in part:
                    part["items"] = part.pop("prefixItems")[0]
    return schema


class Bender:
    """Puts what exists into generated requests, so that they get further than the first check."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.live: list[str] = []

    def bend(self, case: Any, draw: Callable[..., Any]) -> None:
        """Changes `case` in place."""
        if not draw(st.booleans()):
            return
        if self.live and isinstance(case.path_parameters, dict) and "session" in case.path_parameters:
            case.path_parameters["session"] = draw(st.sampled_from(self.live))
        if isinstance(case.path_parameters, dict) and "env" in case.path_parameters:
            case.path_parameters["env"] = draw(st.sampled_from(ENVS))
        for item in self._items(case.body):
            if "env" in item:
                item["env"] = draw(st.sampled_from(ENVS))
                if draw(st.booleans()):
                    item |= {"kwargs": {}, "options": {}, "wrappers": []}
            if "step" in item:
                item["step"] = draw(st.integers(1, 4))
            if "action" in item:
                item["action"] = draw(st.sampled_from(ACTIONS))
            if self.live and "session" in item:
                item["session"] = draw(st.sampled_from(self.live))

    def _items(self, body: Any) -> Iterator[dict[str, Any]]:
        if not isinstance(body, dict):
            return
        yield body
        for name in ("sessions", "steps"):
            if isinstance(body.get(name), list):
                yield from (item for item in body[name] if isinstance(item, dict))

    async def send(self, case: Any) -> httpx.Response:
        """Sends `case`. Keeps the sessions that it made."""
        plain = requests.Request(**case.as_transport_kwargs(base_url="http://127.0.0.1")).prepare()
        headers = {**plain.headers, "Authorization": f"Bearer {TOKEN}"}
        body = plain.body.encode() if isinstance(plain.body, str) else plain.body
        assert plain.method is not None
        answer = await self.client.request(plain.method, str(plain.url), headers=headers, content=body)
        if answer.status_code == 200 and "/sessions" in str(plain.url) and plain.method == "POST":
            made = answer.json()
            ids = [item.get("session") for item in made.get("results", [made])]
            self.live = [*self.live, *filter(None, ids)][-20:]
        return answer


@pytest.mark.parametrize("amount", AMOUNTS)
def test_generated_requests(amount: int) -> None:
    clock, sent = Clock(), Counter[int]()

    async def over(client: Client) -> None:
        sessions, runner = client.app.api.sessions, client.app.api.runner
        assert client.app.api.metrics.requests["failed", 500] == 0
        for _ in range(2):
            clock.now += 10_000
            sessions.sweep()
        assert (sessions.active, sessions.kept, runner.free, runner.stuck) == (0, 0, 0, 0)

    with asyncio.Runner() as runner:
        context = client_of(*ENVS, tokens=(SecretStr(TOKEN),), token=TOKEN, clock=clock, max_sessions=50)
        client = runner.run(context.__aenter__())
        bender = Bender(client)
        schema = schemathesis.openapi.from_dict(smaller(runner.run(client.get("/openapi.json")).json()))
        operations = [result.ok() for result in schema.get_all_operations()]
        # Of a request without a body nothing can be varied but the path: nearly all go to those that have one.
        shares = [
            (operation, mode, 20 if operation.body else 1)
            for operation in operations
            for mode in (GenerationMode if operation.body else [GenerationMode.POSITIVE])
        ]
        for operation, mode, share in shares:
            examples = amount * share // sum(share for *_, share in shares) + 1

            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.explicit, Phase.generate, Phase.shrink],
                print_blob=True,
            )
            @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
            def attack(case: Any, data: Any) -> None:
                bender.bend(case, data.draw)
                answer = runner.run(bender.send(case))
                sent[answer.status_code] += 1
                check(answer)
                case.validate_response(answer, checks=CHECKS)

            attack()
        runner.run(over(client))
        runner.run(context.__aexit__(None, None, None))
    print(f"\n{sum(sent.values()):,} requests of the schema: {dict(sorted(sent.items()))}")
    assert sum(sent.values()) >= 0.9 * amount
    assert sent[200] > 0.1 * amount
    assert {404, 422} <= set(sent)


def nearly_valid(rng: random.Random, session: str) -> bytes:
    """A request that is good, or has one thing wrong."""
    step = {"step": rng.randint(0, 3), "action": rng.choice(ACTIONS)}
    routes: list[tuple[str, str, Any]] = [
        ("POST", f"/v1/sessions/{session}/step", step),
        ("POST", "/v1/sessions/nobody/step", step),
        ("POST", "/v1/steps", {"steps": [{**step, "session": session}]}),
        ("POST", "/v1/close", {"sessions": ["nobody"]}),
        ("GET", "/v1/envs", None),
        ("GET", "/docs/../../etc/passwd", None),
    ]
    method, path, value = rng.choice(routes)
    body = b"" if value is None else json.dumps(value).encode()
    version, framing = "1.1", f"content-length: {len(body)}"
    match rng.randrange(8):
        case 0:
            method = rng.choice(["PUT", "TRACE", "CONNECT", "get", "X" * 50])
        case 1:
            version = rng.choice(["0.9", "1.0", "2.0", "9"])
        case 2:
            length = rng.choice([len(body) + 5, max(len(body) - 3, 0), -1, 10**20, "x", "1, 2"])
            framing = f"content-length: {length}"
        case 3:
            framing = "transfer-encoding: chunked"
        case 4:
            framing = "transfer-encoding: chunked"
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    return f"{method} {path} HTTP/{version}\r\nhost: 127.0.0.1\r\n{framing}\r\n\r\n".encode() + body


def spoilt(rng: random.Random, request: bytes) -> bytes:
    """Returns `request`, most often with some bytes wrong."""
    data = bytearray(request)
    for _ in range(rng.choice([0, 1, 1, 2])):
        # In the body, most often: the HTTP parser itself is not ours.
        at = rng.randrange(data.find(b"\r\n\r\n") % len(data) if rng.random() < 0.7 else 0, len(data) + 1)
        match rng.randrange(5):
            case 0:
                wrong = rng.randbytes(rng.randrange(20))
                data[at : at + len(wrong)] = wrong
            case 1:
                del data[at:]
            case 2:
                odd = [b"\r\n", b"\0", b"%00", b"\xff\xfe", b"{" * 300, b"[" * 5000, b"a" * 70_000]
                data[at:at] = rng.choice(odd)
            case 3:
                data += request
            case 4:
                data[at:at] = data[: rng.randrange(200)]
        if not data:
            break
    return bytes(data) if rng.random() < 0.95 else rng.randbytes(rng.randrange(300))


def talk(address: tuple[str, int], data: bytes) -> bytes:
    """Sends `data`, then the end. Returns all that comes back."""
    answer = b""
    with socket.create_connection(address, timeout=30) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:  # the server has seen enough and closed; its answer may be waiting all the same
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
                raise
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65_536):
                answer += piece
    return answer


@pytest.mark.parametrize("amount", RAW_AMOUNTS)
def test_raw_bytes(amount: int) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"\nseed {seed}")
    rng, statuses = random.Random(seed), Counter[str]()
    clock = Clock()
    with served(["QuickTrial-v0"], clock=clock, max_body=100_000) as url, httpx.Client(base_url=url) as client:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        api = url.app.api
        for number in range(amount):
            request = {"env": "QuickTrial-v0", "seed": 0, "request": f"raw-{number // 20}"}
            if number % 20 == 0:
                session = client.post("/v1/sessions", json=request).json()["session"]
            data = spoilt(rng, nearly_valid(rng, session))
            answer = talk(address, data)
            status = answer[9:12].decode() if answer.startswith(b"HTTP/1.1 ") else answer[:12].decode("latin-1")
            statuses[status] += 1
            assert status == "" or status.isdigit(), (data, answer)
            assert status[:1] != "5" or b'"environment_error"' in answer, (data, answer)
            assert b"internal error" not in answer, data
            assert b"Traceback" not in answer, data
        assert client.get("/health").status_code == 200
        assert api.metrics.requests["failed", 500] == 0
        clock.now += 10_000
        call(url, api.sessions.sweep)
        assert api.sessions.active == 0
    print(f"{amount:,} raw messages: {dict(statuses)}")
    assert {"200", "400", "404", "422"} <= set(statuses)


def call(url: Any, function: Callable[[], None]) -> None:
    """Runs `function` on the server's event loop."""

    async def run() -> None:
        function()

    asyncio.run_coroutine_threadsafe(run(), url.server._loop).result(30)
