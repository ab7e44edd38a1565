"""Adapters of other packages' environments, and a plain Gymnasium environment with text spaces."""

from __future__ import annotations

import importlib.util
import itertools
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import agentrl
from agentrl import envs
from agentrl.config import OutcomeConfig
from agentrl.envs.registry import scripted_agents
from agentrl.errors import UserError
from agentrl.policy import load_policy
from environments.adapters.base import BorrowedRandom, choose
from environments.adapters.scorer import _WORKER

HOSTILE = [
    "",
    " \n",
    "\x00\x1b[2J",
    "9**9**9",
    "[[[",
    "[9" + "9" * 5000 + "]",
    "漢🙂\ud800",
    "<|im_end|>",
    "a " * 50_000,
]

PACKAGES = {
    "TextWorldExpress-v0": ("textworld_express", "textworld-express"),
    "TextArena-v0": ("textarena", "textarena"),
    "ReasoningGym-v0": ("reasoning_gym", "reasoning-gym"),
    "BabyAI-v0": ("minigrid", "minigrid"),
    "ScienceWorld-v0": ("scienceworld", "scienceworld"),
}
JAVA = {"TextWorldExpress-v0", "ScienceWorld-v0"}

CASES = {
    "twx": ("TextWorldExpress-v0", {"game": "coin", "game_params": {"numLocations": 4}}),
    "tictactoe": ("TextArena-v0", {"game": "TicTacToe-v0"}),
    "frozenlake": ("TextArena-v0", {"game": "FrozenLake-v0-random"}),
    "chain_sum": ("ReasoningGym-v0", {"dataset": "chain_sum"}),
    "pool_matrix": ("ReasoningGym-v0", {"dataset": "pool_matrix", "attempts": 2}),
    "babyai": ("BabyAI-v0", {"level": "BabyAI-GoToLocal-v0"}),
    "scienceworld": ("ScienceWorld-v0", {"task": "find-plant"}),
}
SLOW = {"scienceworld"}


def cases(*wanted: str) -> list[Any]:
    """Returns the parameters of a test over `wanted` (all); those that take seconds at each reset are marked."""
    return [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in wanted or CASES]


def skip_without(env_id: str) -> None:
    module, extra = PACKAGES[env_id]
    pytest.importorskip(module, reason=f"pip install 'agentrl[{extra}]'")
    if env_id in JAVA and shutil.which("java") is None:
        pytest.skip("needs a Java runtime: apt-get install default-jre-headless")


@pytest.fixture(scope="module")
def made() -> Iterator[Callable[[str], gym.Env[Any, Any]]]:
    """One instance of each case for all tests: a Java VM takes a second to start."""
    kept: dict[str, gym.Env[Any, Any]] = {}

    def get(case: str) -> gym.Env[Any, Any]:
        env_id, kwargs = CASES[case]
        skip_without(env_id)
        if case not in kept:
            kept[case] = envs.make(env_id, **kwargs)
        return kept[case]

    yield get
    for env in kept.values():
        env.close()


def played(env: gym.Env[Any, Any], seed: int, turns: int = 6) -> list[Any]:
    """Returns instructions and the transcript of admissible actions drawn from `seed` ("5" where none are listed)."""
    observation, info = env.reset(seed=seed)
    transcript: list[Any] = [env.get_wrapper_attr("instructions"), observation, info]
    rng = random.Random(0)
    for _ in range(turns):
        step = env.step(rng.choice(info.get("admissible_actions") or ["5"]))
        transcript.append(step)
        info = step[4]
        if step[2] or step[3]:
            break
    return transcript


@pytest.mark.parametrize("case", cases())
def test_a_seed_is_a_transcript_and_another_seed_another(case, made):
    env = made(case)
    assert played(env, 3) == played(env, 3)
    assert len({str(played(env, seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("case", cases())
def test_hostile_actions_survive_and_the_global_generators_are_as_before(case, made):
    env = made(case)
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), repr(np.random.get_state())
    env.reset(seed=0)
    for action in HOSTILE:
        observation, reward, terminated, truncated, info = env.step(action)
        assert isinstance(observation, str)
        assert len(observation) < 20_000, "hostile text comes back"
        assert np.isfinite(reward)
        assert not info["success"]
        if terminated or truncated:
            with pytest.raises(UserError, match="reset"):
                env.unwrapped.step("x")
            env.reset(seed=1)
    assert (random.getstate(), repr(np.random.get_state())) == before


@pytest.mark.parametrize("case", cases())
def test_a_pickled_adapter_plays_the_same_episode(case, made):
    env = made(case).unwrapped
    env.reset(seed=1)
    copy = pickle.loads(pickle.dumps(env))
    try:
        assert played(copy, 3) == played(env, 3)
    finally:
        copy.close()


@pytest.mark.parametrize("case", cases(*(case for case in CASES if "expert" in scripted_agents(CASES[case][0]))))
def test_experts_succeed_and_the_last_turn_says_so(case, made):
    env, agent = made(case), scripted_agents(CASES[case][0])["expert"]
    policy = load_policy(agent.policy, **agent.options)
    for seed in range(3):
        observation, info = env.reset(seed=seed)
        assert not info["success"]
        for turn in itertools.count():
            request = agentrl.policy.PolicyRequest("e", turn, observation, [], info, seed=turn)
            observation, _, terminated, truncated, info = env.step(policy.function(request))
            assert info["valid_action"]
            if terminated or truncated:
                break
            assert not info["success"]
        assert (terminated, info["success"]) == (True, True), (seed, observation)


@pytest.mark.parametrize("case", cases(*(case for case in CASES if CASES[case][0] in JAVA)))
def test_close_ends_the_java_process(case):
    env_id, kwargs = CASES[case]
    skip_without(env_id)
    env = envs.make(env_id, **kwargs).unwrapped
    env.reset(seed=0)
    process = env._java._gateway.java_process
    assert process.poll() is None
    env.close()
    assert process.returncode is not None
    assert env.reset(seed=0)[1]["success"] is False, "a closed adapter starts again when it is reset"
    env.close()


@pytest.mark.parametrize("env_id", PACKAGES)
def test_a_missing_package_is_named_with_the_pip_command(env_id, monkeypatch):
    module, extra = PACKAGES[env_id]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install 'agentrl\[{extra}\]'"):
        envs.make(env_id)


def test_a_missing_java_is_said(monkeypatch):
    skip_without("TextWorldExpress-v0")
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(UserError, match=r"runs on Java.*default-jre-headless"):
        envs.make("TextWorldExpress-v0")


def test_listing_imports_no_package():
    found = [module for module, _ in PACKAGES.values() if importlib.util.find_spec(module)]
    code = (
        "import sys; from agentrl.envs import environment_ids; ids = environment_ids(); "
        f"assert {set(PACKAGES)!r} <= set(ids), ids; print(*set({found!r}) & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_actions_are_chosen_whatever_their_case_and_frame():
    assert choose(" Action:  Move   EAST \n", ["look around", "move east"]) == "move east"


def test_borrowed_generators_go_on_where_they_were():
    one, other = BorrowedRandom(1), BorrowedRandom(1)
    with one.lend():
        first = random.random(), np.random.random()
        second = random.random(), np.random.random()
    with other.lend():
        assert (random.random(), np.random.random()) == first
    with other.lend():
        assert (random.random(), np.random.random()) == second


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"game": "coins"}, "game='coins'"),
        ({"fold": "tra"}, "fold='tra'"),
        ({"game_params": {"numLocation": 3}}, "numLocation"),
    ],
)
def test_textworld_express_refuses(kwargs, message):
    skip_without("TextWorldExpress-v0")
    with pytest.raises(UserError, match=message):
        envs.make("TextWorldExpress-v0", **kwargs).reset(seed=0)


def test_textworld_express_ends_at_a_mistake_without_success(made):
    skip_without("TextWorldExpress-v0")
    env = envs.make("TextWorldExpress-v0", game="simonsays", view="full")
    observation, info = env.reset(seed=0)
    wrong = next(action for action in info["admissible_actions"] if action != info["expert_action"])
    assert "Possible actions: " in observation
    assert info["admissible_actions"] == sorted(info["admissible_actions"])
    _, reward, terminated, _, info = env.step(wrong)
    assert (reward, terminated, info["success"]) == (-1, True, False)
    env.close()


def test_textarena_plays_the_other_seat_and_tells_who_won(made):
    env = made("tictactoe")
    results = {}
    for seed in range(12):
        steps = played(env, seed, turns=9)
        results[steps[-1][1]] = steps[-1][4]["success"]
        assert all(step[1] == 0 for step in steps[3:-1]), "the reward comes at the end"
        assert "[Player 1]" in steps[3][0]
    assert results.keys() >= {1.0, -1.0}
    assert [results[reward] for reward in (1.0, -1.0)] == [True, False]


def test_textarena_opponents(made):
    skip_without("TextArena-v0")
    seen = []

    def stubborn(text: str) -> str:
        seen.append(text)
        return next(f"[{cell}]" for cell in (8, 7, 6, 5) if f"'[{cell}]'" in text.rpartition("Available")[2])

    env = envs.make("TextArena-v0", game="TicTacToe-v0", opponent=stubborn, player=1)
    observation, _ = env.reset(seed=0)
    assert "[Player 0] [8]" in observation, "seat 0 moves first"
    assert "You are Player 1" in env.get_wrapper_attr("instructions")
    env.step("0")
    assert "You are Player 0" in seen[0]
    assert seen[1].startswith(seen[0])
    with pytest.raises(UserError, match="does not list its moves"):
        envs.make("TextArena-v0", game="Nim-v0").reset(seed=0)
    with pytest.raises(UserError, match="no game 'TicTacTo-v0'; did you mean"):
        envs.make("TextArena-v0", game="TicTacTo-v0")
    with pytest.raises(UserError, match="players=3"):
        envs.make("TextArena-v0", game="LiarsDice-v0")


def test_textarena_invalid_moves_are_flagged_and_the_second_loses(made):
    env = made("tictactoe")
    env.reset(seed=0)
    _, _, terminated, _, info = env.step("[11]")
    assert (terminated, info["valid_action"]) == (False, False)
    assert len(info["admissible_actions"]) == 9
    _, reward, terminated, _, info = env.step("[11]")
    assert (reward, terminated, info["valid_action"], info["success"]) == (-1, True, False, False)


def test_reasoning_gym_scores_the_last_tagged_answer(made):
    env = made("chain_sum")
    question, info = env.reset(seed=0)
    right = info["expert_action"]
    assert eval(question.rpartition(":")[2].strip(" =.")) == int(right)
    for text, good in [
        (right, True),
        (f"<answer>0</answer> no: <answer> {right} </answer>", True),
        (f"{right} <answer>x</answer>", False),
        ("", False),
    ]:
        env.reset(seed=0)
        _, reward, terminated, _, info = env.step(text)
        assert (reward == 1, terminated, info["success"]) == (good, True, good)
    assert info["valid_action"] is False, "the empty answer"


def test_reasoning_gym_splits_never_share_an_item():
    skip_without("ReasoningGym-v0")
    items = {}
    for split in ("train", "test"):
        env = envs.make("ReasoningGym-v0", split=split, size=50)
        items[split] = {env.reset(seed=seed)[1]["item"] for seed in range(100)}
    assert items["test"] == {0, 10, 20, 30, 40}
    assert not items["train"] & items["test"]


def test_reasoning_gym_answers_that_are_code_neither_hang_nor_act(tmp_path):
    skip_without("ReasoningGym-v0")
    target = tmp_path / "written"
    env = envs.make("ReasoningGym-v0", dataset="n_queens", scoring_s=1.5)
    for code in (f"open({str(target)!r}, 'w')", f"__import__('os').system('touch {target}')"):
        env.reset(seed=0)
        _, reward, terminated, _, info = env.step(code)
        assert (reward, terminated, info["success"]) == (0, True, False)
    assert not target.exists()
    pid = _WORKER.pid
    assert pid is not None
    env.close()
    assert _WORKER.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step("9**9**9")
    assert (reward, terminated, info["success"]) == (0, True, False)
    assert "no score within" in info["scoring_error"]
    assert _WORKER.pid is None, "the process that hung was ended"


def test_reasoning_gym_scorers_that_raise_mean_a_wrong_answer():
    skip_without("ReasoningGym-v0")
    env = envs.make("ReasoningGym-v0", dataset="prime_factorization")
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step("no idea")
    assert (reward, terminated, info["success"]) == (0, True, False)
    assert "ValueError" in info["scoring_error"]


def test_reasoning_gym_refuses_unknown_settings():
    skip_without("ReasoningGym-v0")
    with pytest.raises(UserError, match=r"its settings: .*min_terms"):
        envs.make("ReasoningGym-v0", config={"terms": 3})
    with pytest.raises(UserError, match="did you mean 'chain_sum'"):
        envs.make("ReasoningGym-v0", dataset="chainsum")


class Echo(gym.Env[str, str]):
    """Says a word; the episode is won by saying it back. Knows nothing of agentrl."""

    def __init__(self, told: bool = True) -> None:
        self.observation_space = gym.spaces.Text(8)
        self.action_space = gym.spaces.Text(8)
        self.told = told

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.word = "".join("abcd"[i] for i in self.np_random.integers(4, size=4))
        return self.word, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        good = action == self.word
        return self.word, float(good), good, False, {"success": good} if self.told else {}


@pytest.fixture
def echo() -> Iterator[str]:
    gym.register("PlainEcho-v0", Echo, max_episode_steps=3)
    yield "PlainEcho-v0"
    del gym.registry["PlainEcho-v0"]


def parrot(observation: str) -> str:
    return observation


def foreigner(observation: str) -> str:
    return "not in the default charset\n漢"


def test_any_gymnasium_id_with_text_spaces_is_made_collected_and_evaluated(echo):
    env = agentrl.make(echo)
    word, _ = env.reset(seed=4)
    assert env.step("two words")[1:4] == (0, False, False)
    assert env.step(word)[1:4] == (1, True, False)
    assert agentrl.evaluate(parrot, echo, episodes=6).success.value == 1
    report = agentrl.evaluate(foreigner, echo, episodes=6)
    assert (report.success.value, report.turns, report.infrastructure_failures) == (0, 3, 0)
    episodes = agentrl.collect(agentrl.FunctionPolicy(lambda request: request.observation), echo, episodes=4)
    assert [(t.success, t.instructions, len(t.turns)) for t in episodes.trajectories] == [(True, "", 1)] * 4


def test_without_success_in_info_the_reward_can_decide(echo):
    paid = OutcomeConfig(rule="return", success_above=0.5)
    env = agentrl.config.EnvConfig(id=echo, kwargs={"told": False})
    assert agentrl.evaluate(parrot, env, episodes=4, outcome=paid).success.value == 1
    assert agentrl.evaluate(foreigner, env, episodes=4, outcome=paid).success.value == 0
