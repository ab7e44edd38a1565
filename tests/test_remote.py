"""Served environments from the client's side: the same episodes as local ones, and errors that say what to mend."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from served import served
from toys import parrot, register, run_config, timeless

import agentrl
from agentrl.config import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.envs import TextEnv
from agentrl.envs.check import check_env
from agentrl.errors import DeadlineExceeded, EnvironmentFailure, UserError
from agentrl.images import images_of, png_bytes
from agentrl.policy import FunctionPolicy, load_policy
from agentrl.remote import client as wire
from agentrl.remote import lanes
from agentrl.remote.address import Address, name_of, parse_address
from agentrl.remote.codec import content, decode
from agentrl.remote.env import Fleet, RemoteEnv
from agentrl.remote.errors import (
    EnvironmentCrashed,
    Finished,
    Forbidden,
    InvalidRequest,
    NotAServer,
    RateLimited,
    RemoteError,
    ServerFull,
    SessionLost,
    Stopping,
    TooLarge,
    TooLate,
    Unauthorized,
    UnknownEnvironment,
    Unreachable,
    WrongStep,
    error_of_answer,
)
from agentrl.remote.protocol import STATUS, Code, WireImage, WireText
from agentrl.remote.servers import server_at
from agentrl.remote.transport import HttpxTransport
from agentrl.rollout import Collector, Task
from agentrl.types import ImagePart, StopReason, TextPart

TOKEN = "a-token-that-nobody-may-read"


class Odd(TextEnv):
    """What must survive the wire: every kind of info value, half a surrogate pair, numbers to the last bit."""

    def begin(self, options: dict[str, Any]) -> Any:
        self.turn = 0
        return f"start \ud800 {options.get('word', '')}", self.facts()

    def facts(self) -> dict[str, Any]:
        draw = float(self.np_random.normal())
        odd = {"nan": float("nan"), "infinite": [float("-inf"), 1e308, 5e-324, -0.0], "draw": draw}
        return {**odd, "big": 2**70, "array": np.arange(3), "tuple": (1, "é"), 7: None, "state_key": "\udfff\u2028"}

    def parse_action(self, text: str) -> str:
        return text

    def play(self, action: str) -> Any:
        self.turn += 1
        if action == "crash":
            raise ValueError("the dragon is asleep")
        return f"{action!r} 漢\0", 0.1 * self.turn, self.turn == 3, self.facts() | {"success": True}


class Fast(Odd):
    fast = True


STAY = FunctionPolicy(lambda request: "stay")

register("RemoteOdd-v0", Odd, max_turns=5)
register("RemoteFast-v0", Fast, max_turns=5)


def told(trajectories: list[Any], env: str = "") -> str:
    """Everything that trajectories hold, but for the environment's id and wall times, in one text."""
    dumped = [one.model_dump(mode="python", exclude={"turns": {"__all__": {"timings"}}}) for one in trajectories]
    return json.dumps([{**one, "env": env} for one in dumped])


def both(env_id: str, url: str, policy: Any, episodes: int = 8, *, rollout: Any = None, **env: Any) -> list[Any]:
    """The collections of a local environment and of the served one."""
    ids = (env_id, f"{url}/{env_id}")
    return [
        agentrl.collect(policy, EnvConfig(id=one, **env), episodes=episodes, group_size=2, rollout=rollout)
        for one in ids
    ]


# Ids


@pytest.mark.parametrize(
    ("env_id", "wanted"),
    [
        ("http://a:1/X-v0", (("http://a:1",), "X-v0")),
        ("https://a/envs/X-v0", (("https://a/envs",), "X-v0")),
        ("http://a:1/X-v0,http://b:2/X-v0", (("http://a:1", "http://b:2"), "X-v0")),
        ("http://a:1,http://b:2/X-v0", (("http://a:1", "http://b:2"), "X-v0")),
        ("http://a:1/, http://b:2/X-v0", (("http://a:1", "http://b:2"), "X-v0")),
        ("http://a:1/X-v0,http://a:1/X-v0", (("http://a:1",), "X-v0")),
        ("http://a:1/X-v0/", (("http://a:1",), "X-v0")),
        ("http://[::1]:1/ALE%2FX-v0", (("http://[::1]:1",), "ALE/X-v0")),
    ],
)
def test_an_id_names_servers_and_one_environment(env_id, wanted):
    assert parse_address(env_id) == Address(*wanted)
    assert name_of(env_id) == wanted[1]


@pytest.mark.parametrize(
    ("env_id", "says"),
    [
        ("http://a:1", "names no environment"),
        ("http://a:1/X-v0,http://b:2/Y-v0", "'X-v0' and 'Y-v0'"),
        ("http://a:1/X-v0,http://b:2", "names no environment"),
        ("ftp://a/X-v0", "is no URL"),
        ("http:///X-v0", "is no URL"),
        ("http://a:1/of mine/X-v0", "is no URL"),
        ("http://a:1/é/X-v0", "is no URL"),
        ("http://a:port/X-v0", "is no URL"),
        ("http://a:1/X-v0?size=3", "give arguments as keywords"),
    ],
)
def test_an_id_that_is_no_environment_says_how_to_write_one(env_id, says):
    with pytest.raises(UserError, match=says):
        agentrl.make(env_id)


def test_a_token_never_stands_in_an_id_or_among_the_arguments():
    with pytest.raises(UserError, match="AGENTRL_TOKEN") as told:
        agentrl.make(f"http://user:{TOKEN}@a:1/X-v0")
    assert TOKEN not in str(told.value)
    with pytest.raises(UserError, match="environment variable") as told:
        agentrl.make("http://a:1/X-v0", token=TOKEN)
    assert TOKEN not in str(told.value)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="timeout_s above 0"):
        Fleet("http://a:1/X-v0", timeout_s=0)
    with pytest.raises(UserError, match="travel as JSON"):
        Fleet("http://a:1/X-v0", size=object())
    with pytest.raises(UserError, match=r"'NO_SUCH_TOKEN' .* is not set"):
        Fleet("http://a:1/X-v0", token_env="NO_SUCH_TOKEN")
    with pytest.raises(UserError, match="options travel as JSON"):
        Fleet("http://a:1/X-v0").request(0, {"board": {1}})


def test_a_token_file_of_the_servers_will_do(monkeypatch, tmp_path):
    file = tmp_path / "tokens"
    monkeypatch.setenv("MINE_FILE", str(file))
    file.write_text(f"# since May\n\n{TOKEN}\nanother-token-of-before\n")
    fleet = Fleet("http://a:1/X-v0", token_env="MINE")
    assert fleet.settings.headers["authorization"] == f"Bearer {TOKEN}"
    for held in (b"", b"# nothing\n", b"\xff\xfe\x00"):
        file.write_bytes(held)
        with pytest.raises(UserError, match="MINE_FILE"):
            Fleet("http://a:1/X-v0", token_env="MINE")


def test_a_token_with_control_characters_goes_into_no_header(monkeypatch):
    monkeypatch.setenv("AGENTRL_TOKEN", f"{TOKEN}\n")
    assert Fleet("http://a:1/X-v0").settings.headers["authorization"] == f"Bearer {TOKEN}"
    monkeypatch.setenv("AGENTRL_TOKEN", f"{TOKEN}\r\nX-Other: 1")
    with pytest.raises(UserError, match="printable ASCII") as told:
        Fleet("http://a:1/X-v0")
    assert TOKEN not in str(told.value)


# The same episodes


@pytest.fixture(scope="module")
def url():
    visual = "VisualSokoban-v0?show=both"
    with served(["Sokoban-v0", "Lock-v0", "Bargain-v0", visual, "RemoteOdd-v0", "RemoteFast-v0", "Echo-v0"]) as base:
        yield base


@pytest.mark.parametrize(
    ("env_id", "agent"),
    [("Sokoban-v0", "naive"), ("Lock-v0", "naive"), ("Bargain-v0", "naive"), ("Bargain-v0", "random")],
)
def test_transcripts_equal_local_ones_byte_for_byte(url, env_id, agent):
    from agentrl.envs.registry import scripted_agents

    name, options = scripted_agents(f"{url}/{env_id}")[agent]
    local, remote = both(env_id, url, load_policy(name, **options))
    assert told(remote.trajectories) == told(local.trajectories)
    assert (remote.counts, remote.retried, remote.failed) == (local.counts, 0, [])
    assert remote.trajectories[0].env == f"{url}/{env_id}"
    assert url.app.api.sessions.active == 0


def test_arguments_turn_limit_and_wrappers_travel(url):
    env = {
        "kwargs": {"size": 6, "max_solution": 3, "observation": "cells"},
        "max_turns": 4,
        "wrappers": [{"name": "invalid_action_penalty", "penalty": 0.5}, {"name": "truncate_observation", "limit": 9}],
    }
    local, remote = both("Sokoban-v0", url, load_policy("random"), **env)
    assert told(remote.trajectories) == told(local.trajectories)
    assert max(len(one.turns) for one in remote.trajectories) == 4
    assert any("left out" in turn.observation for one in remote.trajectories for turn in one.turns)


def test_transcripts_of_a_web_shop_equal_local_ones():
    env = {"kwargs": {"products": 200}}
    with served(["WebShop-v0?products=200"]) as base:
        local = agentrl.collect(load_policy("webshop-naive"), EnvConfig(id="WebShop-v0", **env), episodes=4)
        remote = agentrl.collect(load_policy("webshop-naive"), f"{base}/WebShop-v0", episodes=4)
        assert told([one.model_copy(update={"task": {}}) for one in remote.trajectories]) == told(
            [one.model_copy(update={"task": {}}) for one in local.trajectories]
        )
        assert base.app.api.sessions.active == 0


@pytest.mark.parametrize("show", ["image", "both"])
def test_pictures_arrive_pixel_for_pixel(url, show):
    local, remote = both("VisualSokoban-v0", url, load_policy("random"), 4, kwargs={"show": show}, max_turns=5)
    assert told(remote.trajectories) == told(local.trajectories)
    seen = 0
    for ours, theirs in zip(remote.trajectories, local.trajectories, strict=True):
        for turn, other in zip(ours.turns, theirs.turns, strict=True):
            pairs = zip(images_of(turn.observation), images_of(other.observation), strict=True)
            assert all(png_bytes(a) == png_bytes(b) for a, b in pairs)
            seen += len(images_of(turn.observation))
    assert seen >= 20


@pytest.mark.parametrize("env_id", ["RemoteOdd-v0", "RemoteFast-v0"])
def test_odd_values_survive_the_wire(url, env_id):
    policy = FunctionPolicy(lambda request: ['\ud800 "\\', "\0\n", "x" * 10_000][request.turn])
    local, remote = both(env_id, url, policy)
    assert told(remote.trajectories) == told(local.trajectories)
    assert "\ud800" in remote.trajectories[0].turns[0].observation
    assert str(remote.trajectories[0].start_info["nan"]) == "nan"


def test_reset_options_travel(url):
    tasks = [Task(3, "a", options={"word": "hello"})]
    with Collector(STAY, EnvConfig(id=f"{url}/RemoteOdd-v0"), RolloutConfig(), OutcomeConfig()) as one:
        (trajectory,) = one.collect(tasks).trajectories
    assert "hello" in str(trajectory.turns[0].observation)


def test_blocking_calls_play_the_same_episode(url):
    with_url = [agentrl.make(f"{url}/Sokoban-v0", size=6), agentrl.make("Sokoban-v0", size=6)]
    transcripts = []
    for env in with_url:
        transcript: list[Any] = [env.reset(seed=5), env.get_wrapper_attr("instructions")]
        while True:
            transcript.append(env.step("up"))
            if transcript[-1][2] or transcript[-1][3]:
                break
        env.close()
        transcripts.append(transcript)
    assert transcripts[0] == transcripts[1]
    assert url.app.api.sessions.active == 0


def test_a_reset_without_a_seed_follows_the_last_seed(url):
    env = agentrl.make(f"{url}/Sokoban-v0")
    starts = []
    for _ in range(2):
        env.reset(seed=1)
        starts.append([env.reset()[0] for _ in range(3)])
    env.close()
    assert starts[0] == starts[1]
    assert len({*starts[0]}) > 1


def test_threads_and_processes_play_served_environments_too(url):
    env = EnvConfig(id=f"{url}/Lock-v0")
    policy = load_policy("lock-noisy-solver", skill=0.5)
    wanted = told(agentrl.collect(policy, "Lock-v0", episodes=4).trajectories)
    for executor in ("async", "thread", "process"):
        rollout = RolloutConfig(executor=executor, workers=2)
        assert told(agentrl.collect(policy, env, episodes=4, rollout=rollout).trajectories) == wanted
    assert url.app.api.sessions.active == 0


def test_only_served_environments_are_awaited():
    with pytest.raises(UserError, match="for served environments"):
        agentrl.collect(lambda text: "up", "Sokoban-v0", rollout=RolloutConfig(executor="async"))


@pytest.mark.parametrize("env_id", ["Sokoban-v0", "Lock-v0"])
def test_check_env_passes_over_http_as_locally(url, env_id):
    names = [(c.name, c.passed) for c in check_env(env_id, seeds=(0, 1), actions=60).checks]
    report = check_env(f"{url}/{env_id}", seeds=(0, 1), actions=60)
    assert [(c.name, c.passed) for c in report.checks] == names
    assert report.passed, str(report)
    assert "expert solved 2 of 2" in str(report)
    assert url.app.api.sessions.active == 0


def test_a_served_environment_says_what_the_local_one_does(url):
    remote, local = agentrl.make(f"{url}/Sokoban-v0", reward="shaped"), agentrl.make("Sokoban-v0", reward="shaped")
    assert isinstance(remote, RemoteEnv)
    for name in ("provides", "single_task", "instructions", "reward", "hard"):
        assert getattr(remote, name) == getattr(local.unwrapped, name)
    assert remote.spec.max_episode_steps == local.spec.max_episode_steps
    assert agentrl.make(f"{url}/Sokoban-v0", max_turns=7).spec.max_episode_steps == 7
    assert (remote.observation_space, remote.action_space) == (local.observation_space, local.action_space)
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = remote.colour


def test_training_gives_the_metrics_of_local_environments(url, tmp_path, hesitant, trainer_of):
    metrics = []
    for name, env_id in ("local", "Echo-v0"), ("remote", f"{url}/Echo-v0"):
        config = run_config(tmp_path / name, hesitant, iterations=2, env={"id": env_id})
        trainer_of(config).run()
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        metrics.append([timeless(json.loads(line)) for line in lines])
    assert len(metrics[0]) >= 2
    assert _steady(metrics[1]) == _steady(metrics[0])


def _steady(value: Any) -> Any:
    """`value` without measurements of speed and memory."""
    moving = ("second", "time", "memory", "speed", "rss", "mb")
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if not any(word in key for word in moving)}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def snippet(number: int) -> str:
    """Returns a Python block of docs/serving.md."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
    return re.findall(r"^```python[^\n]*\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[number]


def test_the_code_of_the_page_runs(url):
    namespace: dict[str, Any] = {}
    exec(snippet(0), namespace)
    assert namespace["app"].api.settings.max_sessions == 100
    exec(snippet(1).replace("http://localhost:8000", url), namespace)
    assert len(namespace["played"].trajectories) == 64
    namespace["env"].close()


# One request for many


def test_steps_of_one_tick_travel_in_one_request(url):
    before = dict(url.app.api.metrics.requests)
    collected = agentrl.collect(parrot(1.0), f"{url}/Echo-v0", episodes=64, group_size=4)
    asked = {
        route: count - before.get((route, status), 0)
        for (route, status), count in url.app.api.metrics.requests.items()
        if count != before.get((route, status), 0)
    }
    assert collected.counts == {"terminated": 64}
    assert asked["/v1/sessions/batch"] == 1
    assert asked["/v1/steps"] == 2
    assert asked["/v1/close"] <= 2
    assert not any("{session}" in route for route in asked)


def test_an_action_that_no_server_takes_harms_only_its_own_episode(url):
    def agent(request: Any) -> str:
        return "x" * 1_000_001 if request.episode.split("/")[1] == "1" else "fine"

    collected = agentrl.collect(
        FunctionPolicy(agent), f"{url}/RemoteFast-v0", episodes=4, rollout=RolloutConfig(retries=0)
    )
    (failed,) = collected.failed
    assert (failed.seed, failed.stop_reason) == (1, StopReason.ENVIRONMENT_ERROR)
    assert "1,000,001 characters; at most 1,000,000" in failed.error
    assert collected.counts == {"terminated": 3, "environment_error": 1}


def test_large_batches_are_divided(url, monkeypatch):
    monkeypatch.setattr(lanes, "BATCH", 5)
    monkeypatch.setattr(lanes, "MAX_BYTES", 400)
    collected = agentrl.collect(parrot(1.0), f"{url}/Echo-v0", episodes=32)
    assert collected.counts == {"terminated": 32}
    assert all(one.success for one in collected.trajectories)


def test_a_batch_that_is_too_large_is_asked_for_in_parts():
    with served(["RemoteFast-v0"], max_body=20_000, max_response=8_000) as base:
        policy = FunctionPolicy(lambda request: "y" * 3_000)
        collected = agentrl.collect(policy, f"{base}/RemoteFast-v0", episodes=16)
        assert collected.counts == {"terminated": 16}
        assert [turn.reward for turn in collected.trajectories[7].turns] == [0.1, 0.2, 0.1 * 3]


# Errors


def answer(code: Code, **more: Any) -> dict[str, Any]:
    return {"error": {"code": code, "message": "because of the dragon", "field": None, "retry_after_s": None, **more}}


@pytest.mark.parametrize(
    ("code", "kind", "family"),
    [
        (Code.UNAUTHORIZED, Unauthorized, UserError),
        (Code.FORBIDDEN, Forbidden, UserError),
        (Code.UNKNOWN_ENV, UnknownEnvironment, UserError),
        (Code.NOT_FOUND, NotAServer, UserError),
        (Code.UNKNOWN_SESSION, SessionLost, EnvironmentFailure),
        (Code.FINISHED, Finished, UserError),
        (Code.WRONG_STEP, WrongStep, EnvironmentFailure),
        (Code.TOO_LARGE, TooLarge, UserError),
        (Code.INVALID, InvalidRequest, UserError),
        (Code.CAPACITY, ServerFull, EnvironmentFailure),
        (Code.RATE, RateLimited, EnvironmentFailure),
        (Code.ENVIRONMENT, EnvironmentCrashed, EnvironmentFailure),
        (Code.STOPPING, Stopping, EnvironmentFailure),
        (Code.DEADLINE, TooLate, DeadlineExceeded),
    ],
)
def test_every_code_is_an_exception_with_the_servers_message(code, kind, family):
    error = error_of_answer("http://a:1", STATUS[code], {}, answer(code, field="kwargs.size"))
    assert type(error) is kind
    assert isinstance(error, family)
    assert isinstance(error, RemoteError)
    assert str(error) == "http://a:1: because of the dragon (field kwargs.size)"
    assert (error.code, error.status, error.field) == (code, STATUS[code], "kwargs.size")
    assert error.again(" (twice)").field == "kwargs.size"


def test_every_code_has_an_exception():
    for code in Code:
        error = error_of_answer("http://a:1", STATUS[code], {"retry-after": "7"}, answer(code))
        assert str(error) == "http://a:1: because of the dragon"
        assert (error.status, error.retry_after_s) == (STATUS[code], 7.0)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, Unauthorized), (403, Forbidden), (404, NotAServer), (413, TooLarge), (429, Unreachable), (502, Unreachable)],
)
@pytest.mark.parametrize("body", [None, [], "no", {"error": "no"}, {"error": {"code": "unheard_of", "message": "x"}}])
def test_answers_of_something_else_are_judged_by_their_status(status, kind, body):
    error = error_of_answer("http://a:1", status, {}, body)
    assert type(error) is kind
    assert str(status) in str(error)


def test_bad_input_comes_back_as_a_typed_error(url):
    with pytest.raises(UnknownEnvironment, match="did you mean 'Sokoban-v0'"):
        agentrl.make(f"{url}/Sokobn-v0")
    with pytest.raises(NotAServer, match="/nowhere"):
        agentrl.make(f"{url}/nowhere/Sokoban-v0")
    with pytest.raises(InvalidRequest, match="size") as told:
        agentrl.make(f"{url}/Sokoban-v0", size=-3).reset(seed=0)
    assert told.value.status == 422
    with pytest.raises(InvalidRequest) as told:
        agentrl.make(f"{url}/Sokoban-v0", max_turns=0).reset(seed=0)
    assert told.value.field == "max_turns"
    with pytest.raises(Forbidden, match="code of the client's choice"):
        agentrl.make(f"{url}/Sokoban-v0", wrappers=[{"name": "os:System"}]).reset(seed=0)
    with pytest.raises(UserError, match="size"):
        agentrl.collect(lambda text: "up", EnvConfig(id=f"{url}/Sokoban-v0", kwargs={"size": -3}))


def test_a_step_after_the_end_is_refused_here_and_there(url):
    env = agentrl.make(f"{url}/RemoteFast-v0")
    with pytest.raises(Finished, match="call reset"):
        env.step("before the first reset")
    env.reset(seed=0)
    while not env.step("on")[2]:
        pass
    with pytest.raises(Finished, match="call reset"):
        env.step("on")
    env._over = False  # the server's own word
    with pytest.raises(Finished, match="is over") as told:
        env.step("on")
    assert told.value.status == 409
    env.close()


def test_a_crash_on_the_server_is_an_environment_failure(url):
    env = agentrl.make(f"{url}/RemoteFast-v0")
    env.reset(seed=0)
    with pytest.raises(EnvironmentCrashed, match="the dragon is asleep") as told:
        env.step("crash")
    assert "Traceback" not in str(told.value)
    env.close()


def test_a_full_server_says_how_to_make_room():
    with served(["Sokoban-v0"], max_sessions=1) as base:
        first, second = (agentrl.make(f"{base}/Sokoban-v0", retry_s=0) for _ in range(2))
        first.reset(seed=0)
        with pytest.raises(ServerFull, match=r"sessions are taken.*lower rollout\.concurrency") as told:
            second.reset(seed=0)
        assert told.value.retry_after_s > 0
        assert told.value.status == 429
        first.close()
        second.reset(seed=0)
        second.close()


def test_a_wrong_token_is_refused_and_the_right_one_is_never_seen(monkeypatch, caplog, capfd, tmp_path):
    from pydantic import SecretStr

    from agentrl.buffer import write_jsonl

    caplog.set_level(logging.DEBUG)
    with served(["Sokoban-v0"], tokens=(SecretStr(TOKEN),)) as base:
        with pytest.raises(Unauthorized) as told:
            agentrl.make(f"{base}/Sokoban-v0")
        assert told.value.status == 401
        monkeypatch.setenv("OTHER", "not-the-right-token")
        with pytest.raises(Unauthorized) as told:
            agentrl.make(f"{base}/Sokoban-v0", token_env="OTHER")
        assert "not-the-right-token" not in str(told.value)
        monkeypatch.setenv("AGENTRL_TOKEN", TOKEN)
        env = agentrl.make(f"{base}/Sokoban-v0")
        env.reset(seed=0)
        collected = agentrl.collect(load_policy("random"), f"{base}/Sokoban-v0", episodes=2)
        write_jsonl(tmp_path / "played.jsonl", collected.trajectories)
        env.close()
        shown = [repr(env), str(env), repr(env.fleet), repr(env.fleet.settings), repr(env.fleet.description)]
    out, err = capfd.readouterr()
    written = (tmp_path / "played.jsonl").read_text()
    assert "Sokoban" in written
    for text in (*shown, caplog.text, out, err, written):
        assert TOKEN not in text


def test_nobody_there_is_a_failure_that_names_the_server():
    with pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:9: .*attempt"):
        agentrl.make("http://127.0.0.1:9/Sokoban-v0", retry_s=0.2)


# Against answers that no server of ours gives


def fake(monkeypatch, handler):
    """Has every blocking request answered by `handler`."""

    def made(url, headers):
        made_of = HttpxTransport(url, headers)
        made_of._http = httpx.Client(headers=headers, transport=httpx.MockTransport(handler))
        return made_of

    monkeypatch.setattr(wire, "transport", made)


CREATED = {"session": "s1", "observation": "go", "info": {}, "instructions": ""}
STEPPED = {"step": 1, "observation": "on", "reward": 0.0, "terminated": False, "truncated": False, "info": {}}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"[" * 100_000,
        b"[]",
        b"{}",
        json.dumps(STEPPED | {"step": 2}).encode(),
        json.dumps(CREATED).encode(),
    ],
)
def test_an_answer_outside_the_protocol_is_never_played(monkeypatch, body):
    def handler(request):
        if request.url.path == "/v1/sessions":
            return httpx.Response(200, json=CREATED)
        return httpx.Response(200, content=body)

    fake(monkeypatch, handler)
    env = Fleet("http://fake-1/X-v0", retry_s=0).episode()
    env.reset(seed=0)
    with pytest.raises(Unreachable, match="http://fake-1: answered"):
        env.step("up")


def test_a_retry_repeats_the_request_to_the_letter(monkeypatch):
    seen = []

    def handler(request):
        seen.append((request.url.path, request.content))
        if len(seen) % 3:
            return httpx.Response(503, headers={"retry-after": "0"})
        return httpx.Response(200, json=CREATED if "step" not in request.url.path else STEPPED)

    fake(monkeypatch, handler)
    env = Fleet("http://fake-2/X-v0").episode()
    env.reset(seed=0)
    env.step("up")
    assert len(seen) == 6
    assert len({*seen[:3]}) == len({*seen[3:]}) == 1
    assert len(json.loads(seen[0][1])["request"]) == 32
    env.reset(seed=0)
    creates = [json.loads(body)["request"] for path, body in seen if path == "/v1/sessions"]
    assert len({*creates}) == 2


def test_new_sessions_go_where_the_fewest_are(monkeypatch):
    fake(monkeypatch, lambda request: httpx.Response(200, json=CREATED))
    fleet = Fleet("http://fake-3,http://fake-4,http://fake-5/X-v0")
    envs = [fleet.episode() for _ in range(9)]
    for env in envs:
        env.reset(seed=0)
    assert [server.live for server in fleet.servers] == [3, 3, 3]
    for env in envs:
        env.close()
    assert [server.live for server in fleet.servers] == [0, 0, 0]


def test_a_server_that_refuses_does_not_count_the_session(monkeypatch):
    fake(monkeypatch, lambda request: httpx.Response(422, json=answer(Code.INVALID)))
    env = Fleet("http://fake-6/X-v0").episode()
    with pytest.raises(InvalidRequest):
        env.reset(seed=0)
    assert server_at("http://fake-6").live == 0


@pytest.mark.parametrize(
    "path", ["../../etc/passwd", "images/../x.png", "/images/" + "0" * 32 + ".png", "images/x.png"]
)
def test_a_picture_is_no_way_out_of_the_folder(path):
    with pytest.raises(Unreachable, match="which is none"):
        content("http://a:1", [WireImage(path=path, png="iVBORw0KGgo=")])


def test_pixels_that_stand_once_belong_to_all_pictures_of_an_answer():
    path = f"images/{'0' * 32}.png"
    image: dict[str, Any] = {"type": "image", "path": path, "alt": "", "png": "iVBORw0KGgo="}
    later = {**image, "png": None}
    body = json.dumps({"results": [{"observation": [later, {"type": "text", "text": "x"}]}, {"observation": [image]}]})
    for result in decode(body.encode())["results"]:
        assert result["observation"][0]["png"] == image["png"]
    parts = content("http://a:1", [WireText(text="x"), WireImage(**image)])
    assert parts == [TextPart(text="x"), ImagePart(path=path)]
    with pytest.raises(Unreachable, match="which is none"):
        content("http://a:1", [WireImage(**later)])


def test_importing_the_package_loads_no_http():
    import subprocess
    import sys

    code = "import sys, agentrl.envs, agentrl.rollout; print('httpx' in sys.modules, 'fastapi' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.split() == ["False", "False"]


def test_the_command_line_shows_served_environments_and_what_is_wrong(url, monkeypatch):
    from typer.testing import CliRunner

    from agentrl.cli import app

    monkeypatch.setenv("COLUMNS", "80")
    runner = CliRunner()
    shown = runner.invoke(app, ["envs", f"{url}/Lock-v0"])
    assert shown.exit_code == 0, shown.output
    assert "length=" in shown.output
    assert "expert: lock-solver" in shown.output
    played = runner.invoke(app, ["eval", f"{url}/Lock-v0", "--policy", "random", "--episodes", "4"])
    assert played.exit_code == 0, played.output
    refused = runner.invoke(app, ["check-env", f"{url}/Lok-v0"])
    assert refused.exit_code == 2
    assert "did you mean 'Lock-v0'?" in refused.output
    gone = runner.invoke(app, ["check-env", "http://127.0.0.1:9/Lock-v0", "--env-arg", "retry_s=0"])
    assert gone.exit_code == 2
    assert "http://127.0.0.1:9: " in gone.output
    assert "Traceback" not in gone.output
