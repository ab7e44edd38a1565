"""OpenEnv, both ways: its stock client plays our environments, and ours plays its servers.

Tests against the real package need an interpreter that has it (it may live in a virtual environment of its own):

    python -m venv openenv && openenv/bin/pip install openenv-core
    AGENTRL_OPENENV_PYTHON=openenv/bin/python pytest tests/test_openenv.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from serve_toys import Hall, halls
from served import served
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import agentrl
from agentrl.config import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.errors import DeadlineExceeded, EnvironmentFailure, UserError
from agentrl.policy import load_policy
from agentrl.remote.errors import (
    EnvironmentCrashed,
    Finished,
    InvalidRequest,
    ServerFull,
    Unauthorized,
    UnknownEnvironment,
    Unreachable,
)
from agentrl.remote.openenv import OpenEnv, _action_key, _observation_key
from agentrl.rollout.values import stored_info
from agentrl.types import StopReason, Trajectory

TOKEN = "a-token-that-nobody-guesses"
PEER = Path(__file__).with_name("openenv_peer.py")


def theirs(url: str, env: str, **kwargs: Any) -> Any:
    """Our environment `env` at the server `url`, through OpenEnv's protocol both ways."""
    return agentrl.make(f"openenv+{url}/openenv/{env}", **{"retry_s": 0.0} | kwargs)


def transcript(trajectory: Trajectory) -> Any:
    """What an agent and a trainer see of an episode."""
    turns = [(t.observation, t.action, t.reward, t.terminated, t.truncated, t.info) for t in trajectory.turns]
    return trajectory.seed, trajectory.instructions, turns, trajectory.final_observation, trajectory.stop_reason


# Both sides ours: needs nothing


@pytest.mark.parametrize("policy", ["lock-solver", "random"])
def test_episodes_through_the_openenv_protocol_are_the_local_ones(policy: str) -> None:
    with served(["Lock-v0"]) as url:
        rollout = RolloutConfig(concurrency=3)
        remote = EnvConfig(id=f"openenv+{url}/openenv/Lock-v0", max_turns=4)
        away = agentrl.collect(load_policy(policy), remote, episodes=6, group_size=2, rollout=rollout)
        home = agentrl.collect(load_policy(policy), EnvConfig(id="Lock-v0", max_turns=4), episodes=6, group_size=2)
    played = sorted(map(transcript, away.trajectories), key=repr)
    local = sorted(map(transcript, home.trajectories), key=repr)
    if policy == "random":  # its draws depend on the trajectory's id: tasks and limits are compared
        assert {t[4] for t in played} <= {StopReason.TERMINATED, StopReason.TURN_LIMIT}
        assert [(t[0], t[1], t[2][0][0]) for t in played] == [(t[0], t[1], t[2][0][0]) for t in local]
    else:
        assert played == local


def test_a_reset_may_choose_what_a_create_request_may_and_a_limit_of_the_server_truncates() -> None:
    with served(["QuickTrial-v0", "ShortTrial-v0"]) as url:
        env = theirs(url, "QuickTrial-v0", kwargs={"size": 3}, options={"start": "well"})
        assert env.reset(seed=5)[0].startswith("size 3 draw")
        assert env.unwrapped.instructions == "Try."
        with pytest.raises(InvalidRequest, match="size"):
            env.reset(seed=5, options={"kwargs": {"size": 0}})
        with pytest.raises(InvalidRequest, match="speed"):
            env.reset(seed=5, options={"speed": 3})
        env.close()
        short = theirs(url, "ShortTrial-v0")
        short.reset(seed=0)
        assert agentrl.make(f"openenv+{url}/openenv/QuickTrial-v0", max_turns=7).spec.max_episode_steps == 7
        assert short.step("a")[2:4] == (False, False)
        assert short.step("b")[2:4] == (False, True)
        with pytest.raises(Finished):
            short.step("c")
        short.close()


def test_seeds_are_sent_and_a_reset_without_one_draws_from_the_last() -> None:
    with served(["QuickTrial-v0"]) as url:
        env = theirs(url, "QuickTrial-v0")
        first = [env.reset(seed=seed)[0] for seed in (7, None, None)]
        assert first == [env.reset(seed=seed)[0] for seed in (7, None, None)]
        assert len({*first}) == 3
        env.close()


def test_what_goes_wrong_is_typed_and_the_next_episode_is_clean() -> None:
    with served(["QuickTrial-v0"], max_sessions=1) as url:
        env = theirs(url, "QuickTrial-v0")
        env.reset(seed=0)
        with pytest.raises(EnvironmentCrashed, match="fell over"):
            env.step("crash")
        with pytest.raises(Finished):
            env.step("on")
        env.reset(seed=0)
        other = theirs(url, "QuickTrial-v0")
        with pytest.raises(ServerFull, match="all 1 sessions"):
            other.reset(seed=0)
        env.close()
        patient = theirs(url, "QuickTrial-v0", retry_s=30.0)
        patient.reset(seed=0)  # as soon as the server has seen that the other left
        other.close()
        patient.close()
        with pytest.raises(UnknownEnvironment, match="Missing-v0"):
            theirs(url, "Missing-v0")
        with pytest.raises(Finished):
            theirs(url, "QuickTrial-v0").step("before a reset")


def test_a_step_without_an_answer_in_time_is_a_deadline() -> None:
    hall = halls["openenv"] = Hall()
    with served(["Trial-v0"]) as url:
        env = theirs(url, "Trial-v0", timeout_s=20.0, kwargs={"hall": "openenv"})
        env.reset(seed=0)
        env.unwrapped._settings = env.unwrapped._settings.__class__(timeout_s=0.2)
        with pytest.raises(DeadlineExceeded, match="no answer within"):
            env.step("hang")
        hall.leave.set()


def test_a_connection_that_was_closed_between_episodes_is_opened_again() -> None:
    with served(["QuickTrial-v0"], session_ttl_s=0.3) as url:
        env = theirs(url, "QuickTrial-v0")
        first = env.reset(seed=0)
        with pytest.raises(ConnectionClosed, match="no message"):
            env.unwrapped._connection.recv(timeout=30)
        assert env.reset(seed=0) == first
        env.close()


def test_a_server_that_dies_in_mid_episode_is_a_failure_of_the_environment() -> None:
    with served(["QuickTrial-v0"]) as url:
        env = theirs(url, "QuickTrial-v0")
        env.reset(seed=0)
    with pytest.raises(EnvironmentFailure):
        env.step("on")
    with pytest.raises(Unreachable):
        env.reset(seed=0)
    with pytest.raises(Unreachable):
        theirs(url, "QuickTrial-v0")


def test_the_token_is_asked_for_in_a_header_or_as_the_password_of_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(["QuickTrial-v0"], tokens=(SecretStr(TOKEN),)) as url:
        monkeypatch.delenv("AGENTRL_TOKEN", raising=False)
        with pytest.raises(Unauthorized):
            theirs(url, "QuickTrial-v0")
        monkeypatch.setenv("AGENTRL_TOKEN", TOKEN)
        env = theirs(url, "QuickTrial-v0")
        env.reset(seed=0)
        env.close()
        assert TOKEN not in repr(env.unwrapped)
        where = url.replace("http://", "") + "/openenv/QuickTrial-v0/ws"
        with connect(f"ws://any:{TOKEN}@{where}") as socket:
            assert answer_of(socket, {"type": "state"})["type"] == "state"
        for prefix in ("", "any:wrong-token@"):
            with pytest.raises(InvalidStatus) as refused:
                connect(f"ws://{prefix}{where}")
            assert refused.value.response.status_code == 401
        assert httpx.get(f"{url}/v1/envs", auth=("any", TOKEN)).status_code == 401, "a password anywhere else"
        assert httpx.get(f"{url}/openenv/QuickTrial-v0/schema", auth=("any", TOKEN)).status_code == 200
        metrics = httpx.get(f"{url}/metrics").text
        assert 'agentrl_errors_total{code="unauthorized"} 4.0' in metrics


def answer_of(socket: Any, message: Any) -> Any:
    """Sends a message, as it is where it is text or bytes. Returns the answer."""
    socket.send(message if isinstance(message, str | bytes) else json.dumps(message))
    return json.loads(socket.recv(timeout=30))


def socket_of(url: str) -> Any:
    """A WebSocket to the quick trial at `url`."""
    return connect(f"{url.replace('http', 'ws')}/openenv/QuickTrial-v0/ws")


def test_malformed_messages_are_answered_and_harm_nothing() -> None:
    invalid = [
        "{",
        b"\xff\x00",
        "[" * 2000,
        [],
        {"type": "dance"},
        {"type": "reset", "data": []},
        {"type": "reset", "data": {"seed": "x"}},
        {"type": "step"},
        {"type": "step", "data": {"message": 3}},
        {"type": "step", "data": {"message": "on", "more": 1}},
    ]
    forbidden = [
        {"type": "reset", "data": {"kwargs": {"file": "/etc/passwd"}}},
        {"type": "reset", "data": {"wrappers": [{"name": "os:system"}]}},
    ]
    with served(["QuickTrial-v0"]) as url, socket_of(url) as socket:
        answer_of(socket, {"type": "reset", "data": {}})
        for message in (*invalid, *forbidden):
            answer = answer_of(socket, message)
            assert (answer["type"], answer["data"]["code"]) == ("error", "VALIDATION_ERROR"), message
        assert answer_of(socket, {"type": "state"})["data"]["step_count"] == 0
        assert answer_of(socket, {"type": "step", "data": {"message": "on"}})["type"] == "observation"
        metrics = httpx.get(f"{url}/metrics").text
        assert f'agentrl_errors_total{{code="invalid"}} {len(invalid)}.0' in metrics
        assert f'agentrl_errors_total{{code="forbidden"}} {len(forbidden)}.0' in metrics
        assert 'agentrl_sessions_created_total{env="QuickTrial-v0"} 1.0' in metrics


def test_an_episode_message_by_message() -> None:
    with served(["QuickTrial-v0"]) as url, socket_of(url) as socket:

        def step(message: str, **more: Any) -> Any:
            return answer_of(socket, {"type": "step", "data": {"message": message, **more}})["data"]

        assert step("on")["code"] == "SESSION_ERROR"
        begun = answer_of(socket, {"type": "reset", "data": {"seed": 1, "episode_id": "mine"}})["data"]
        assert (begun["reward"], begun["done"], begun["observation"]["instructions"]) == (None, False, "Try.")
        assert step("half \ud800", metadata={"a": 1})["observation"]["text"] == "turn 1"
        assert answer_of(socket, {"type": "state"})["data"] == {"episode_id": "mine", "step_count": 1, "seed": 1}
        assert step("picture")["observation"]["text"] == "looka squarea square"
        assert step("say")["observation"]["text"] == "half \ud800 🙂 \u2028"
        over = step("win")
        assert (over["done"], over["reward"], over["observation"]["truncated"]) == (True, 0.1, False)
        late = step("on")
        assert (late["code"], late["reason"]) == ("EXECUTION_ERROR", "finished")
        drawn = answer_of(socket, {"type": "reset", "data": {}})["data"]
        seed = answer_of(socket, {"type": "state"})["data"]["seed"]
        again = answer_of(socket, {"type": "reset", "data": {"seed": seed}})["data"]
        assert again == drawn


def test_messages_that_are_too_large_and_other_web_pages_are_turned_away(caplog: pytest.LogCaptureFixture) -> None:
    with served(["QuickTrial-v0"], max_body=2048) as url:
        with socket_of(url) as socket:
            with pytest.raises(ConnectionClosed):
                answer_of(socket, {"type": "step", "data": {"message": "x" * 4096}})
            assert socket.close_code == 1009
        with pytest.raises(InvalidStatus) as refused:
            connect(f"{url.replace('http', 'ws')}/openenv/QuickTrial-v0/ws", origin="http://elsewhere.example")
        assert refused.value.response.status_code == 403
    assert not caplog.records, "a refusal is no news for the log"


def test_messages_are_requests_for_the_rate_limit_and_idle_connections_are_closed() -> None:
    with (
        served(["QuickTrial-v0"], rate=3.0, clock=lambda: 1000.0, session_ttl_s=0.5) as url,
        socket_of(url) as socket,
    ):
        answers = [answer_of(socket, {"type": "state"}) for _ in range(3)]
        assert [answer["type"] for answer in answers] == ["state", "state", "error"]
        assert answers[2]["data"]["reason"] == "rate"
        with pytest.raises(ConnectionClosed, match="no message"):
            socket.recv(timeout=30)


def test_schema_metadata_and_health_are_told_as_openenv_tells_them() -> None:
    with served(["QuickTrial-v0"]) as url:
        base = f"{url}/openenv/QuickTrial-v0"
        schema = httpx.get(f"{base}/schema").json()
        assert schema["action"]["properties"]["message"]["type"] == "string"
        assert set(schema["observation"]["properties"]) == {"text", "instructions", "truncated", "info"}
        assert httpx.get(f"{base}/metadata").json()["name"] == "QuickTrial-v0"
        assert httpx.get(f"{base}/health").json() == {"status": "healthy"}
        assert httpx.get(f"{url}/openenv/Missing-v0/health").status_code == 404
        url.app.api.sessions.stopping = True
        assert httpx.get(f"{base}/health").status_code == 503


@pytest.mark.parametrize(
    ("env_id", "kwargs", "said"),
    [
        ("openenv+http://user:secret@localhost:1", {}, "password out of the URL"),
        ("openenv+ftp://localhost:1", {}, "is no URL"),
        ("openenv+http://localhost:1", {"token": "secret"}, "written into run files"),
        ("openenv+http://localhost:1", {"task": object()}, "travel as JSON"),
    ],
)
def test_ids_and_arguments_that_make_no_sense_are_refused(env_id: str, kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        agentrl.make(env_id, **kwargs)
    assert "secret" not in str(refused.value)


def fields(**kinds: Any) -> dict[str, Any]:
    """A schema of fields with these kinds; those in capitals are required."""
    properties = {name.lower(): {"type": kind} if isinstance(kind, str) else kind for name, kind in kinds.items()}
    return {
        "properties": {"metadata": {"type": "string"}, **properties},
        "required": [n.lower() for n in kinds if n.isupper()],
    }


@pytest.mark.parametrize(
    ("schema", "key"),
    [
        (None, "message"),
        (fields(code="string", message="string"), "message"),
        (fields(code="string", size="integer"), "code"),
        (fields(code={"anyOf": [{"type": "string"}, {"type": "null"}]}), "code"),
        (fields(CODE="string", note="string"), "code"),
    ],
)
def test_the_field_for_the_agents_text_is_found_in_the_schema(schema: Any, key: str) -> None:
    assert _action_key("http://here", schema) == key


@pytest.mark.parametrize(
    "schema", [fields(size="integer"), fields(a="string", b="string"), fields(A="string", B="string")]
)
def test_a_field_that_is_not_obvious_must_be_named(schema: Any) -> None:
    with pytest.raises(UserError, match=r"action_key names it; its actions have: (size|a, b)"):
        _action_key("http://here", schema)


def test_the_field_that_the_agent_reads_is_found_in_the_schema() -> None:
    assert _observation_key(fields(stdout="string", text="string")) == "text"
    assert _observation_key(fields(stdout="string", code="integer")) == "stdout"
    assert _observation_key(fields(stdout="string", stderr="string")) is None
    assert _observation_key(None) is None


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "websockets.sync.client", None)
    with pytest.raises(UserError, match=r"agentrl\[openenv\]"):
        agentrl.make("openenv+http://localhost:1")


def snippet(number: int) -> str:
    """Returns a Python block of docs/serving.md."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    return re.findall(r"^```python[^\n]*\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[number]


def test_the_code_of_the_page_makes_an_environment() -> None:
    with served(["QuickTrial-v0"]) as url:
        namespace: dict[str, Any] = {"agentrl": agentrl}
        exec(snippet(3).replace("http://localhost:8001", f"{url}/openenv/QuickTrial-v0"), namespace)
        assert namespace["env"].reset(seed=0)[0].startswith("size 1")
        namespace["env"].close()


# Against the real package


def openenv_python() -> str:
    """An interpreter that has `openenv`; skips where none is known."""
    if given := os.environ.get("AGENTRL_OPENENV_PYTHON"):
        return given
    if importlib.util.find_spec("openenv") is not None:
        return sys.executable
    pytest.skip("no openenv here: AGENTRL_OPENENV_PYTHON names an interpreter that has openenv-core")


@contextmanager
def peer(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """OpenEnv's side, in a process of its own."""
    command = [openenv_python(), str(PEER), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def asked(process: subprocess.Popen[str], request: Any) -> Any:
    """Has the stock client do something. Returns its result."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(request), file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


def replayed(process: subprocess.Popen[str], episode: Trajectory) -> None:
    """Plays the actions of a local episode with the stock client, and compares all that it sees."""
    result = asked(process, {"reset": {"seed": episode.seed, "episode_id": f"task {episode.seed}"}})
    shown = result["observation"]
    assert (shown["text"], shown["instructions"]) == (episode.turns[0].observation, episode.instructions)
    assert stored_info(shown["info"]) == episode.start_info
    assert (result["reward"], result["done"]) == (None, False)
    following: Sequence[Any] = [*(turn.observation for turn in episode.turns[1:]), episode.final_observation]
    for turn, observation in zip(episode.turns, following, strict=True):
        result = asked(process, {"step": {"message": turn.action}})
        shown = result["observation"]
        assert (shown["text"], result["reward"]) == (observation, turn.reward)
        assert (result["done"], shown["truncated"]) == (turn.terminated or turn.truncated, turn.truncated)
        assert stored_info(shown["info"]) == turn.info
    assert result["done"]
    assert "is over" in asked(process, {"step": {"message": "up"}})["error"]
    state = asked(process, {"state": {}})
    assert (state["episode_id"], state["step_count"]) == (f"task {episode.seed}", len(episode.turns))


def test_the_stock_client_plays_our_sokoban_as_it_is_played_locally() -> None:
    solved = agentrl.collect(load_policy("sokoban-solver"), "Sokoban-v0", episodes=2).trajectories
    wandered = agentrl.collect(lambda text: "up", EnvConfig(id="Sokoban-v0"), episodes=1, seed=3).trajectories
    assert [t.stop_reason for t in (*solved, *wandered)] == [*[StopReason.TERMINATED] * 2, StopReason.TURN_LIMIT]
    with (
        served(["Sokoban-v0"], tokens=(SecretStr(TOKEN),)) as url,
        peer("play", url.replace("http://", f"http://any:{TOKEN}@") + "/openenv/Sokoban-v0") as process,
    ):
        for episode in (*solved, *wandered):
            replayed(process, episode)
        assert "VALIDATION_ERROR" in asked(process, {"step": {"words": "up"}})["error"]


def test_the_code_of_the_page_plays_with_the_stock_client() -> None:
    with served(["Sokoban-v0"]) as url, peer("run") as process:
        said, _ = process.communicate(snippet(2).replace("http://localhost:8000", url))
    result = json.loads(said)
    assert (result["done"], result["observation"]["truncated"]) == (True, True)


def test_our_client_plays_their_stock_server() -> None:
    with peer("serve") as process:
        assert process.stdout is not None
        env_id = f"openenv+http://127.0.0.1:{process.stdout.readline().strip()}"
        env = agentrl.make(env_id, name="Ada", max_turns=2)
        base = env.unwrapped
        assert isinstance(base, OpenEnv)
        assert (base.action_key, base.observation_key) == ("said", "echo")
        assert env.reset(seed=7) == ("Ada 7", {"valid_action": True, "turn": 0})
        with pytest.raises(ServerFull, match="capacity"):
            agentrl.make(env_id, retry_s=0.0).reset(seed=0)
        assert env.step("hello") == ("hello!", 0.25, False, False, {"valid_action": True, "turn": 1})
        observation, reward, terminated, truncated, info = env.step("x" * 41)
        assert (reward, terminated, truncated, info["valid_action"]) == (0.0, False, True, False)
        assert observation.startswith("Invalid action: said:")
        assert observation.endswith("\nhello!")
        assert env.reset(seed=8, options={"name": "Bob"})[0] == "Bob 8"
        with pytest.raises(EnvironmentCrashed, match="the dragon is asleep"):
            env.step("crash")
        env.close()

        whole = agentrl.make(env_id, observation_key="turn", name="Cy")
        assert whole.reset(seed=0)[0] == "0"
        assert whole.step("hello")[4]["echo"] == "hello!"
        whole.close()
        wrong = agentrl.make(env_id, action_key="shout")
        wrong.reset(seed=0)
        with pytest.raises(InvalidRequest, match="shout"):
            wrong.step("hello")
        wrong.close()

        played = agentrl.collect(
            lambda text: "hello",
            EnvConfig(id=env_id, kwargs={"name": "Dee"}),
            episodes=4,
            group_size=2,
            rollout=RolloutConfig(concurrency=1),
            outcome=OutcomeConfig(rule="return", success_above=1.0),
        ).trajectories
        assert {(t.turns[0].observation, t.outcome, t.success, t.stop_reason) for t in played} == {
            (f"Dee {seed}", 1.5, True, StopReason.TERMINATED) for seed in (0, 1)
        }

        dying = agentrl.make(env_id, retry_s=10.0)
        dying.reset(seed=0)
        process.kill()
        process.wait()
        with pytest.raises(EnvironmentFailure, match="connection was lost"):
            dying.step("hello")
