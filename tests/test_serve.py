"""Served environments: sessions, batches, errors, what clients may ask for, who may ask at all."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from serve_toys import FINAL, Client, Clock, Hall, QuickTrial, Trial, client_of, entered, halls, wanted

from agentrl.envs import environment_ids, make
from agentrl.errors import UserError
from agentrl.remote.protocol import (
    MAX_ACTION,
    STATUS,
    Code,
    Created,
    EnvSpec,
    ErrorAnswer,
    Health,
    Stepped,
)
from agentrl.rollout.values import jsonable
from agentrl.serve import Settings, create_app
from agentrl.serve.catalogue import parse_env
from agentrl.serve.security import Rates
from agentrl.serve.settings import read_token_file, read_tokens

TOKEN = "a-token-that-nobody-guesses"
TOKENS = (SecretStr("another-token-of-the-file"), SecretStr(TOKEN))


def error_of(answer: Any, code: Code) -> Any:
    """The error in an answer that must have the status of `code`."""
    error = ErrorAnswer.model_validate_json(answer.content).error
    assert (error.code, answer.status_code) == (code, STATUS[code]), answer.text
    retry = answer.headers.get("retry-after")
    assert (retry is None) == (error.retry_after_s is None)
    return error


# What is played


@pytest.mark.parametrize("env", ["Lock-v0", "Sokoban-v0"])
def test_an_episode_over_http_is_the_local_one(env: str) -> None:
    async def play() -> None:
        local = make(env)
        async with client_of(env) as client:
            for seed in range(3):
                created = Created.model_validate_json(
                    (await client.post("/v1/sessions", json=wanted(env, seed))).content
                )
                observation, info = local.reset(seed=seed)
                assert (created.observation, created.info) == (observation, jsonable(info))
                assert created.instructions == local.get_wrapper_attr("instructions")
                over, number = False, 0
                while not over:
                    number += 1
                    action = info["admissible_actions"][number % 2] if number % 3 else "no such thing"
                    observation, reward, terminated, truncated, info = local.step(action)
                    answer = await client.step(created.session, number, action)
                    assert Stepped.model_validate_json(answer.content) == Stepped(
                        step=number,
                        observation=observation,
                        reward=reward,
                        terminated=terminated,
                        truncated=truncated,
                        info=jsonable(info),
                    )
                    over = terminated or truncated
                error_of(await client.step(created.session, number + 1, "up"), Code.FINISHED)
        local.close()

    asyncio.run(play())


@pytest.mark.parametrize("env", ["Trial-v0", "QuickTrial-v0"])
def test_turn_limit_options_and_values_that_json_has_no_word_for(env: str) -> None:
    async def play() -> None:
        async with client_of(env) as client:
            session = await client.create(env, max_turns=2, options={"start": "slowly"})
            first = (await client.step(session, 1, "say")).json()
            assert first["observation"] == "half \ud800 🙂 \u2028"
            assert first["info"]["inf"] == float("inf")
            assert first["info"]["array"] == [0, 1]
            assert first["info"]["tuple"] == [1, "a"]
            last = (await client.step(session, 2, "go")).json()
            assert (last["terminated"], last["truncated"]) == (False, True)
            assert last["reward"] == 0.1

    asyncio.run(play())


def test_half_a_surrogate_pair_reaches_the_environment() -> None:
    async def play() -> None:
        async with client_of() as client:
            session = await client.create()
            body = json.dumps({"step": 1, "action": "\udfff half"}).encode()
            assert (await client.post(f"/v1/sessions/{session}/step", content=body)).status_code == 200
            assert QuickTrial.played[-1] == "\udfff half"
            body = json.dumps({"steps": [{"session": session, "step": 2, "action": "\ud800"}]}).encode()
            assert (await client.post("/v1/steps", content=body)).json()["results"][0]["step"] == 2
            assert QuickTrial.played[-1] == "\ud800"

    asyncio.run(play())


@pytest.mark.parametrize("env", ["Trial-v0", "QuickTrial-v0"])
def test_a_picture_travels_once_per_answer(env: str) -> None:
    async def play() -> None:
        async with client_of(env) as client:
            session = await client.create(env)
            answer = Stepped.model_validate_json((await client.step(session, 1, "picture")).content)
            text, first, again = answer.observation
            assert text.text == "look"  # type: ignore[union-attr]
            assert base64.b64decode(first.png).startswith(b"\x89PNG")  # type: ignore[union-attr, arg-type]
            assert again.png is None  # type: ignore[union-attr]
            assert (first.path, first.alt) == (again.path, again.alt)  # type: ignore[union-attr]
            [batched] = await client.steps((session, 2, "picture"))
            assert [part.get("png") is None for part in batched["observation"]] == [True, False, True]

    asyncio.run(play())


def test_environments_are_used_again_for_equal_arguments_only() -> None:
    async def play() -> None:
        async with client_of("Trial-v0") as client:
            before = Trial.made
            first = await client.create("Trial-v0", seed=5)
            await client.delete(f"/v1/sessions/{first}")
            answer = await client.post("/v1/sessions", json=wanted("Trial-v0", 5))
            assert Trial.made == before + 1
            assert answer.json()["observation"].startswith("size 1 ")
            other = await client.post("/v1/sessions", json=wanted("Trial-v0", 5, kwargs={"size": 2}))
            assert other.json()["observation"].startswith("size 2 ")
            assert Trial.made == before + 2

    asyncio.run(play())


def test_no_more_environments_live_than_sessions_may() -> None:
    async def play() -> None:
        async with client_of("Trial-v0", max_sessions=2) as client:
            runner = client.app.api.runner
            for size in (1, 2, 3, 4):
                session = await client.create("Trial-v0", kwargs={"size": size})
                await client.delete(f"/v1/sessions/{session}")
            assert runner.free == 2

    asyncio.run(play())


# Retries


@pytest.mark.parametrize("env", ["Trial-v0", "QuickTrial-v0"])
def test_a_step_sent_again_is_answered_from_the_record(env: str) -> None:
    async def play() -> None:
        async with client_of(env) as client:
            session = await client.create(env)
            for number in (1, 2):
                first = await client.step(session, number, "go")
                played = len(Trial.played)
                again = await client.step(session, number, "go")
                [batched] = await client.steps((session, number, "go"))
                assert first.content == again.content
                assert first.json() == batched
                assert len(Trial.played) == played
            assert error_of(await client.step(session, 1, "go"), Code.WRONG_STEP).field == "step"
            last = await client.step(session, 3, "win")
            assert (await client.step(session, 3, "win")).content == last.content

    asyncio.run(play())


def test_a_create_sent_again_is_the_same_session() -> None:
    async def play() -> None:
        async with client_of() as client:
            request = wanted(kwargs={"size": 2})
            first, again = [await client.post("/v1/sessions", json=request) for _ in range(2)]
            assert first.content == again.content
            assert client.app.api.sessions.active == 1
            session = first.json()["session"]
            await client.step(session, 1, "win")
            await client.delete(f"/v1/sessions/{session}")
            late = await client.post("/v1/sessions", json=request)
            assert late.content == first.content
            assert client.app.api.sessions.active == 0
            other = await client.post("/v1/sessions", json={**request, "seed": 9})
            assert error_of(other, Code.INVALID).field == "request"

    asyncio.run(play())


def test_duplicates_of_a_call_under_way_wait_for_its_answer() -> None:
    hall = halls["twins"] = Hall()

    async def play() -> None:
        async with client_of("Trial-v0?hall=twins") as client:
            request = wanted("Trial-v0", options={"start": "hang"})
            creates = [asyncio.create_task(client.post("/v1/sessions", json=request)) for _ in range(3)]
            await entered(hall)
            hall.leave.set()
            answers = {(await task).content for task in creates}
            assert len(answers) == 1
            assert client.app.api.sessions.active == 1
            session = json.loads(answers.pop())["session"]

            hall.entered.clear()
            hall.leave.clear()
            played = len(Trial.played)
            steps = [asyncio.create_task(client.step(session, 1, "hang")) for _ in range(3)]
            await entered(hall)
            batch = asyncio.create_task(client.steps((session, 1, "hang")))
            error_of(await client.step(session, 2, "go"), Code.BUSY)
            hall.leave.set()
            assert len({(await task).content for task in steps}) == 1
            assert (await batch)[0] == (await steps[0]).json()
            assert len(Trial.played) == played + 1

    asyncio.run(play())


# Batches


def test_items_of_a_batch_have_results_of_their_own() -> None:
    async def play() -> None:
        async with client_of("QuickTrial-v0", "Trial-v0", max_sessions=3) as client:
            requests = [wanted(), wanted("Trial-v0"), wanted("Nowhere-v0"), wanted(kwargs={"size": 0}), wanted()]
            answer = await client.post("/v1/sessions/batch", json={"sessions": requests})
            results = answer.json()["results"]
            codes = [each.get("error", {}).get("code") for each in results]
            assert codes == [None, None, "unknown_env", "invalid", "capacity"]
            quick, slow = results[0]["session"], results[1]["session"]
            steps = await client.steps(
                (quick, 1, "crash"), (slow, 1, "go"), ("nobody", 1, "go"), (slow, 2, "go"), ("no-one", 3, "x")
            )
            codes = [each.get("error", {}).get("code") for each in steps]
            assert codes == ["environment_error", None, "unknown_session", "invalid", "unknown_session"]
            assert steps[3]["error"]["field"] == "steps.3.session"
            [crashed, good] = await client.steps((quick, 1, "crash"), (slow, 2, "go"))
            assert crashed == steps[0]
            assert good["step"] == 2
            closed = await client.post("/v1/close", json={"sessions": [quick, slow, slow, "nobody"]})
            assert closed.json() == {"closed": 1}
            assert (await client.steps()) == []

    asyncio.run(play())


def test_slow_environments_of_a_batch_run_side_by_side() -> None:
    names = ["side-a", "side-b"]
    for name in names:
        halls[name] = Hall()

    async def play() -> None:
        async with client_of("Trial-v0?hall=side-a", "QuickTrial-v0") as client:
            sessions = [await client.create("Trial-v0", kwargs={"hall": name}) for name in names]
            batch = asyncio.create_task(client.steps(*[(session, 1, "hang") for session in sessions]))
            for name in names:  # both are in: neither waits for the other
                await entered(halls[name])
            for name in names:
                halls[name].leave.set()
            assert [each["step"] for each in await batch] == [1, 1]

    asyncio.run(play())


def test_what_makes_a_batch_too_large_is_recorded_and_asked_for_alone() -> None:
    async def play() -> None:
        async with client_of(max_response=4096) as client:
            sessions = [await client.create() for _ in range(2)]
            results = await client.steps(*[(session, 1, "big2500") for session in sessions])
            assert "error" not in results[0]
            assert results[1]["error"]["code"] == "too_large"
            played = len(QuickTrial.played)
            alone = await client.step(sessions[1], 1, "big2500")
            assert alone.status_code == 200
            assert len(QuickTrial.played) == played
            refused = error_of(await client.step(sessions[0], 2, "big5000"), Code.INVALID)
            assert "truncate_observation" in refused.message

    asyncio.run(play())


# Errors

Scenario = Callable[[], Awaitable[None]]
SCENARIOS: dict[Code, Scenario] = {}


def provokes(code: Code) -> Callable[[Scenario], Scenario]:
    """Registers a scenario that must end in an error with `code`."""

    def add(scenario: Scenario) -> Scenario:
        SCENARIOS[code] = scenario
        return scenario

    return add


@provokes(Code.UNAUTHORIZED)
async def _() -> None:
    async with client_of(tokens=TOKENS) as client:
        answer = await client.get("/v1/envs")
        assert error_of(answer, Code.UNAUTHORIZED).message.startswith("no token")
        assert answer.headers["www-authenticate"] == "Bearer"
        for wrong in (f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer", f"{TOKEN}", "Bearer é"):
            answer = await client.post("/v1/steps", json={}, headers={"Authorization": wrong.encode()})  # type: ignore[dict-item]
            error = error_of(answer, Code.UNAUTHORIZED)
            assert TOKEN not in error.message
        for good in TOKENS:
            headers = {"Authorization": f"bearer {good.get_secret_value()}"}
            assert (await client.get("/v1/envs", headers=headers)).status_code == 200
        for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json", "/docs/swagger-ui.css"):
            assert (await client.get(path)).status_code == 200


@provokes(Code.FORBIDDEN)
async def _() -> None:
    async with client_of() as client:
        answer = await client.post("/v1/sessions", json=wanted(kwargs={"file": "/etc/passwd"}))
        assert error_of(answer, Code.FORBIDDEN).field == "kwargs.file"


@provokes(Code.UNKNOWN_ENV)
async def _() -> None:
    async with client_of() as client:
        error = error_of(await client.post("/v1/sessions", json=wanted("QuickTrail-v0")), Code.UNKNOWN_ENV)
        assert "did you mean 'QuickTrial-v0'" in error.message
        for unserved in ("Lock-v0", "os:Trial-v0", "\0"):
            error_of(await client.post("/v1/sessions", json=wanted(unserved)), Code.UNKNOWN_ENV)
        error_of(await client.get("/v1/envs/ALE/Pong-v5"), Code.UNKNOWN_ENV)


@provokes(Code.UNKNOWN_SESSION)
async def _() -> None:
    async with client_of() as client:
        error_of(await client.step("nobody", 1, "go"), Code.UNKNOWN_SESSION)
        session = await client.create()
        await client.delete(f"/v1/sessions/{session}")
        assert "closed" in error_of(await client.step(session, 1, "go"), Code.UNKNOWN_SESSION).message
        assert (await client.delete(f"/v1/sessions/{session}")).json() == {"closed": 0}


@provokes(Code.FINISHED)
async def _() -> None:
    async with client_of() as client:
        session = await client.create()
        await client.step(session, 1, "win")
        error_of(await client.step(session, 2, "go"), Code.FINISHED)
        error_of(await client.step(session, 3, "go"), Code.WRONG_STEP)


@provokes(Code.WRONG_STEP)
async def _() -> None:
    async with client_of() as client:
        session = await client.create()
        assert "not the next, 1" in error_of(await client.step(session, 2, "go"), Code.WRONG_STEP).message


@provokes(Code.BUSY)
async def _() -> None:
    hall = halls["busy"] = Hall()
    async with client_of("Trial-v0?hall=busy") as client:
        session = await client.create("Trial-v0")
        running = asyncio.create_task(client.step(session, 1, "hang"))
        await entered(hall)
        error_of(await client.step(session, 2, "go"), Code.BUSY)
        hall.leave.set()
        assert (await running).status_code == 200


@provokes(Code.TOO_LARGE)
async def _() -> None:
    async with client_of(max_body=2048) as client:
        session = await client.create()
        path = f"/v1/sessions/{session}/step"
        body = json.dumps({"step": 1, "action": "x" * 3000}).encode()
        error_of(await client.post(path, content=body), Code.TOO_LARGE)

        async def pieces() -> Any:
            for start in range(0, len(body), 100):
                yield body[start : start + 100]

        answer = await client.post(path, content=pieces())
        assert "content-length" not in answer.request.headers
        error_of(answer, Code.TOO_LARGE)
        lying = {"content-length": "10"}
        error_of(await client.post(path, content=body, headers=lying), Code.TOO_LARGE)
        assert (await client.step(session, 1, "x" * 1000)).status_code == 200


@provokes(Code.INVALID)
async def _() -> None:
    async with client_of() as client:
        session = await client.create()
        for body, field in [
            ({"step": 0, "action": "x"}, "step"),
            ({"step": "1", "action": "x"}, "step"),
            ({"step": True, "action": "x"}, "step"),
            ({"step": 1, "action": None}, "action"),
            ({"step": 1, "action": "x" * (MAX_ACTION + 1)}, "action"),
            ({"step": 1, "action": "x", "more": 1}, "more"),
            ({"step": 0, "action": "\ud800"}, "step"),
            ([], None),
        ]:
            content = json.dumps(body).encode()
            answer = await client.post(f"/v1/sessions/{session}/step", content=content)
            assert error_of(answer, Code.INVALID).field == field, body
            item = {"session": session, **body} if isinstance(body, dict) else body
            answer = await client.post("/v1/steps", content=json.dumps({"steps": [item]}).encode())
            assert error_of(answer, Code.INVALID).field == ".".join(filter(None, ("steps.0", field))), body
        for batch in ({"steps": "all"}, {"steps": [], "x": 1}, {}, {"steps": [{}] * 5000}, 7):
            error_of(await client.post("/v1/steps", json=batch), Code.INVALID)
        wrong_id = {"steps": [{"session": "a b", "step": 1, "action": ""}]}
        assert error_of(await client.post("/v1/steps", json=wrong_id), Code.INVALID).field == "steps.0.session"
        for content in (b"", b"{", b"\xff", b"[" * 100_000, b'{"step": 1' + b"0" * 5000 + b"}"):
            error_of(await client.post(f"/v1/sessions/{session}/step", content=content), Code.INVALID)
        for change, field in [
            ({"seed": -1}, "seed"),
            ({"seed": 2**63}, "seed"),
            ({"seed": 1.5}, "seed"),
            ({"request": "a b"}, "request"),
            ({"kwargs": {"env_id": "x"}}, "kwargs.env_id"),
            ({"kwargs": {"max_turns": 3}}, "kwargs.max_turns"),
            ({"wrappers": [{"name": "nothing"}]}, "wrappers.0.name"),
            ({"wrappers": [{}]}, "wrappers.0.name"),
            ({"max_turns": 0}, "max_turns"),
        ]:
            answer = await client.post("/v1/sessions", json=wanted() | change)
            assert error_of(answer, Code.INVALID).field == field, change
        refused = await client.post("/v1/sessions", json=wanted(kwargs={"size": 0}))
        assert "size=0: at least 1" in error_of(refused, Code.INVALID).message
        unknown = await client.post("/v1/sessions", json=wanted(kwargs={"colour": "red"}))
        assert "colour" in error_of(unknown, Code.INVALID).message
        assert "ask otherwise" in error_of(await client.step(session, 1, "user"), Code.INVALID).message


@provokes(Code.CAPACITY)
async def _() -> None:
    async with client_of(max_sessions=2) as client:
        first, _ = await client.create(), await client.create()
        answer = await client.post("/v1/sessions", json=wanted())
        assert error_of(answer, Code.CAPACITY).retry_after_s == 1.0
        assert answer.headers["retry-after"] == "1"
        await client.step(first, 1, "win")  # a finished episode makes room, closed or not
        await client.create()
        error_of(await client.post("/v1/sessions", json=wanted()), Code.CAPACITY)


@provokes(Code.RATE)
async def _() -> None:
    clock = Clock()
    async with client_of(rate=2.0, clock=clock) as client:
        codes = [(await client.get("/v1/envs")).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        assert error_of(await client.get("/v1/envs"), Code.RATE).retry_after_s == 0.5
        assert (await client.get("/health")).status_code == 200
        clock.now += 0.5
        assert (await client.get("/v1/envs")).status_code == 200
        error_of(await client.get("/v1/envs"), Code.RATE)


@provokes(Code.ENVIRONMENT)
async def _() -> None:
    async with client_of("QuickTrial-v0", "Trial-v0") as client:
        session = await client.create()
        error = error_of(await client.step(session, 1, "crash"), Code.ENVIRONMENT)
        assert "ValueError: fell over" in error.message
        broken = await client.post("/v1/sessions", json=wanted("Trial-v0", kwargs={"broken": True}))
        error = error_of(broken, Code.ENVIRONMENT)
        assert "made of glass" in error.message
        assert ".py:7" not in error.message


@provokes(Code.DEADLINE)
async def _() -> None:
    hall = halls["deadline"] = Hall()
    async with client_of("Trial-v0?hall=deadline", step_deadline_s=0.05) as client:
        session = await client.create("Trial-v0")
        error_of(await client.step(session, 1, "hang"), Code.DEADLINE)
        assert hall.entered.is_set()


@provokes(Code.STOPPING)
async def _() -> None:
    async with client_of() as client:
        session = await client.create()
        client.app.api.sessions.stopping = True
        error_of(await client.post("/v1/sessions", json=wanted()), Code.STOPPING)
        error_of(await client.get("/ready"), Code.STOPPING)
        assert (await client.get("/health")).json()["status"] == "stopping"
        assert (await client.step(session, 1, "go")).status_code == 200


@provokes(Code.NOT_FOUND)
async def _() -> None:
    async with client_of() as client:
        for path in ("/nowhere", "/v1", "/v1/sessions/a/b/step", "/docs/nothing.js", "/docs/..%2fapp.py"):
            error_of(await client.get(path), Code.NOT_FOUND)


@provokes(Code.METHOD)
async def _() -> None:
    async with client_of() as client:
        answer = await client.put("/v1/envs")
        error_of(answer, Code.METHOD)
        assert answer.headers["allow"] == "GET"


@pytest.mark.parametrize("code", SCENARIOS)
def test_every_error_has_its_code_status_and_message(code: Code) -> None:
    asyncio.run(SCENARIOS[code]())  # type: ignore[arg-type]


def test_no_code_of_the_protocol_is_left_out() -> None:
    assert set(SCENARIOS) == set(Code) == set(STATUS)


# What clients may ask for


@pytest.mark.parametrize(
    ("wrapper", "code"),
    [
        ({"name": "os:system"}, Code.FORBIDDEN),
        ({"name": "agentrl.envs.wrappers:Record", "path": "x"}, Code.FORBIDDEN),
        ({"name": "record", "path": "stolen.jsonl"}, Code.FORBIDDEN),
        ({"name": "truncate_observation", "limit": 0}, Code.INVALID),
        ({"name": "truncate_observation", "size": 3}, Code.INVALID),
    ],
)
def test_wrappers_go_by_name_and_touch_no_files(
    wrapper: dict[str, Any], code: Code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        async with client_of() as client:
            error_of(await client.post("/v1/sessions", json=wanted(wrappers=[wrapper])), code)
            assert client.app.api.sessions.active == 0
            good = [{"name": "truncate_observation", "limit": 4}]
            answer = await client.post("/v1/sessions", json=wanted(wrappers=good))
            assert answer.json()["observation"].startswith("size\n[")

    monkeypatch.chdir(tmp_path)
    asyncio.run(play())
    assert not list(tmp_path.iterdir())


PATHS = [
    ("WebShop-v0", {"items", "attributes", "human_goals", "reviews", "cache_dir"}),
    ("Social-v0", {"judge_url", "judge_options", "partner", "partner_options", "scenarios"}),
    ("Sokoban-v0", {"levels"}),
    ("VisualSokoban-v0", {"levels"}),
    ("TextArena-v0", {"opponent"}),
    ("PythonTool-v0", {"timeout_s", "memory_mb"}),
]


@pytest.mark.parametrize(("env", "names"), PATHS)
def test_environments_declare_arguments_that_are_the_servers_own(env: str, names: set[str]) -> None:
    from importlib import import_module

    import gymnasium as gym

    assert env in environment_ids()
    module, _, name = str(gym.registry[env].entry_point).partition(":")
    assert names <= getattr(import_module(module), name).local_arguments


def test_a_levels_file_of_the_client_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    async def play() -> None:
        async with client_of("Sokoban-v0") as client:
            answer = await client.post("/v1/sessions", json=wanted("Sokoban-v0", kwargs={"levels": str(tmp_path)}))
            assert error_of(answer, Code.FORBIDDEN).field == "kwargs.levels"

    asyncio.run(play())


def test_arguments_of_an_environment_that_says_nothing_about_them_are_refused() -> None:
    async def play() -> None:
        async with client_of("Plain-v0?size=2") as client:
            error_of(await client.post("/v1/sessions", json=wanted("Plain-v0", kwargs={"size": 3})), Code.FORBIDDEN)
            session = await client.create("Plain-v0")
            assert (await client.step(session, 1, "")).json()["terminated"]

    asyncio.run(play())


def test_a_server_can_fix_all_arguments() -> None:
    async def play() -> None:
        async with client_of("QuickTrial-v0?size=3", fixed_arguments=True) as client:
            error_of(await client.post("/v1/sessions", json=wanted(kwargs={"size": 3})), Code.FORBIDDEN)
            wrappers = [{"name": "truncate_observation"}]
            error_of(await client.post("/v1/sessions", json=wanted(wrappers=wrappers)), Code.FORBIDDEN)
            answer = await client.post("/v1/sessions", json=wanted())
            assert answer.json()["observation"].startswith("size 3 ")

    asyncio.run(play())


def test_other_web_pages_and_foreign_host_names_are_refused() -> None:
    async def play() -> None:
        async with client_of() as client:
            error_of(await client.post("/v1/steps", headers={"Origin": "https://evil.example"}), Code.FORBIDDEN)
            error_of(await client.get("/v1/envs", headers={"Host": "evil.example:8000"}), Code.FORBIDDEN)
            # A name of an attacker's may begin as an address, and be made to point here.
            rebound = {"Host": "127.evil.example:8000", "Origin": "http://127.evil.example:8000"}
            error_of(await client.get("/v1/envs", headers=rebound), Code.FORBIDDEN)
            for host in ("127.0.0.1:8000", "127.0.0.9", "localhost:1", "LOCALHOST", "[::1]:1"):
                own = {"Host": host, "Origin": f"http://{host}"}
                assert (await client.get("/v1/envs", headers=own)).status_code == 200
        async with client_of(tokens=TOKENS, token=TOKEN) as client:
            assert (await client.get("/v1/envs", headers={"Host": "envs.example"})).status_code == 200
            foreign = {"Host": "envs.example", "Origin": "https://evil.example"}
            error_of(await client.get("/v1/envs", headers=foreign), Code.FORBIDDEN)

    asyncio.run(play())


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)

    async def play() -> None:
        async with client_of(tokens=TOKENS, token=TOKENS[0].get_secret_value()) as client:
            assert (await client.get("/v1/envs")).status_code == 200

    asyncio.run(play())
    assert len(compared) == len(TOKENS)  # the first matched, and the others were compared all the same
    assert {len(digest) for pair in compared for digest in pair} == {32}


# Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "envs.example"])
def test_an_exposed_server_needs_a_token(host: str) -> None:
    with pytest.raises(UserError, match="--token-file") as caught:
        create_app(Settings(envs=["QuickTrial-v0"], host=host))
    assert "AGENTRL_SERVE_TOKEN" in str(caught.value)
    create_app(Settings(envs=["QuickTrial-v0"], host=host, tokens=TOKENS))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    create_app(Settings(envs=["QuickTrial-v0"], host=host))


def test_tokens_come_from_files_and_show_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# trainers\n{TOKEN}\n\n  second-token-of-the-file \n")
    tokens = read_token_file(file)
    assert [token.get_secret_value() for token in tokens] == [TOKEN, "second-token-of-the-file"]
    settings = Settings(envs=["QuickTrial-v0"], tokens=tokens)
    assert TOKEN not in f"{settings!r} {settings.model_dump_json()}"
    for text in ("", "# none\n", "two words here please\n", "pässwörter-sind-nicht-ascii\n"):
        with pytest.raises(UserError, match="the file"):
            read_tokens(text, "the file")
    with pytest.raises(UserError, match="cannot be read"):
        read_token_file(tmp_path / "none")
    with pytest.raises(UserError, match="fewer than 16"):
        create_app(Settings(envs=["QuickTrial-v0"], tokens=(SecretStr("short"),)))


@pytest.mark.parametrize(
    ("text", "kwargs"),
    [
        ("Lock-v0", {}),
        ("Lock-v0?", {}),
        ("Lock-v0?length=4&hidden=true", {"length": 4, "hidden": True}),
        ("Lock-v0?code=a%26b&split=train", {"code": "a&b", "split": "train"}),
        ("Lock-v0?walls=[1, 2]", {"walls": [1, 2]}),
    ],
)
def test_default_arguments_are_a_query(text: str, kwargs: dict[str, Any]) -> None:
    assert parse_env(text) == ("Lock-v0", kwargs)


@pytest.mark.parametrize(
    ("envs", "message"),
    [
        (["Sokobn-v0"], "did you mean 'Sokoban-v0'"),
        (["Lock-v0?lenth=4"], "lenth"),
        (["Lock-v0", "Lock-v0?length=4"], "named twice"),
        (["?length=4"], "names no environment"),
        (["Lock-v0?length"], "assigns nothing"),
        (["Lock-v0?max_turns=3"], "clients choose"),
        (["Sokoban-v0?size=99"], "Sokoban-v0.*size=99"),
        (["QuickTrial-v0?broken=true"], "QuickTrial-v0.*made of glass"),
    ],
)
def test_what_cannot_be_served_is_said_at_the_start(envs: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_app(Settings(envs=envs))


def test_rates_are_per_client_and_forget_the_oldest() -> None:
    clock = Clock()
    rates = Rates(1.0, clock)
    assert rates.take((0, "a")) == 0
    assert rates.take((0, "a")) == 1.0
    assert rates.take((0, "b")) == rates.take((1, "a")) == 0
    clock.now += 100
    assert rates.take((0, "a")) == 0
    assert rates.take((0, "a")) > 0  # a pause earns no more than one burst
    for number in range(11_000):
        rates.take((0, str(number)))
    assert len(rates._buckets) == 10_000


# What it tells of itself


def test_specs_say_what_an_environment_is() -> None:
    async def play() -> None:
        async with client_of("Sokoban-v0?size=7", "Trial-v0?file=/srv/secret", "SearchQA-v0?pages=200") as client:
            specs = {spec["id"]: EnvSpec.model_validate(spec) for spec in (await client.get("/v1/envs")).json()}
            sokoban = EnvSpec.model_validate_json((await client.get("/v1/envs/Sokoban-v0")).content)
            assert specs["Sokoban-v0"] == sokoban
            assert (sokoban.kwargs["size"], sokoban.max_turns, sokoban.fast) == (7, 20, True)
            assert sokoban.reward_range == (0, 1)
            assert sokoban.kwargs["reward"] == "sparse"  # a default of the environment's own
            assert sokoban.provides == {"state_keys": {}, "turn_rewards": {"reward": "shaped"}}
            assert sokoban.instructions.startswith("You are solving a Sokoban puzzle")
            assert "file" not in specs["Trial-v0"].kwargs  # files of the server are its own affair
            assert {tool["function"]["name"] for tool in specs["SearchQA-v0"].tools} >= {"search"}

    asyncio.run(play())


def test_health_metrics_and_pages() -> None:
    async def play() -> None:
        async with client_of("QuickTrial-v0", "Trial-v0") as client:
            session = await client.create("Trial-v0")
            await client.step(session, 1, "go")
            await client.step(session, 2, "crash")
            await client.create()
            await client.steps(("nobody", 1, "go"))
            health = Health.model_validate_json((await client.get("/health")).content)
            assert (health.status, health.sessions, health.envs) == ("ok", 1, ["QuickTrial-v0", "Trial-v0"])
            assert (await client.get("/ready")).status_code == 200
            answer = await client.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=")
            lines = answer.text.splitlines()
            for line in (
                "agentrl_sessions 1.0",
                'agentrl_sessions_created_total{env="Trial-v0"} 1.0',
                'agentrl_sessions_ended_total{env="Trial-v0",reason="environment_error"} 1.0',
                'agentrl_step_seconds_count{env="Trial-v0"} 2.0',
                'agentrl_errors_total{code="environment_error"} 1.0',
                'agentrl_errors_total{code="unknown_session"} 1.0',
                'agentrl_requests_total{route="/v1/sessions/{session}/step",status="500"} 1.0',
                'agentrl_requests_total{route="/v1/sessions",status="200"} 2.0',
            ):
                assert line in lines, line
            assert any(line.startswith("process_cpu_seconds_total") for line in lines)
            page = await client.get("/docs")
            assert "swagger-ui" in page.text
            assert "//cdn" not in page.text  # it loads without the internet
            for file in ("swagger-ui-bundle.js", "swagger-ui.css"):
                assert f"/docs/{file}" in page.text
                assert (await client.get(f"/docs/{file}")).status_code == 200

    asyncio.run(play())


def test_the_openapi_schema_has_every_route_model_and_error() -> None:
    async def play() -> None:
        async with client_of(tokens=TOKENS) as client:
            schema = (await client.get("/openapi.json")).json()
            assert set(schema["paths"]) == {
                "/v1/sessions",
                "/v1/sessions/batch",
                "/v1/sessions/{session}/step",
                "/v1/sessions/{session}",
                "/v1/steps",
                "/v1/close",
                "/v1/envs",
                "/v1/envs/{env}",
                "/health",
                "/ready",
            }
            models = schema["components"]["schemas"]
            assert {"CreateRequest", "StepBatch", "SessionStep", "CloseBatch", "Stepped", "ErrorAnswer"} <= set(models)
            assert models["StepRequest"]["additionalProperties"] is False
            step = schema["paths"]["/v1/sessions/{session}/step"]["post"]
            assert {"200", "401", "404", "409", "413", "422", "429", "500", "503", "504"} <= set(step["responses"])
            assert schema["security"] == [{"token": []}]
            text = json.dumps(schema)
            for model in models:
                assert text.count(f'"#/components/schemas/{model}"') >= 1, f"{model} is not referred to"

    asyncio.run(play())


def test_an_episode_ends_by_itself_after_its_last_turn() -> None:
    async def play(client: Client) -> None:
        session = await client.create()
        answers = [(await client.step(session, number, "go")).json() for number in range(1, FINAL + 1)]
        assert [answer["terminated"] for answer in answers] == [False] * (FINAL - 1) + [True]
        assert client.app.api.sessions.active == 0
        assert client.app.api.runner.free == 1

    async def run() -> None:
        async with client_of() as client:
            await play(client)

    asyncio.run(run())
