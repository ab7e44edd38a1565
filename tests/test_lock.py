"""The combination lock: its rules, rewards, splits and agents, and its table against play."""

from __future__ import annotations

import asyncio
import itertools
import random

import numpy as np
import pytest
from tables import assert_table_agrees

from agentrl import envs
from agentrl.errors import ActionError, UserError
from agentrl.policy import Policy, PolicyRequest, load_policy
from environments.lock.env import LockEnv, in_split


def entered(text: str, **kwargs: object) -> list[tuple[str, float, bool, bool]]:
    """Returns (observation, reward, terminated, success) after each symbol of `text`, on the code badcab."""
    env = LockEnv(code="badcab", **kwargs)
    env.reset(seed=0)
    steps = [env.step(symbol) for symbol in text]
    return [(observation, reward, terminated, info["success"]) for observation, reward, terminated, _, info in steps]


def test_right_symbols_open_the_lock_and_only_that_is_rewarded():
    steps = entered("badcab")
    assert [step[0] for step in steps[:2]] == ["b [a] d c a b", "b a [d] c a b"]
    assert [step[1:] for step in steps] == [(0, False, False)] * 5 + [(1, True, True)]
    assert steps[-1][0] == "b a d c a b"


@pytest.mark.parametrize(
    ("on_error", "after", "ended"),
    [
        ("back", "b [a] d c a b", False),
        ("start", "[b] a d c a b", False),
        ("stay", "b a [d] c a b", False),
        ("jam", "b a [d] c a b", True),
    ],
)
def test_a_wrong_symbol(on_error, after, ended):
    assert entered("bac", on_error=on_error)[-1] == (after, 0, ended, False)
    first = entered("a", on_error=on_error)[-1]
    assert first == ("[b] a d c a b", 0, ended, False), "nothing lies before the first place"


def test_the_shaped_reward_pays_each_place_once():
    rewards = [reward for _, reward, *_ in entered("bacadcab", reward="shaped")]
    assert rewards == pytest.approx([1 / 6, 1 / 6, 0, 0, 1 / 6, 1 / 6, 1 / 6, 1 / 6])
    assert sum(rewards) == pytest.approx(1)


def test_both_reward_parts_are_told_whatever_is_paid():
    env = LockEnv(length=1, symbols=2, code="a")
    env.reset(seed=0)
    assert env.step("b")[4]["reward_parts"] == {"progress": 0.0, "opened": 0.0}
    assert env.step("a")[4]["reward_parts"] == {"progress": 1.0, "opened": 1.0}


@pytest.mark.parametrize("text", ["A", " a\n", "a"])
def test_case_and_space_are_forgiven(text):
    assert LockEnv().parse_action(text) == "a"


@pytest.mark.parametrize("text", ["e", "ab", "a b", "", "1", "İ"])
def test_other_text_is_no_symbol_and_changes_nothing(text):
    env = LockEnv(on_error="jam", code="badcab")
    _, before = env.reset(seed=0)
    with pytest.raises(ActionError, match="a, b, c, d"):
        env.parse_action(text)
    observation, reward, terminated, _, info = env.step(text)
    assert observation.endswith("\n[b] a d c a b")
    assert (reward, terminated, info["valid_action"]) == (0, False, False)
    assert info["state_key"] == before["state_key"]


def test_a_hidden_code_is_nowhere_in_the_observation():
    env = LockEnv(hidden=True)
    observation, info = env.reset(seed=3)
    assert observation == "[?] ? ? ? ? ?"
    assert info["state_key"] == LockEnv().reset(seed=3)[0]


def test_a_given_code_is_used_in_every_episode_or_in_one():
    fixed = LockEnv(code="badcab")
    assert {fixed.reset(seed=seed)[0] for seed in range(9)} == {"[b] a d c a b"}
    assert LockEnv().reset(seed=0, options={"code": "aaaaaa"})[0] == "[a] a a a a a"
    with pytest.raises(UserError, match="code='abe'"):
        LockEnv().reset(options={"code": "abe"})


def test_training_and_test_codes_never_meet_and_make_up_all():
    drawn = {}
    for split in "train", "test":
        env = LockEnv(split=split, length=4, symbols=3)
        drawn[split] = {env.reset(seed=seed)[0] for seed in range(1500)}
    assert not drawn["train"] & drawn["test"]
    assert len(drawn["train"] | drawn["test"]) == 3**4
    codes = ["".join(code) for code in itertools.product("abcd", repeat=6)]
    assert 0.08 < np.mean([in_split(code, "test") for code in codes]) < 0.12


def test_the_split_is_the_same_on_every_machine():
    codes = map("".join, itertools.product("abcd", repeat=3))
    assert [code for code in codes if in_split(code, "test")] == ["aab", "acb", "bac", "bbb", "cad", "cbc", "ccc"]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"length": 0}, "length=0"),
        ({"length": 65}, "length=65"),
        ({"symbols": 1}, "symbols=1"),
        ({"symbols": 27}, "symbols=27"),
        ({"on_error": "explode"}, "on_error='explode'"),
        ({"split": "tset"}, "split='tset'"),
        ({"reward": "dense"}, "reward='dense'"),
        ({"code": "badge"}, "code='badge'"),
        ({"code": "badcae"}, "code='badcae'"),
        ({"length": 2, "symbols": 4, "split": "test"}, "no code of split='test'"),
        ({"code": "badcab", "split": "test"}, "code='badcab' is not in split='test'"),
    ],
)
def test_impossible_settings_are_refused_before_any_episode(kwargs, says):
    with pytest.raises(UserError, match=says):
        envs.make("Lock-v0", **kwargs)


@pytest.mark.parametrize("on_error", ["back", "start", "stay", "jam"])
@pytest.mark.parametrize("hidden", [False, True])
def test_the_table_agrees_with_play(on_error, hidden):
    env = LockEnv(on_error=on_error, hidden=hidden, length=3, symbols=2)
    assert assert_table_agrees(env, range(100)) > 150
    assert len(env.tabular().keys) == 3


def success(policy: Policy, episodes: int, **kwargs: object) -> float:
    env, opened = envs.make("Lock-v0", **kwargs), 0
    for seed in range(episodes):
        observation, info = env.reset(seed=seed)
        done, turn = False, 0
        while not done:
            request = PolicyRequest("e", turn, observation, [], info, seed=1000 * seed + turn)
            [action] = asyncio.run(policy.act([request]))
            observation, _, terminated, truncated, info = env.step(action.text)
            done, turn = terminated or truncated, turn + 1
        opened += info["success"]
    return opened / episodes


@pytest.mark.parametrize("hidden", [False, True])
def test_the_solver_never_errs(hidden):
    assert success(load_policy("lock-solver"), 30, hidden=hidden, on_error="jam", max_turns=6) == 1


@pytest.mark.parametrize("skill", [0.0, 0.36])
def test_the_noisy_solver_opens_as_often_as_the_table_says(skill):
    env = LockEnv()
    env.reset(seed=0)
    table = env.tabular()
    right = table.solved | (table.next_state > np.arange(6)[:, None])
    probability = np.where(right, skill + (1 - skill) / 4, (1 - skill) / 4)
    values = np.zeros(6)
    for _ in range(18):
        values = (probability * np.where(table.ended, table.solved, values[table.next_state])).sum(1)
    assert success(load_policy("lock-noisy-solver", skill=skill), 400) == pytest.approx(values[0], abs=0.06)


def test_agents_read_the_observation_where_there_is_no_info():
    request = PolicyRequest("e", 0, "Invalid action: answer with one letter: a, b\nb a [d] c", [], {}, seed=1)
    assert asyncio.run(load_policy("lock-solver").act([request]))[0].text == "d"
    with pytest.raises(UserError, match="skill=2"):
        load_policy("lock-noisy-solver", skill=2)


def test_the_solver_survives_random_moves_in_between():
    env = envs.make("Lock-v0", max_turns=200)
    solver, rng = load_policy("lock-solver"), random.Random(0)
    observation, info = env.reset(seed=1)
    for turn in range(200):
        request = PolicyRequest("e", turn, observation, [], info, seed=turn)
        text = rng.choice("abcd") if turn < 20 else asyncio.run(solver.act([request]))[0].text
        observation, _, terminated, _, info = env.step(text)
        if terminated:
            break
    assert info["success"]
