"""Faults between client and server: killed and restarted servers, lost answers, duplicates, stuck and crashed steps.

Whatever happens on the way, an episode is played once and scored right, or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served import served
from test_remote import told
from toys import SOKOBAN, parrot, register, run_config, timeless

import agentrl
from agentrl.config import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.envs import TextEnv
from agentrl.errors import InfrastructureError
from agentrl.policy import FunctionPolicy, load_policy
from agentrl.remote import client as wire
from agentrl.remote.env import Fleet, RemoteEnv
from agentrl.remote.errors import SessionLost, TooLate, Unreachable
from agentrl.remote.servers import FAILOVER_S, Budget, Server, choose, server_at
from agentrl.rollout import Collector, Task
from agentrl.serve.app import App
from agentrl.types import StopReason

SOLVER = load_policy("sokoban-noisy-solver", skill=0.5)


class Gate(TextEnv):
    """Four steps; the second one of the task with seed `stuck` waits until `opened`."""

    opened = threading.Event()
    reached = threading.Event()
    steps: Counter[int] = Counter()

    def __init__(self, stuck: int = -1) -> None:
        super().__init__()
        self.stuck = stuck

    def begin(self, options: dict[str, Any]) -> Any:
        self.turn, self.task = 0, self.np_random_seed
        return f"task {self.task}", {}

    def parse_action(self, text: str) -> str:
        return text

    def play(self, action: str) -> Any:
        self.turn += 1
        self.steps[self.task] += 1
        if self.task == self.stuck and self.turn == 2:
            self.reached.set()
            self.opened.wait(60)
        return f"turn {self.turn}", 1.0, self.turn == 4, {"success": True}


register("RemoteGate-v0", Gate)


@pytest.fixture
def gate() -> Iterator[type[Gate]]:
    Gate.opened.clear()
    Gate.reached.clear()
    Gate.steps.clear()
    yield Gate
    Gate.opened.set()


class Flaky:
    """Stands before a server's handlers and spoils a share of all requests, in every way there is."""

    KINDS = ("refused", "played, then refused", "played, then silent", "played, then cut off", "silent")

    def __init__(self, share: float, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> None:
        self.rng, self.share, self.kinds = random.Random(seed), share, kinds
        self.done: Counter[str] = Counter()
        self.original = App._answer

    async def __call__(self, app: App, scope: Any, receive: Any, send: Any) -> None:
        kind = self.rng.choice(self.kinds) if self.rng.random() < self.share else "well"
        self.done[kind] += 1
        if kind == "well":
            await self.original(app, scope, receive, send)
            return
        if kind.startswith("played"):
            await self.original(app, scope, receive, _nowhere)
        if kind.endswith("refused"):
            await send({"type": "http.response.start", "status": self.rng.choice((500, 502, 503)), "headers": []})
            await send({"type": "http.response.body", "body": b"<html>Bad Gateway</html>"})
        elif kind.endswith("cut off"):
            headers = [(b"content-length", b"1000")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"results":[', "more_body": True})
            raise ConnectionResetError("injected")
        else:
            while (await receive())["type"] != "http.disconnect":
                pass


async def _nowhere(_: Any) -> None:
    pass


@pytest.fixture
def flaky(monkeypatch) -> Any:
    """Makes the servers of a test unreliable: ``flaky(0.2)``."""

    def spoil(share: float, **options: Any) -> Flaky:
        fault = Flaky(share, **options)

        async def answer(self: App, scope: Any, receive: Any, send: Any) -> None:
            await fault(self, scope, receive, send)

        monkeypatch.setattr(App, "_answer", answer)
        return fault

    monkeypatch.setattr(wire, "PATIENCE_S", 0.25)
    monkeypatch.setattr(wire, "MOST_PATIENCE_S", 1.0)  # some 60 attempts, so that no run of bad luck ends an episode
    return spoil


def play(env: Any, episodes: int = 24, policy: Any = SOLVER, **rollout: Any) -> Any:
    return agentrl.collect(policy, env, episodes=episodes, group_size=4, rollout=RolloutConfig(**rollout))


# Unreliable connections


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fifth_of_all_requests_spoilt_changes_nothing(flaky, seed):
    with served(["Sokoban-v0"]) as url:
        clean = play(f"{url}/Sokoban-v0")
        fault = flaky(0.2, seed=seed)
        spoilt = play(f"{url}/Sokoban-v0", concurrency=8)
        assert told(spoilt.trajectories) == told(clean.trajectories)
        assert (spoilt.retried, spoilt.failed, spoilt.counts) == (0, [], clean.counts)
        assert sum(fault.done[kind] for kind in Flaky.KINDS) >= 5, f"seed {seed}: {fault.done}"
        assert url.app.api.sessions.active == 0


@pytest.mark.parametrize("kind", Flaky.KINDS)
def test_each_kind_of_fault_alone_changes_nothing(flaky, kind):
    with served(["Echo-v0"]) as url:
        clean = play(f"{url}/Echo-v0", policy=parrot(0.5))
        fault = flaky(0.4, kinds=(kind,))
        spoilt = play(f"{url}/Echo-v0", policy=parrot(0.5), concurrency=6)
        assert told(spoilt.trajectories) == told(clean.trajectories)
        assert spoilt.retried == 0
        assert fault.done[kind] >= 2
        assert url.app.api.sessions.active == 0


def test_blocking_calls_survive_spoilt_requests(flaky):
    with served(["Sokoban-v0"]) as url:
        local, remote = agentrl.make("Sokoban-v0"), agentrl.make(f"{url}/Sokoban-v0")
        fault = flaky(0.3)
        assert remote.reset(seed=4) == local.reset(seed=4)
        for action in ("up", "down", "left", "right") * 4:
            assert remote.step(action) == local.step(action)
        remote.close()
        assert sum(fault.done.values()) > 17


def test_faults_without_end_are_failures_and_no_rewards(flaky):
    with served(["Sokoban-v0"]) as url:
        flaky(1.0, kinds=("refused",))
        env = EnvConfig(id=f"{url}/Sokoban-v0", kwargs={"retry_s": 0.5})
        with pytest.raises(InfrastructureError, match=r"environment_error.*status 50\d .*attempt"):
            play(env, 4, retries=1)


# The same step twice


def test_a_step_asked_for_twice_is_played_once(gate):
    with served(["RemoteGate-v0"]) as url:
        env = agentrl.make(f"{url}/RemoteGate-v0")
        env.reset(seed=7)
        first = env.step("a")
        env._step = 0
        assert env.step("a") == first
        assert Gate.steps[7] == 1
        assert env.step("b")[0] == "turn 2"
        env.close()


def test_a_step_that_goes_on_is_waited_for_and_not_played_again(gate, monkeypatch):
    monkeypatch.setattr(wire, "PATIENCE_S", 0.05)
    original, asked = App._answer, []

    async def count(self: App, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"].endswith("/step"):
            asked.append(scope["path"])
            if len(asked) == 3:
                Gate.opened.set()
        await original(self, scope, receive, send)

    with served(["RemoteGate-v0?stuck=7"]) as url:
        env = agentrl.make(f"{url}/RemoteGate-v0")
        env.reset(seed=7)
        env.step("a")
        monkeypatch.setattr(App, "_answer", count)
        assert env.step("b")[0] == "turn 2"
        assert len(asked) >= 3
        assert Gate.steps[7] == 2
        env.close()


# Episodes of one batch do not disturb one another


def test_a_stuck_step_holds_up_nobody_else_and_is_cut_off(gate, monkeypatch):
    monkeypatch.setattr(wire, "PATIENCE_S", 0.2)
    over: list[str] = []

    def note(trajectory: Any) -> None:
        over.append(f"{trajectory.seed} {trajectory.stop_reason.value}")
        if len(over) == 7:
            assert not Gate.opened.is_set()

    rollout = RolloutConfig(retries=0, step_deadline_s=4.0)
    with served(["RemoteGate-v0?stuck=3"]) as url:
        env = EnvConfig(id=f"{url}/RemoteGate-v0")
        policy = FunctionPolicy(lambda request: "on")
        with Collector(policy, env, rollout, OutcomeConfig(), on_episode=note) as collector:
            collected = collector.collect([Task(seed, str(seed)) for seed in range(8)])
        assert over[-1] == "3 deadline"
        assert {*over[:-1]} == {f"{seed} terminated" for seed in range(8) if seed != 3}
        (failed,) = collected.failed
        assert "no answer within 4 s" in failed.error
        assert failed.outcome == 0.0
        assert all(len(one.turns) == 4 and one.success for one in collected.trajectories)
        assert url.app.api.sessions.active == 0


def test_the_servers_own_deadline_is_a_deadline(gate):
    with served(["RemoteGate-v0?stuck=3"], step_deadline_s=0.3) as url:
        env = agentrl.make(f"{url}/RemoteGate-v0")
        env.reset(seed=3)
        env.step("a")
        with pytest.raises(TooLate, match=r"RemoteGate-v0"):
            env.step("b")
        env.close()
        collected = agentrl.collect(
            lambda text: "on", f"{url}/RemoteGate-v0", episodes=5, rollout=RolloutConfig(retries=0)
        )
        assert collected.counts == {"terminated": 4, "deadline": 1}
        assert collected.failed[0].stop_reason is StopReason.DEADLINE


def test_a_cancelled_collection_leaves_no_session(gate):
    with served(["RemoteGate-v0?stuck=3"]) as url:
        env = EnvConfig(id=f"{url}/RemoteGate-v0")

        async def cancel_when_stuck() -> None:
            with Collector(FunctionPolicy(lambda request: "on"), env, RolloutConfig(), OutcomeConfig()) as collector:
                task = asyncio.create_task(collector.collect_async([Task(seed, str(seed)) for seed in range(8)]))
                await asyncio.to_thread(Gate.reached.wait, 30)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        asyncio.run(cancel_when_stuck())
        assert url.app.api.sessions.active == 0
        assert server_at(str(url)).live == 0


def test_a_session_made_for_an_episode_that_was_given_up_is_closed(monkeypatch):
    held = threading.Event()
    original = App._answer

    async def late(self: App, scope: Any, receive: Any, send: Any) -> None:
        async def hold(message: Any) -> None:
            if scope["path"] == "/v1/sessions/batch":
                held.set()
                await asyncio.sleep(0.3)
            await send(message)

        await original(self, scope, receive, hold)

    monkeypatch.setattr(App, "_answer", late)
    with served(["Echo-v0"]) as url:

        async def give_up() -> None:
            fleet = Fleet(f"{url}/Echo-v0")
            env = fleet.episode()
            task = asyncio.create_task(env.areset(seed=0))
            await asyncio.to_thread(held.wait, 30)
            assert url.app.api.sessions.active == 1
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await fleet.settle()

        asyncio.run(give_up())
        assert url.app.api.sessions.active == 0
        assert server_at(str(url)).live == 0


# Servers that die


class Process:
    """A server in a process of its own, that can be killed."""

    def __init__(self) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "agentrl", "serve", "Sokoban-v0", "--port", str(self.port), "--rate", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait(self) -> Process:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return self
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.1)

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def restart(self) -> None:
        self.kill()
        self._start()

    @property
    def sessions(self) -> int:
        return int(httpx.get(f"{self.url}/health").json()["sessions"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    made = [Process(), Process()]
    try:
        yield [process.wait() for process in made]
    finally:
        for process in made:
            process.kill()


def at_call(number: int, act: Any) -> FunctionPolicy:
    """The noisy solver, which calls `act` before its action `number`."""
    calls = 0

    def choose_action(request: Any) -> str:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return str(SOLVER.function(request))

    return FunctionPolicy(choose_action, SOLVER.name)


@pytest.mark.slow
def test_a_killed_servers_episodes_are_played_elsewhere_and_a_restarted_one_is_used_again(processes):
    one, two = processes
    wanted = play("Sokoban-v0", 32)
    both = f"{one.url},{two.url}/Sokoban-v0"
    spread: list[tuple[int, int]] = []

    def kill() -> None:
        spread.append((one.sessions, two.sessions))
        one.kill()

    started = time.monotonic()
    collected = play(both, 32, at_call(60, kill))
    assert abs(spread[0][0] - spread[0][1]) <= 16
    assert min(spread[0]) >= 4
    assert told(collected.trajectories) == told(wanted.trajectories)
    assert collected.counts == wanted.counts
    assert collected.failed == []
    assert collected.retried >= 4
    assert time.monotonic() - started < FAILOVER_S + 50
    assert two.sessions == 0

    one._start()
    one.wait()
    server_at(one.url).down_until = 0.0
    assert told(play(both, 8).trajectories) == told(wanted.trajectories[:8])

    # The only server, killed and restarted in mid-episode.
    alone = play(f"{two.url}/Sokoban-v0", 32, at_call(60, two.restart))
    assert told(alone.trajectories) == told(wanted.trajectories)
    assert alone.counts == wanted.counts
    assert alone.retried >= 8
    assert two.sessions == 0


@pytest.mark.slow
def test_training_goes_on_when_its_server_is_killed_in_mid_episode(warm, tmp_path, trainer_of, monkeypatch):
    server, steps = Process().wait(), 0
    original = RemoteEnv.astep

    async def astep(self: RemoteEnv, action: str) -> Any:
        nonlocal steps
        steps += 1
        if steps == 12:  # of eight episodes, in the second turn
            server.restart()
        return await original(self, action)

    monkeypatch.setattr(RemoteEnv, "astep", astep)
    metrics = []
    try:
        for name, env_id in ("local", "Sokoban-v0"), ("remote", f"{server.url}/Sokoban-v0"):
            config = run_config(tmp_path / name, warm, env={**SOKOBAN, "id": env_id})
            trainer_of(config).run()
            lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            metrics.append([timeless(json.loads(line)) for line in lines])
    finally:
        server.kill()
    local, remote = metrics
    assert len(remote) == 3
    again = [line.pop("episodes_retried") for line in remote]
    assert again[0] >= 2
    assert again[1:] == [0, 0]
    assert [line.pop("episodes_retried") for line in local] == [0, 0, 0]
    for after, before in zip(remote, local, strict=True):
        numbers = {key: value for key, value in before.items() if isinstance(value, float)}
        # Episodes that are played again sit in other batches of the policy, whose log-probs differ in their last bits.
        assert {key: after.pop(key) for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5)
        assert after == {key: value for key, value in before.items() if key not in numbers}


def test_a_session_of_a_restarted_server_is_lost():
    with served(["Sokoban-v0"]) as url:
        env = agentrl.make(f"{url}/Sokoban-v0")
        env.reset(seed=0)
        url.app.api.sessions._sessions.clear()
        with pytest.raises(SessionLost, match="no session"):
            env.step("up")


def test_sessions_of_a_client_that_is_gone_are_reaped():
    now = [0.0]
    with served(["Sokoban-v0"], clock=lambda: now[0], session_ttl_s=30) as url:
        env = agentrl.make(f"{url}/Sokoban-v0")
        env.reset(seed=0)
        env._client.close()
        now[0] = 31.0
        url.app.api.sessions.sweep()
        assert url.app.api.sessions.active == 0


# What a client knows of its servers


def test_a_server_that_takes_connections_and_never_answers_is_left_to_itself(monkeypatch):
    monkeypatch.setattr("agentrl.remote.client.PATIENCE_S", 0.3)
    with served(["Sokoban-v0"]) as url, socket.create_server(("127.0.0.1", 0)) as silent:
        silent.listen(64)
        hung = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for _ in range(3):
            server_at(url).count(+1)  # the other has fewer sessions
        try:
            env = agentrl.make(f"{hung},{url}/Sokoban-v0")
            waits = []
            for seed in range(4):
                before = time.monotonic()
                env.reset(seed=seed)
                waits.append(time.monotonic() - before)
                assert env._server.url == url
            env.close()
        finally:
            for _ in range(3):
                server_at(url).count(-1)
        assert max(waits) < 5
        assert max(waits[1:]) < 0.3  # known by now


def test_a_server_that_answers_others_is_only_slow():
    server = Server("http://a:1")
    since = time.monotonic()
    server.answered()
    server.silent(since)
    assert server.up
    server.silent(time.monotonic())
    assert not server.up


def test_a_server_that_failed_is_left_alone_for_longer_each_time():
    server, other = Server("http://a:1"), Server("http://b:1")
    waits = []
    for _ in range(12):
        before = time.monotonic()
        error = Unreachable("gone")
        server.failed(error)
        waits.append(server.down_until - before)
        assert error.retry_at <= server.down_until + 1e-6
    assert waits == pytest.approx([0.1 * 2**i for i in range(7)] + [8.0] * 5, rel=0.01, abs=0.05)
    assert {choose([server, other]).url for _ in range(20)} == {"http://b:1"}
    server.answered()
    other.count(+1)
    assert choose([server, other]) is server
    server.failed(Unreachable("gone"))
    other.failed(Unreachable("gone", retry_after_s=5.0))
    assert choose([server, other]) is server


def test_a_budget_bounds_failures_from_the_first_on():
    budget = Budget(retry_s=5.0, timeout_s=100.0)
    error = Unreachable("gone")
    for _ in range(3):
        error.retry_at = time.monotonic() + 1
        budget.spend(error)
    error.retry_at = time.monotonic() + 6
    with pytest.raises(Unreachable, match=r"gone \(4 attempts"):
        budget.spend(error)
    error.retry_at = time.monotonic() + 3
    with pytest.raises(Unreachable):
        budget.spend(error, limit_s=2.0)
    with pytest.raises(Unreachable):
        Budget(retry_s=5.0, timeout_s=1.0).spend(error)
