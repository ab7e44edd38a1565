"""Episodes without the event loop are the same episodes: trajectories, failures, numbers."""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import pytest
from toys import register

from agentrl.config import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.envs import TextEnv
from agentrl.errors import ActionError, InfrastructureError, UserError
from agentrl.policy import FunctionPolicy, Policy, PolicyAction, PolicyRequest, load_policy
from agentrl.rollout import Collector, Summary, Task, summarise
from agentrl.rollout.direct import DirectEpisode
from agentrl.types import StopReason, Trajectory


class Words(TextEnv):
    """Three turns; trouble by seed: 1 raises in reset, 2 in step, 3 pays NaN, 4 pays text, 5 exits."""

    fast = True
    instructions = "Say something."

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        self.kind, self.turn = options.get("kind", 0), 0
        if self.kind == 1:
            raise RuntimeError("no board")
        return f"start {self.np_random.integers(100)}", {"admissible_actions": ["a"], "parts": {"x": (1, 2)}}

    def parse_action(self, text: str) -> str:
        if text == "?":
            raise ActionError("a word")
        return text

    def play(self, action: str) -> Any:
        self.turn += 1
        if self.turn == 2 and self.kind == 2:
            raise RuntimeError("cable cut")
        if self.turn == 2 and self.kind == 5:
            raise SystemExit(3)
        reward: Any = {3: float("nan"), 4: "much"}.get(self.kind, 0.5)
        return f"{action} {self.turn}", reward, self.turn == 3, {"success": action != "b", "state_key": str(self.turn)}

    def step(self, action: str) -> Any:
        if self.kind not in (3, 4):
            return super().step(action)
        observation, reward, terminated, info = self.play(action)
        return observation, reward, terminated, False, info


@pytest.fixture(autouse=True)
def words() -> Iterator[None]:
    register("Words-v0", Words, max_turns=5)
    register("Short-v0", Words, max_turns=2)
    yield
    gym.registry.pop("Words-v0")
    gym.registry.pop("Short-v0")


class Detour(FunctionPolicy):
    """The same function through the event loop: a policy of its own kind is never called directly."""

    async def act(self, requests: Any) -> list[PolicyAction]:
        return await super().act(requests)


def say(request: PolicyRequest) -> str:
    if request.turn == 1 and request.seed % 3 == 0:
        return "?"
    past = [message.content for message in request.messages]
    return random.Random(f"{request.seed} {past}").choice(["a", "b"])


async def say_later(request: PolicyRequest) -> str:
    return say(request)


def play(policy: Policy, tasks: list[Task], env: str = "Words-v0", **settings: Any) -> tuple[Any, list[Summary]]:
    summaries: list[Summary] = []
    rollout = RolloutConfig(retries=1, **settings)
    with Collector(policy, EnvConfig(id=env), rollout, OutcomeConfig(), on_summary=summaries.append) as collector:
        return collector.collect(tasks, seed=7), sorted(summaries, key=lambda one: (one.task, one.member))


def plain(trajectory: Trajectory) -> dict[str, Any]:
    """A trajectory without what the clock says."""
    dumped = trajectory.model_dump()
    for turn in dumped["turns"]:
        assert turn.pop("timings").keys() == {"policy", "environment"}
    return dumped


TASKS = [Task(i, f"g{i}", 3, options={"kind": i}) for i in range(6)]


@pytest.mark.parametrize("history", ["full", "window(1)"])
@pytest.mark.parametrize("env", ["Words-v0", "Short-v0"])
def test_direct_episodes_are_those_of_the_event_loop(env: str, history: str, monkeypatch: pytest.MonkeyPatch) -> None:
    direct: list[bool] = []
    real = DirectEpisode.play_now
    monkeypatch.setattr(DirectEpisode, "play_now", lambda self: (direct.append(self._record), real(self))[1])
    ours, counted = play(FunctionPolicy(say), TASKS, env, history=history)
    assert all(direct)
    assert len(direct) == 18 + ours.retried
    direct.clear()
    theirs, also_counted = play(Detour(say, "say"), TASKS, env, history=history)
    assert not direct
    for name in ("trajectories", "failed"):
        assert [plain(one) for one in getattr(ours, name)] == [plain(one) for one in getattr(theirs, name)]
    assert (ours.counts, ours.retried) == (theirs.counts, theirs.retried)
    for mine, other in zip(counted, also_counted, strict=True):
        mine.seconds = other.seconds = 0.0
        assert mine == other
    assert {one.stop_reason for one in counted} >= {StopReason.ENVIRONMENT_ERROR}


def test_functions_given_by_name_are_called_directly_and_async_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    direct: list[DirectEpisode] = []
    real = DirectEpisode.play_now
    monkeypatch.setattr(DirectEpisode, "play_now", lambda self: (direct.append(self), real(self))[1])
    ours, _ = play(load_policy(f"{__name__}:say"), TASKS)
    assert len(direct) == 18 + ours.retried
    theirs, _ = play(load_policy(f"{__name__}:say_later"), TASKS)
    assert len(direct) == 18 + ours.retried
    said = [[[turn.action for turn in one.turns] for one in played.trajectories] for played in (ours, theirs)]
    assert said[0] == said[1]


def test_requests_that_a_policy_keeps_stay_those_of_their_episode() -> None:
    kept: list[PolicyRequest] = []

    def keep(request: PolicyRequest) -> str:
        kept.append(request)
        return say(request)

    def told() -> list[Any]:
        return [(one.episode, one.turn, one.seed, list(one.messages)) for one in kept]

    tasks = [Task(i, f"g{i}") for i in range(6)]
    with Collector(FunctionPolicy(keep), EnvConfig(id="Words-v0"), RolloutConfig(), OutcomeConfig()) as collector:
        collector.collect(tasks, seed=7)
        recorded = told()
        kept.clear()
        collector.collect(tasks, seed=7, keep=False)
        assert told() == recorded
        assert len({episode for episode, *_ in recorded}) >= 6


def test_every_episode_is_released_under_its_own_key() -> None:
    released: list[str] = []

    class Told(FunctionPolicy):
        def release(self, episode: str) -> None:
            released.append(episode)

    policy = Told(lambda _: "b", "told", reads="observation")
    with Collector(policy, EnvConfig(id="Words-v0"), RolloutConfig(), OutcomeConfig()) as collector:
        collected = collector.collect([Task(i, f"g{i}") for i in range(6)], keep=False)
    assert len(set(released)) == len(released) == 6 + collected.retried


def test_each_episode_counts_its_own_time() -> None:
    """Where nothing is kept, an episode takes over the object of the one before."""
    tasks = [Task(i, f"g{i}") for i in range(200)]
    summaries: list[Summary] = []
    with Collector(
        FunctionPolicy(say), EnvConfig(id="Words-v0"), RolloutConfig(), OutcomeConfig(), on_summary=summaries.append
    ) as collector:
        seconds = collector.collect(tasks, seed=7, keep=False).seconds
    assert seconds["policy"] + seconds["environment"] <= seconds["total"]
    assert sum(one.seconds for one in summaries) <= seconds["total"]


def test_summaries_without_trajectories_are_those_with_them() -> None:
    summaries: list[Summary] = []
    tasks = [Task(i, f"g{i}", 2) for i in range(8)]
    with Collector(
        FunctionPolicy(say),
        EnvConfig(id="Words-v0"),
        RolloutConfig(),
        OutcomeConfig(rule="return"),
        on_summary=summaries.append,
    ) as collector:
        collected = collector.collect(tasks, seed=7, keep=False)
        assert collected.trajectories == []
        assert sum(collected.counts.values()) == 16
        kept = collector.collect(tasks, seed=7)
    from_trajectories = [summarise(one, i // 2, i % 2) for i, one in enumerate(kept.trajectories)]
    for one in (*summaries, *from_trajectories):
        one.seconds = 0.0
    assert summaries[:16] == from_trajectories
    assert any(one.invalid for one in from_trajectories)


def test_functions_that_fail_or_answer_nonsense_are_policy_errors() -> None:
    def fails(observation: str) -> str:
        if observation.startswith("start"):
            return "a"
        raise ValueError("out of ideas")

    with pytest.raises(InfrastructureError, match="turn 1 of episode g/0: ValueError: out of ideas") as told:
        play(FunctionPolicy(fails, reads="observation"), [Task(0, "g")])
    assert "no running event loop" not in "".join(traceback.format_exception(told.value))
    nonsense: Any = lambda observation: 3  # noqa: E731
    with pytest.raises(InfrastructureError, match=r"answered 3 \(int\); an action is text"):
        play(FunctionPolicy(nonsense, "nonsense", reads="observation"), [Task(0, "g")])

    def refuses(observation: str) -> str:
        raise UserError("wrong environment")

    with pytest.raises(UserError, match="wrong environment"):
        play(FunctionPolicy(refuses, reads="observation"), [Task(0, "g")])


def test_deadlines_hold_for_direct_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("agentrl.rollout.direct.perf_counter", lambda: now[0])

    def slow(observation: str) -> str:
        now[0] += 1.0
        return "a"

    with pytest.raises(InfrastructureError, match=r"did not end within 2.5 s; after 2 turns"):
        play(FunctionPolicy(slow, reads="observation"), [Task(0, "g")], episode_deadline_s=2.5)
    real = Words.play
    monkeypatch.setattr(Words, "play", lambda self, action: (now.__setitem__(0, now[0] + 1.0), real(self, action))[1])
    with pytest.raises(InfrastructureError, match=r"step of episode g/0 \(seed 0, turn 0\): no answer within 0.5 s"):
        play(FunctionPolicy(lambda _: "a", reads="observation"), [Task(0, "g")], step_deadline_s=0.5)


def test_messages_of_a_request_are_made_when_they_are_read_and_stay_what_they_were() -> None:
    seen: list[PolicyRequest] = []

    def keep(request: PolicyRequest) -> str:
        seen.append(request)
        return "a"

    collected, _ = play(FunctionPolicy(keep), [Task(0, "g")])
    turns = collected.trajectories[0].turns
    roles = [[message.role for message in request.messages] for request in seen]
    assert roles == [["system", *["user", "assistant"] * turn, "user"] for turn in range(3)]
    assert seen[2].messages[1].content == turns[0].observation
    assert seen[2].messages[-1].content == turns[2].observation
    assert list(seen[0].messages[-1:]) == list(seen[0].messages)[-1:]


def test_members_that_are_skipped_leave_the_others_their_numbers_and_seeds() -> None:
    whole, _ = play(FunctionPolicy(say), [Task(0, "g", 4)])
    part, counted = play(FunctionPolicy(say), [Task(0, "g", 4, skip=frozenset({0, 2}))])
    assert [one.id for one in part.trajectories] == ["g/1", "g/3"]
    assert [plain(one) for one in part.trajectories] == [plain(whole.trajectories[i]) for i in (1, 3)]
    assert [one.member for one in counted] == [1, 3]
