"""Wrappers: what each changes, what it leaves, by class, by name, and in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import toys

from agentrl import envs
from agentrl.buffer import read_jsonl
from agentrl.config import EnvConfig, RolloutConfig
from agentrl.config.load import checked
from agentrl.envs import TextEnv
from agentrl.envs.wrappers import WRAPPERS, InvalidActionPenalty, Record, RewardParts, TextWrapper, TruncateObservation
from agentrl.errors import ActionError, UserError
from agentrl.policy import FunctionPolicy
from agentrl.rollout import collect
from agentrl.types import ImagePart, StopReason, TextPart, Turn

CODE = {"code": "badcab"}


class Parrot(TextEnv):
    """Shows what it is told to: the action's text, or a list of parts; "no" is no action."""

    def begin(self, options: dict[str, Any]) -> Any:
        return options.get("show", "start"), {}

    def parse_action(self, text: str) -> str:
        if text == "no":
            raise ActionError("no")
        return text

    def play(self, action: str) -> Any:
        return action, 1.0, False, {"odd": {1, 2}}


class Doubled(TextWrapper):
    """A wrapper of a third party."""

    def step(self, action: str) -> Any:
        observation, reward, *rest = self.env.step(action)
        return observation, 2 * float(reward), *rest


def lock(*wrappers: dict[str, Any], **kwargs: Any) -> gym.Env[Any, Any]:
    env = envs.make("Lock-v0", wrappers=wrappers, **CODE, **kwargs)
    env.reset(seed=0)
    return env


def test_an_invalid_action_costs_the_penalty_and_nothing_else_does() -> None:
    env = lock({"name": "invalid_action_penalty", "penalty": 0.25}, reward="shaped")
    *_, info = answer = env.step("nonsense")
    assert answer[1] == -0.25
    assert info["reward_parts"] == {"progress": 0.0, "opened": 0.0, "invalid_action": -0.25}
    *_, info = answer = env.step("b")
    assert answer[1] == pytest.approx(1 / 6)
    assert info["reward_parts"]["invalid_action"] == 0


@pytest.mark.parametrize("length", [9, 10, 11, 1000])
def test_a_long_observation_is_cut_with_a_notice(length: int) -> None:
    env = TruncateObservation(Parrot(), limit=10)
    assert env.reset()[0] == "start"
    text = "abcdefghij" * (length // 10) + "xyzabcdef"[: length % 10]
    wanted = text if length <= 10 else f"{text[:10]}\n[{length - 10} more characters left out]"
    assert env.step(text)[0] == wanted
    assert env.reset(options={"show": text})[0] == wanted


def test_text_parts_share_the_limit_and_images_stay() -> None:
    env, image = TruncateObservation(Parrot(), limit=4), ImagePart(path="a.png")
    parts = [TextPart(text="abc"), image, TextPart(text="defg"), TextPart(text="hij")]
    shown = env.reset(options={"show": parts})[0]
    assert shown == [TextPart(text="abc"), image, TextPart(text="d"), TextPart(text="\n[6 more characters left out]")]
    assert env.reset(options={"show": parts[:2]})[0] == parts[:2]


def test_reward_parts_are_weighed() -> None:
    env = lock({"name": "reward_parts", "weights": {"progress": 3, "opened": 10}})
    rewards = [env.step(symbol)[1] for symbol in "bzadcab"]
    assert rewards == pytest.approx([0.5, 0, 0.5, 0.5, 0.5, 0.5, 10.5])


def test_a_turn_without_parts_is_worth_nothing_and_an_unknown_part_is_named() -> None:
    bare = RewardParts(Parrot(), {"a": 1.0})
    bare.reset()
    assert bare.step("go")[1] == 0
    with pytest.raises(UserError, match="no part 'progres'; the environment's are opened, progress"):
        lock({"name": "reward_parts", "weights": {"progres": 1}}).step("b")


def test_a_penalty_can_be_weighed_by_reward_parts_outside_it() -> None:
    weights = {"opened": 1, "invalid_action": 2}
    env = lock({"name": "invalid_action_penalty", "penalty": 0.5}, {"name": "reward_parts", "weights": weights})
    assert env.step("nonsense")[1] == -1
    assert env.step("b")[1] == 0


def test_recorded_episodes_read_back(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    env = envs.make("Lock-v0", max_turns=7, **CODE, wrappers=[{"name": "record", "path": str(path)}])
    for seed, text in ((5, "badcab"), (6, "\ud800bbbbbb"), (7, "ba")):
        first, _ = env.reset(seed=seed, options={"note": seed})
        for symbol in text:
            env.step(symbol)
    env.close()
    opened, failed, broken_off = read_jsonl(path)
    assert [e.stop_reason for e in (opened, failed, broken_off)] == [
        StopReason.TERMINATED,
        StopReason.TURN_LIMIT,
        StopReason.CANCELLED,
    ]
    assert [(e.success, e.outcome, len(e.turns)) for e in (opened, failed, broken_off)] == [
        (True, 1.0, 6),
        (False, 0.0, 7),
        (False, 0.0, 2),
    ]
    assert (opened.env, opened.seed, opened.task) == ("Lock-v0", 5, {"options": {"note": 5}})
    assert opened.instructions == env.unwrapped.instructions  # type: ignore[attr-defined]
    assert opened.turns[0].observation == first == "[b] a d c a b"
    assert opened.turns[1].observation == "b [a] d c a b"
    assert opened.final_observation == "b a d c a b"
    assert failed.turns[0].action == "\ud800"
    assert "admissible_actions" not in opened.turns[0].info
    assert opened.turns[0].info["state_key"] == "b [a] d c a b"


def test_recording_appends_and_leaves_out_what_json_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "episodes.jsonl"
    for _ in range(2):
        env = Record(Parrot(), path)
        env.reset()
        env.step("go")
        env.close()
    episodes = read_jsonl(path)
    assert [episode.turns for episode in episodes] == [
        [Turn(observation="start", action="go", reward=1.0, info={"success": False, "valid_action": True})]
    ] * 2
    assert episodes[0].metadata == {"seeded": False}


@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_what_is_asked_of_an_environment_is_answered_through_every_wrapper(name: str, tmp_path: Path) -> None:
    options = {"record": {"path": str(tmp_path / "x")}, "reward_parts": {"weights": {"opened": 1}}}.get(name, {})
    env: Any = lock({"name": name, **options}, {"name": "truncate_observation"})
    assert env.instructions == env.unwrapped.instructions
    assert env.provides == env.unwrapped.provides
    assert env.fast is True
    assert env.spec.id == "Lock-v0"
    assert env.get_wrapper_attr("instructions") == env.unwrapped.instructions
    plain: Any = TruncateObservation(gym.make("CartPole-v1"))
    assert (plain.instructions, plain.provides, plain.fast) == ("", {}, False)


def test_wrappers_lie_around_each_other_in_the_order_given() -> None:
    third = {"name": f"{__name__}:Doubled"}
    penalty = {"name": "invalid_action_penalty", "penalty": 1}
    assert lock(penalty, third).step("?")[1] == -2
    assert lock(third, penalty).step("?")[1] == -1


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"limit": 3}, "has no name; known: invalid_action_penalty, record"),
        ({"name": "truncate_observations"}, "did you mean 'truncate_observation'"),
        ({"name": "truncate_observation", "size": 3}, "cannot be made with {'size': 3}"),
        ({"name": "truncate_observation", "limit": 0}, "limit=0"),
        ({"name": "invalid_action_penalty", "penalty": -1}, "penalty=-1"),
        ({"name": "reward_parts", "weights": {}}, "weights is empty"),
        ({"name": "record", "path": "no/such/folder/x.jsonl"}, "no folder no/such/folder"),
        ({"name": "no_such_module:Wrapper"}, "no_such_module"),
        ({"name": "agentrl.envs.wrappers:Nothing"}, "Nothing"),
    ],
)
def test_a_wrapper_that_cannot_be_made_is_refused(entry: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        envs.make("Lock-v0", wrappers=[entry])


@pytest.mark.parametrize("executor", ["inline", "thread", "process"])
def test_a_run_wraps_its_environments(executor: str) -> None:
    wrappers = [{"name": "truncate_observation", "limit": 3}, {"name": "invalid_action_penalty", "penalty": 0.5}]
    config = checked(EnvConfig, {"id": "Lock-v0", "max_turns": 2, "wrappers": wrappers})
    rollout = RolloutConfig(executor=executor)  # type: ignore[arg-type]
    played = collect(FunctionPolicy(lambda request: "?"), config, episodes=2, rollout=rollout)
    for episode in played.trajectories:
        assert [turn.reward for turn in episode.turns] == [-0.5, -0.5]
        assert str(episode.turns[0].observation).endswith("\n[10 more characters left out]")
        assert episode.instructions


def test_a_penalty_needs_the_environments_word_that_an_action_was_none() -> None:
    env = InvalidActionPenalty(toys.Echo())
    env.reset(seed=0)
    assert env.step("not a word")[1] == -0.1
