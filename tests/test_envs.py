"""The environment contract, proved for every registered environment, and what `TextEnv` and `make` promise."""

from __future__ import annotations

import random
import warnings
from importlib.metadata import EntryPoint

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl import envs
from agentrl.envs import AnyText, TextEnv, registry
from agentrl.errors import ActionError, UnknownNameError, UserError

IDS = [
    env_id
    for env_id in envs.environment_ids()
    # Adapters and an environment that needs a judge have tests of their own; test_check_env plays all the others too.
    if "adapters" not in str(gym.registry[env_id].entry_point) and env_id != "Social-v0"
]
HOSTILE = [
    "",
    " ",
    "\0\x1b[2J\x7f",
    "a" * 1_000_000,
    "<answer>" * 50_000,
    "Action:" * 50_000,
    "\n" * 100_000,
    "上🙂\ud800",
]


def transcript(env_id: str, seed: int, turns: int = 12) -> list[object]:
    """Plays admissible actions in a fixed order and returns all that the environment answers."""
    env = envs.make(env_id)
    observation, info = env.reset(seed=seed)
    seen: list[object] = [observation, info]
    for turn in range(turns):
        actions = info.get("admissible_actions") or ["look"]
        *answer, info = env.step(actions[turn % len(actions)])
        seen += [*answer, info]
        if answer[2] or answer[3]:
            break
    return seen


class CountDown(TextEnv):
    """Say ``tick`` three times."""

    def begin(self, options):
        self.left = options.get("start", 3)
        return f"{self.left} left", {"state_key": str(self.left)}

    def parse_action(self, text):
        if text.strip() != "tick":
            raise ActionError("say tick")
        return text

    def play(self, action):
        self.left -= 1
        return f"{self.left} left", 1, self.left == 0, {"success": self.left == 0}


def test_the_registry_is_not_empty():
    assert "Sokoban-v0" in IDS
    assert all(envs.environment_ids().values()), "every environment has a summary"


@pytest.mark.parametrize("env_id", IDS)
def test_gymnasium_checker_passes(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(envs.make(env_id, render_mode="ansi").unwrapped)


@pytest.mark.parametrize("env_id", IDS)
def test_a_seed_means_one_transcript(env_id):
    assert transcript(env_id, 7) == transcript(env_id, 7)
    assert len({str(transcript(env_id, seed)[0]) for seed in range(20)}) > 10


@pytest.mark.parametrize("env_id", IDS)
def test_group_members_share_their_start(env_id):
    one, other = envs.make(env_id), envs.make(env_id)
    first = one.reset(seed=5)
    one.step("no action")
    assert one.reset(seed=5) == first == other.reset(seed=5)
    assert one.reset()[0] == other.reset()[0], "an unseeded reset goes on from the last seed"


@pytest.mark.parametrize("env_id", IDS)
def test_no_global_random_state_is_touched_or_used(env_id):
    random.seed(0)
    np.random.seed(0)
    before = random.getstate(), str(np.random.get_state())
    first = transcript(env_id, 3)
    assert (random.getstate(), str(np.random.get_state())) == before
    random.seed(99)
    np.random.seed(99)
    assert transcript(env_id, 3) == first


@pytest.mark.parametrize("env_id", IDS)
def test_info_keys_have_their_types(env_id):
    env = envs.make(env_id)
    _, first = env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step("no action at all")
    assert type(reward) is float
    assert type(terminated) is type(truncated) is bool
    for answer in first, info:
        assert type(answer["success"]) is type(answer["valid_action"]) is bool
        assert all(isinstance(action, str) for action in answer.get("admissible_actions", []))
        assert isinstance(answer.get("state_key", ""), str)
        assert all(type(part) is float for part in answer.get("reward_parts", {}).values())
    assert first["valid_action"]
    assert env.unwrapped.instructions


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_an_invalid_action_and_not_fatal(env_id, text):
    env = envs.make(env_id)
    before, first = env.reset(seed=0)
    observation, _, terminated, truncated, info = env.step(text)
    assert (terminated, truncated, info["valid_action"]) == (False, False, False)
    assert info["action_error"]
    assert len(observation) < len(before) + 500, "the agent's text is not echoed at length"
    if env_id != "Bargain-v0":  # there a round passes, whatever was said
        assert info.get("state_key") == first.get("state_key")
    with pytest.raises(ActionError):
        env.unwrapped.parse_action(text)


@pytest.mark.parametrize("env_id", IDS)
def test_any_text_can_be_stepped(env_id):
    env = envs.make(env_id, max_turns=10_000)
    env.reset(seed=1)

    @settings(max_examples=200, deadline=None, database=None)
    @given(st.text())
    def play(text):
        observation, reward, terminated, truncated, _ = env.step(text)
        assert observation in env.observation_space
        assert np.isfinite(reward)
        if terminated or truncated:
            env.reset()

    play()


@pytest.mark.parametrize("env_id", IDS)
def test_the_turn_limit_truncates_and_does_not_terminate(env_id):
    env = envs.make(env_id, max_turns=3)
    env.reset(seed=0)
    ends = [env.step("no action at all")[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]


def test_a_registered_turn_limit_is_kept_unless_overridden():
    assert envs.make("Sokoban-v0").spec.max_episode_steps == 20
    assert envs.make("Sokoban-v0", max_turns=7).spec.max_episode_steps == 7


def test_stepping_a_finished_or_unstarted_episode_is_refused():
    env = CountDown()
    with pytest.raises(UserError, match=r"CountDown.*reset"):
        env.step("tick")
    env.reset(options={"start": 1})
    assert env.step("tick")[2]
    with pytest.raises(UserError, match="after the episode ended"):
        env.step("tick")
    env.reset()
    assert not env.step("tick")[2]


def test_an_invalid_action_shows_the_last_observation_once_under_one_error_line():
    env = CountDown()
    env.reset()
    env.step("tick")
    for _ in range(2):
        observation, reward, terminated, truncated, info = env.step("tock")
        assert observation == "Invalid action: say tick\n2 left"
        assert (reward, terminated, truncated) == (0.0, False, False)
        assert info == {"success": False, "valid_action": False, "action_error": "say tick"}
    assert env.step("tick")[0] == "1 left"
    assert env.render() == "1 left"


def test_any_text_is_the_space_of_all_strings():
    space = AnyText(seed=0)
    assert "" in space
    assert "two words\n上🙂" in space
    assert 3 not in space
    assert None not in space
    samples = [space.sample() for _ in range(200)]
    assert all(sample in space for sample in samples)
    assert len(set(samples)) > 150
    assert any("\n" in sample or " " in sample for sample in samples)
    assert samples == [AnyText(seed=0).sample(), *samples[1:]]
    assert space == AnyText(max_sample_length=3)
    assert space != gym.spaces.Text(3)


@pytest.mark.parametrize("name", ["sokoban-v0", "Sokobn-v0", "Sokoban"])
def test_an_unknown_environment_gets_the_nearest_name(name):
    with pytest.raises(UnknownNameError, match=r"did you mean 'Sokoban-v0'.*agentrl envs"):
        envs.make(name)


@pytest.mark.parametrize(
    ("env_id", "kwargs", "says"),
    [
        ("Sokoban-v0", {"colour": "red"}, "Sokoban-v0.*colour"),
        ("no_such_module:Thing-v0", {}, "no_such_module"),
        ("environments.sokoban:Nothing-v0", {}, "Nothing"),
    ],
)
def test_what_cannot_be_made_is_said(env_id, kwargs, says):
    with pytest.raises(UserError, match=says):
        envs.make(env_id, **kwargs)


def test_an_environment_of_your_own_is_one_register_call():
    envs.register("CountDown-v0", CountDown, max_turns=2, summary="count down")
    try:
        env = envs.make("CountDown-v0")
        env.reset(seed=0)
        assert env.step("tick")[2:4] == (False, False)
        assert env.step("tick")[2:4] == (False, True)
        assert envs.environment_ids()["CountDown-v0"] == "count down"
    finally:
        gym.registry.pop("CountDown-v0")
        registry._OURS.pop("CountDown-v0")


def test_a_broken_plugin_is_warned_of_and_the_rest_still_loads(monkeypatch):
    group = "agentrl.environments"
    points = [
        EntryPoint("broken", "no_such_module_at_all", group),
        EntryPoint("sokoban", "environments.sokoban", group),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    registry.load_plugins.cache_clear()
    try:
        with pytest.warns(UserWarning, match="'broken' could not be loaded: ModuleNotFoundError"):
            assert "Sokoban-v0" in envs.environment_ids()
    finally:
        registry.load_plugins.cache_clear()
