"""Served environments that hang, crash and leak; clients that vanish; servers that are told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_toys import FINAL, Clock, Hall, client_of, entered, halls, wanted
from served import served
from test_serve import error_of
from typer.testing import CliRunner

from agentrl.cli import app
from agentrl.errors import UserError
from agentrl.remote.protocol import Code
from agentrl.rollout.process import ProcessHost
from agentrl.serve import Settings, create_app, security
from agentrl.serve.server import listen

BOTH = pytest.mark.parametrize("env", ["Trial-v0", "QuickTrial-v0"])


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive() or thread.name.startswith("asyncio_"), thread


# Hanging


def test_a_stuck_step_delays_nobody() -> None:
    hall = halls["stuck"] = Hall()

    async def play() -> None:
        async with client_of("Trial-v0?hall=stuck", "QuickTrial-v0", workers=2) as client:
            stuck, other, quick = [await client.create(env) for env in ("Trial-v0", "Trial-v0", "QuickTrial-v0")]
            waiting = asyncio.create_task(client.step(stuck, 1, "hang"))
            await entered(hall)
            for number in (1, 2, 3):  # all answered while the first hangs
                results = await client.steps((other, number, "go"), (quick, number, "go"))
                assert [each["step"] for each in results] == [number, number]
            assert not waiting.done()
            hall.leave.set()
            assert (await waiting).status_code == 200

    asyncio.run(play())


def test_a_stuck_step_ends_its_session_at_its_deadline() -> None:
    halls["cut"] = Hall()

    async def play() -> None:
        async with client_of("Trial-v0?hall=cut", "QuickTrial-v0", step_deadline_s=0.1) as client:
            stuck, other = await client.create("Trial-v0"), await client.create()
            first = await client.step(stuck, 1, "hang")
            assert "step took longer than 0.1 s" in error_of(first, Code.DEADLINE).message
            assert (await client.step(stuck, 1, "hang")).content == first.content
            error_of(await client.step(stuck, 2, "go"), Code.UNKNOWN_SESSION)
            assert client.app.api.runner.stuck == 1
            assert "agentrl_stuck_calls 1.0" in (await client.get("/metrics")).text
            assert (await client.step(other, 1, "go")).status_code == 200
            assert client.app.api.sessions.active == 1

    asyncio.run(play())


def test_a_stuck_create_ends_at_its_deadline_and_its_key_is_free_again() -> None:
    hall = halls["start"] = Hall()

    async def play() -> None:
        async with client_of("Trial-v0?hall=start", create_deadline_s=0.1) as client:
            request = wanted("Trial-v0", options={"start": "hang"})
            error_of(await client.post("/v1/sessions", json=request), Code.DEADLINE)
            runner = client.app.api.runner
            assert client.app.api.sessions.active == 0
            hall.leave.set()
            runner._settings = runner._settings.model_copy(update={"create_deadline_s": 60.0})
            assert (await client.post("/v1/sessions", json=request)).status_code == 200

    asyncio.run(play())


def test_stuck_calls_hold_no_worker() -> None:
    hall = halls["workers"] = Hall()

    async def play() -> None:
        async with client_of("Trial-v0?hall=workers", step_deadline_s=0.1, workers=1) as client:
            for _ in range(3):
                error_of(await client.step(await client.create("Trial-v0"), 1, "hang"), Code.DEADLINE)
            assert client.app.api.runner.stuck == 3
            hall.leave.set()
            fresh = await client.create("Trial-v0")
            assert fresh

    asyncio.run(play())


def test_slow_arguments_of_a_client_do_not_hold_up_a_fast_environment() -> None:
    hall = halls["slow-reset"] = Hall()

    async def play() -> None:
        async with client_of("QuickTrial-v0") as client:
            request = wanted(kwargs={"hall": "slow-reset"}, options={"start": "hang"})
            waiting = asyncio.create_task(client.post("/v1/sessions", json=request))
            await entered(hall)
            session = await client.create()
            assert (await client.step(session, 1, "go")).status_code == 200
            hall.leave.set()
            slow = (await waiting).json()["session"]
            assert client.app.api.sessions._sessions[slow].environment.slow is False
            assert (await client.step(slow, 1, "go")).status_code == 200

    asyncio.run(play())


def test_closing_a_session_during_its_step_frees_the_environment_afterwards() -> None:
    hall = halls["closing"] = Hall()

    async def play() -> None:
        async with client_of("Trial-v0?hall=closing") as client:
            session = await client.create("Trial-v0")
            waiting = asyncio.create_task(client.step(session, 1, "hang"))
            await entered(hall)
            assert (await client.delete(f"/v1/sessions/{session}")).json() == {"closed": 1}
            api = client.app.api
            assert (api.sessions.active, api.runner.free) == (0, 0)
            hall.leave.set()
            assert (await waiting).json()["step"] == 1
            assert api.runner.free == 1
            error_of(await client.step(session, 2, "go"), Code.UNKNOWN_SESSION)

    asyncio.run(play())


# Crashing


@BOTH
@pytest.mark.parametrize(
    ("action", "code", "words"),
    [
        ("crash", Code.ENVIRONMENT, "ValueError: fell over"),
        ("exit", Code.ENVIRONMENT, "SystemExit: leaving"),
        ("nan", Code.ENVIRONMENT, "returned the reward nan"),
        ("odd", Code.INVALID, "returned a object as its observation"),
        ("user", Code.INVALID, "ask otherwise"),
    ],
)
def test_a_crash_ends_its_session_and_nothing_else(
    env: str, action: str, code: Code, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> None:
        async with client_of(env) as client:
            crashing, other = await client.create(env), await client.create(env)
            first = await client.step(crashing, 1, action)
            message = error_of(first, code).message
            assert words in message
            assert f"environment {env!r} at step 1" in message
            assert "Traceback" not in first.text
            assert ".py" not in message.replace("/srv/secret/place.py", "")
            assert (await client.step(crashing, 1, action)).content == first.content
            gone = error_of(await client.step(crashing, 2, "go"), Code.UNKNOWN_SESSION)
            assert code in gone.message
            assert (await client.step(other, 1, "go")).status_code == 200
            assert client.app.api.runner.free == 0  # the broken one is not used again

    with caplog.at_level(logging.ERROR, "agentrl.serve"):
        asyncio.run(play())
    traces = [record for record in caplog.records if record.exc_info]
    assert bool(traces) == (code is Code.ENVIRONMENT)  # the server's log has the trace


@BOTH
def test_a_reset_that_fails_leaves_nothing_behind(env: str) -> None:
    async def play() -> None:
        async with client_of(env) as client:
            request = wanted(env, options={"start": "crash"})
            for _ in range(3):
                error_of(await client.post("/v1/sessions", json=request), Code.ENVIRONMENT)
            sessions = client.app.api.sessions
            assert (sessions.active, sessions.kept, client.app.api.runner.free) == (0, 0, 0)
            assert sessions.idle.is_set()

    asyncio.run(play())


def test_a_fault_of_the_server_itself_is_no_stack_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        async with client_of() as client:
            session = await client.create()
            api = client.app.api

            def broken(*_: Any) -> None:
                raise KeyError("secret")

            monkeypatch.setattr(api.sessions, "step", broken)
            error = error_of(await client.step(session, 1, "go"), Code.ENVIRONMENT)
            assert error.message == "internal error of the server; its log says more"
            assert api.metrics.requests["failed", 500] == 1

    asyncio.run(play())


def test_a_worker_process_that_is_killed_or_hangs_ends_its_session_only() -> None:
    async def play() -> None:
        async with client_of("BabyStep-v0", executor="process", step_deadline_s=120.0) as client:
            assert client.app.api.catalogue.entries["BabyStep-v0"].local_arguments == frozenset({"delay"})
            first, second = await asyncio.gather(client.create("BabyStep-v0"), client.create("BabyStep-v0"))
            host = client.app.api.sessions._sessions[first].environment.host
            assert isinstance(host, ProcessHost)
            assert (await client.step(first, 1, "go")).json()["observation"] == "1"
            os.kill(host.pid, signal.SIGKILL)
            assert "died" in error_of(await client.step(first, 2, "go"), Code.ENVIRONMENT).message
            assert (await client.step(second, 1, "go")).status_code == 200
            failed = error_of(await client.step(second, 2, "fail"), Code.ENVIRONMENT)
            assert "RuntimeError: as told" in failed.message
            assert ".py" not in failed.message

    import baby_step

    assert baby_step
    asyncio.run(play())


# Clients that vanish


@BOTH
def test_sessions_of_a_client_that_is_gone_are_reaped(env: str) -> None:
    clock = Clock()

    async def play() -> None:
        async with client_of(env, clock=clock, session_ttl_s=100.0) as client:
            api = client.app.api
            idle, used, done = [await client.create(env) for _ in range(3)]
            await client.step(done, 1, "win")
            clock.now += 60
            await client.step(used, 1, "go")
            clock.now += 60
            api.sessions.sweep()
            assert api.sessions.active == 1
            assert "reaped" in error_of(await client.step(idle, 1, "go"), Code.UNKNOWN_SESSION).message
            error_of(await client.step(done, 1, "win"), Code.UNKNOWN_SESSION)  # forgotten
            assert (await client.step(used, 1, "go")).json()["step"] == 1
            reaped = f'agentrl_sessions_ended_total{{env="{env}",reason="reaped"}} 1.0'
            assert reaped in (await client.get("/metrics")).text
            clock.now += 101
            api.sessions.sweep()
            clock.now += 101
            api.sessions.sweep()
            assert (api.sessions.active, api.sessions.kept, api.runner.free) == (0, 0, 0)
            assert not api.sessions._requests

    asyncio.run(play())


def test_a_step_under_way_is_not_idle() -> None:
    clock, hall = Clock(), Hall()
    halls["long"] = hall

    async def play() -> None:
        async with client_of("Trial-v0?hall=long", clock=clock, session_ttl_s=10.0) as client:
            session = await client.create("Trial-v0")
            waiting = asyncio.create_task(client.step(session, 1, "hang"))
            await entered(hall)
            clock.now += 1000
            client.app.api.sessions.sweep()
            hall.leave.set()
            assert (await waiting).status_code == 200
            client.app.api.sessions.sweep()
            assert (await client.step(session, 2, "go")).status_code == 200

    asyncio.run(play())


def test_records_of_ended_sessions_are_bounded() -> None:
    async def play() -> None:
        async with client_of(max_sessions=3) as client:
            for _ in range(40):
                session = await client.create()
                await client.delete(f"/v1/sessions/{session}")
            assert client.app.api.sessions.kept <= 4 * 3 + 2
            assert client.app.api.runner.free == 1

    asyncio.run(play())


def test_a_body_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "BODY_TIMEOUT_S", 0.05)

    async def play() -> None:
        async with client_of() as client:

            async def dribble() -> Any:
                yield b'{"step"'
                await asyncio.Event().wait()

            answer = await client.post("/v1/steps", content=dribble())
            assert "did not arrive" in error_of(answer, Code.INVALID).message

    asyncio.run(play())


@pytest.mark.parametrize("path", ["/v1/steps", "/v1/close", "/nowhere"])
def test_a_client_that_goes_before_its_answer_is_no_fault(path: str, caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        async with client_of() as client:
            body = json.dumps({"steps": []} if path == "/v1/steps" else {"sessions": []}).encode()
            headers = [(b"host", b"127.0.0.1")]
            scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}

            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": body, "more_body": False}

            async def send(message: Any) -> None:
                raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")

            await client.app(scope, receive, send)
            assert client.app.api.metrics.requests["failed", 500] == 0
            left = {"type": "http.disconnect"}
            scope = {**scope, "headers": [*headers, (b"content-length", b"10")]}
            answers: list[Any] = []

            async def leave() -> dict[str, Any]:
                return left

            async def keep(message: Any) -> None:
                answers.append(message)

            await client.app(scope, leave, keep)  # what came of the body is not taken for the whole
            assert answers[0]["status"] == 422

    with caplog.at_level(logging.INFO):
        asyncio.run(play())
    assert not [record for record in caplog.records if record.name == "agentrl.serve"]


def test_a_fault_in_another_route_is_answered_once_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> None:
        async with client_of() as client:
            monkeypatch.setattr(client.app.api.metrics, "text", lambda: 1 / 0)
            answer = await client.get("/metrics")
            assert "internal error" in error_of(answer, Code.ENVIRONMENT).message
            assert client.app.api.metrics.requests["failed", 500] == 1
            monkeypatch.setattr(client.app.api.sessions, "create", lambda request: 1 / 0)
            answer = await client.post("/v1/sessions", json=wanted())
            assert "internal error" in error_of(answer, Code.ENVIRONMENT).message

    asyncio.run(play())
    assert caplog.text.count("ZeroDivisionError") == 2


def test_unknown_paths_and_methods_are_counted() -> None:
    async def play() -> None:
        async with client_of() as client:
            error_of(await client.get("/nowhere"), Code.NOT_FOUND)
            error_of(await client.delete("/v1/envs"), Code.METHOD)
            metrics = client.app.api.metrics
            assert (metrics.errors[Code.NOT_FOUND], metrics.errors[Code.METHOD]) == (1, 1)
            assert (metrics.requests["refused", 404], metrics.requests["refused", 405]) == (1, 1)

    asyncio.run(play())


def test_an_environment_that_is_not_as_fast_as_it_says_leaves_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrl.serve.sessions.FAST_S", 0.0)

    async def play() -> None:
        async with client_of("QuickTrial-v0") as client:
            first = await client.create("QuickTrial-v0")
            environment = client.app.api.sessions._sessions[first].environment
            assert not environment.slow
            for number in range(1, FINAL + 1):
                assert (await client.step(first, number, "go")).json()["step"] == number
                assert environment.slow
            second = await client.create("QuickTrial-v0")  # the same one, again
            assert client.app.api.sessions._sessions[second].environment is environment
            assert environment.slow

    asyncio.run(play())


@pytest.mark.parametrize(
    ("before", "more"),
    [
        (b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx-a: ", b"a" * 65_536),
        (b"GET /", b"a" * 65_536),
        (b"POST /v1/steps HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n" * 9000),
    ],
    ids=["header", "path", "trailers"],
)
def test_a_head_without_end_is_cut_off(before: bytes, more: bytes) -> None:
    with served(["QuickTrial-v0"]) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as one:
        one.sendall(before)
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                one.sendall(more)
            pytest.fail("64 MB were taken")
        assert httpx.get(f"{url}/health").status_code == 200


def test_small_chunks_of_a_large_body_are_no_head() -> None:
    body = json.dumps({"steps": [{"session": "none", "step": 1, "action": "a" * 300} for _ in range(1000)]}).encode()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 20):
            yield body[start : start + 20]

    with served(["QuickTrial-v0"]) as url, httpx.Client(base_url=url) as client:
        for _ in range(2):
            answer = client.post("/v1/steps", content=pieces(), headers={"content-type": "application/json"})
            assert answer.status_code == 200


# What clients are told


def test_values_that_are_the_owners_reach_no_client_and_long_ones_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> None:
        async with client_of("Trial-v0?file=/srv/secret/place&size=2") as client:
            for kwargs in ({"bogus": 1}, {"bogus": "x" * 5_000_000}):
                answer = await client.post("/v1/sessions", json=wanted("Trial-v0", kwargs=kwargs))
                message = error_of(answer, Code.INVALID).message
                assert "bogus" in message
                assert "/srv/secret" not in message
                assert len(message) < 3000

    with caplog.at_level(logging.INFO):
        asyncio.run(play())
    assert len(caplog.text) < 10_000


def test_an_environment_that_no_agent_can_read_is_not_served() -> None:
    with pytest.raises(UserError, match="'CartPole-v1' returned a ndarray as its observation"):
        create_app(Settings(envs=["CartPole-v1"]))


def test_a_number_of_the_owners_may_be_said_and_not_changed() -> None:
    async def play() -> None:
        async with client_of("SearchQA-v0?pages=200") as client:
            answer = await client.post("/v1/sessions", json=wanted("SearchQA-v0", kwargs={"pages": 200}))
            assert answer.status_code == 200
            for kwargs in ({"pages": 300}, {"world": 1}):
                refused = await client.post("/v1/sessions", json=wanted("SearchQA-v0", kwargs=kwargs))
                assert "its owner sets it" in error_of(refused, Code.FORBIDDEN).message

    asyncio.run(play())


# Stopping


def test_a_server_stops_though_an_environment_hangs() -> None:
    hall = halls["stop"] = Hall()
    with served(["Trial-v0?hall=stop"]) as url, httpx.Client(base_url=url) as client:
        session = client.post("/v1/sessions", json=wanted("Trial-v0")).json()["session"]
        path = f"/v1/sessions/{session}/step"
        answers: list[httpx.Response] = []

        def step() -> None:
            answers.append(httpx.post(f"{url}{path}", json={"step": 1, "action": "hang"}, timeout=60))

        stepping = threading.Thread(target=step)
        stepping.start()
        assert hall.entered.wait(30)
        url.server.drain()
        stepping.join(60)
        error_of(answers[0], Code.STOPPING)
        hall.leave.set()


Start = Callable[..., tuple["subprocess.Popen[str]", str, list[str]]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts ``agentrl serve``: gives the process, the server's URL, and the lines of its banner."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, **variables: str) -> tuple[subprocess.Popen[str], str, list[str]]:
        process = subprocess.Popen(
            [sys.executable, "-m", "agentrl", "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables, "PYTHONUNBUFFERED": "1"},
        )
        started.append(process)
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("metrics"):
                break
        url = next((line.split()[1].removesuffix("/docs") for line in lines if line.startswith("docs")), "")
        return process, url, lines

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_sigterm_lets_sessions_end_and_refuses_new_ones(start: Start, tmp_path: Path) -> None:
    token = "0123456789abcdef-token"
    (tmp_path / "token").write_text(token)
    process, url, lines = start(
        "Lock-v0?length=2", "--port", "0", "--token-file", str(tmp_path / "token"), AGENTRL_SERVE_GRACE="60"
    )
    assert any("Lock-v0 length=2  (event loop)" in line for line in lines)
    assert token not in "".join(lines)
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
        session = client.post("/v1/sessions", json=wanted("Lock-v0")).json()["session"]
        process.send_signal(signal.SIGTERM)
        while client.get("/ready").status_code != 503:
            pass
        error_of(client.post("/v1/sessions", json=wanted("Lock-v0")), Code.STOPPING)
        answer = client.post(f"/v1/sessions/{session}/step", json={"step": 1, "action": "a"})
        assert answer.status_code == 200
        assert client.delete(f"/v1/sessions/{session}").json() == {"closed": 1}
    said = process.communicate(timeout=120)[1]
    assert process.returncode in (0, -signal.SIGTERM)
    assert "1 go on for at most 60 s" in said
    assert "Traceback" not in said
    assert token not in said


def test_a_second_sigterm_ends_at_once(start: Start) -> None:
    process, url, _ = start("Lock-v0", "--port", "0", "--grace", "3600")
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.post("/v1/sessions", json=wanted("Lock-v0")).status_code == 200
        process.send_signal(signal.SIGTERM)
        while client.get("/ready").status_code != 503:
            pass
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert "1 sessions are closed" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["Lock-v0", "--host", "0.0.0.0"], {}, "there is no token"),
        (["Lokc-v0"], {}, "did you mean 'Lock-v0'"),
        (["Lock-v0", "--executor", "fork"], {}, "executor"),
        (["Lock-v0", "--session-ttl", "0"], {}, "session_ttl_s"),
        (["Lock-v0", "--log-level", "loud"], {}, "--log-level 'loud'"),
        (["Lock-v0"], {"AGENTRL_SERVE_TOKEN": "tiny-secret"}, "fewer than 16"),
        ([], {"AGENTRL_SERVE_ENVS": "Lock-v0 Lokc-v0"}, "did you mean 'Lock-v0'"),
        (["Lock-v0"], {"AGENTRL_SERVE_HOST": "0.0.0.0"}, "there is no token"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str], variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output
    assert "tiny-secret" not in done.output


def test_a_port_that_is_taken_is_said() -> None:
    with served(["QuickTrial-v0"]) as url, pytest.raises(UserError, match="try another --port"):
        listen(Settings(envs=["QuickTrial-v0"], port=int(url.rpartition(":")[2])))


def test_a_real_connection_serves_many_requests_and_odd_ones() -> None:
    with served(["QuickTrial-v0"], max_body=4096) as url, httpx.Client(base_url=url) as client:
        session = client.post("/v1/sessions", json=wanted()).json()["session"]
        for number in range(1, 6):
            answer = client.post(f"/v1/sessions/{session}/step", json={"step": number, "action": "go"})
            assert answer.json()["step"] == number
            error_of(client.post("/v1/steps", content=iter([b"x" * 3000] * 3)), Code.TOO_LARGE)
        assert "server" not in answer.headers
        body = json.dumps({"steps": []}).encode()
        assert client.post("/v1/steps", content=body).json() == {"results": []}
