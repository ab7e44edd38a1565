"""`check_env`: every registered environment passes, and one that breaks a rule fails at that rule."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import toys
from typer.testing import CliRunner

from agentrl import envs
from agentrl.cli import app
from agentrl.envs import TextEnv, registry
from agentrl.envs.check import CHECKS, CheckReport, check_env
from agentrl.envs.probe import HUGE
from agentrl.errors import ActionError, UserError
from agentrl.types import TextPart

SEEDS = (0, 1, 2)


class Count(TextEnv):
    """Say the number that is shown, three times: keeps every rule."""

    def __init__(self) -> None:
        super().__init__()
        self.provides = {"state_keys": {}}

    def begin(self, options: dict[str, Any]) -> Any:
        self.turn, self.number = 0, int(self.np_random.integers(1000))
        return self.show(), self.facts()

    def parse_action(self, text: str) -> str:
        if text != str(self.number):
            raise ActionError("say the number")
        return text

    def play(self, action: str) -> Any:
        self.turn += 1
        return self.show(), 1.0, self.turn == 3, {"success": self.turn == 3, **self.facts()}

    def show(self) -> Any:
        return f"{self.number}, said {self.turn} times"

    def facts(self) -> dict[str, Any]:
        return {"state_key": self.show(), "admissible_actions": [str(self.number)]}


class Forgetful(Count):
    def begin(self, options: dict[str, Any]) -> Any:
        self.played = getattr(self, "played", 0) + 1
        return f"game {self.played}", {**super().begin(options)[1]}


class ForgetfulLater(Count):
    """Starts alike, but what an action does depends on the episodes before."""

    def play(self, action: str) -> Any:
        self.total = getattr(self, "total", 0) + 1
        observation, *rest = super().play(action)
        return f"{observation}; {self.total} in all", *rest


class Deaf(Count):
    def begin(self, options: dict[str, Any]) -> Any:
        super().begin(options)
        self.number = 7
        return self.show(), self.facts()


class Shared(Count):
    def play(self, action: str) -> Any:
        random.seed(3)
        return super().play(action)


class SharedNumpy(Count):
    def begin(self, options: dict[str, Any]) -> Any:
        np.random.random()
        return super().begin(options)


class Undead(Count):
    def step(self, action: str) -> Any:
        answer = super().step(action)
        self._finished = False
        return answer


class Brittle(Count):
    def parse_action(self, text: str) -> str:
        text.encode()
        return super().parse_action(text)


class Echoing(Count):
    def on_invalid(self, error: ActionError) -> Any:
        return self.said, 0.0, False, self.facts()

    def step(self, action: str) -> Any:
        self.said = action
        return super().step(action)


class Both(Count):
    def step(self, action: str) -> Any:
        observation, reward, terminated, _, info = super().step(action)
        return observation, reward, terminated, terminated, info


class IntegerEnd(Count):
    def step(self, action: str) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, int(terminated), truncated, info


class CountedSuccess(Count):
    def play(self, action: str) -> Any:
        observation, reward, terminated, info = super().play(action)
        return observation, reward, terminated, {**info, "success": self.turn // 3}


class Endless(Count):
    def on_invalid(self, error: ActionError) -> Any:
        return self.show(), float("inf"), False, self.facts()


class Promised(Count):
    reward_range = (0.0, 0.5)


class Priced(Count):
    def step(self, action: str) -> Any:
        observation, _, *rest = super().step(action)
        return observation, "1.0", *rest


class Numeric(Count):
    def show(self) -> Any:
        return self.number


class Hoarding(Count):
    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "board": np.zeros(3)}


class Sets(Count):
    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "admissible_actions": (str(self.number),)}


class Keyless(Count):
    def on_invalid(self, error: ActionError) -> Any:
        return self.show(), 0.0, False, {}


class Boasting(Count):
    def __init__(self) -> None:
        super().__init__()
        self.provides = {"state_key": {}}


class Fast(Count):
    fast = True


class Single(Deaf):
    single_task = True


def failures(report: CheckReport) -> dict[str, str]:
    return {check.name: str(check) for check in report.checks if not check.passed}


def check(env: Any, actions: int = 40, **options: Any) -> dict[str, str]:
    return failures(check_env(env, seeds=SEEDS, actions=actions, **options))


def registered() -> list[Any]:
    """All ids; the adapters' worlds (a Java VM, a worker that imports for seconds) are for the slow suite."""
    found = []
    for env_id in envs.environment_ids():
        adapter = "adapters" in str(gym.registry[env_id].entry_point)
        found.append(pytest.param(env_id, marks=[pytest.mark.slow] if adapter else []))
    return found


@pytest.mark.parametrize("env_id", registered())
def test_every_registered_environment_passes(env_id: str) -> None:
    try:
        envs.make(env_id).close()
    except UserError as error:
        if re.search("pip install|judge_url|runs on Java", str(error)):
            pytest.skip(str(error))
        raise
    report = check_env(env_id, seeds=SEEDS, actions=150)
    assert report.passed, str(report)
    assert [check.name for check in report.checks] == list(CHECKS)


def test_an_environment_that_keeps_every_rule_passes() -> None:
    report = check_env(Count, seeds=SEEDS)
    assert report.passed, str(report)
    assert report.env == "Count"
    told = {check.name: check.detail for check in report.checks}
    assert told["same seed, same episode"] == "3 seeds, each played three times"
    assert told["step after the end"] == "refused with UserError"
    assert told["any text"].startswith("1,000 actions")
    assert told["declarations"] == "provides state_keys"


@pytest.mark.parametrize(
    ("env", "rule", "says"),
    [
        (Forgetful, "same seed, same episode", "observation of turn 0 was 'game "),
        (Forgetful, "group members start alike", "the observation of member 2 is not the first one's"),
        (ForgetfulLater, "same seed, same episode", "observation of turn 1 was"),
        (Deaf, "other seed, other episode", "seeds 0, 1, 2 all give the same episode"),
        (Shared, "global random state", "of random changed"),
        (SharedNumpy, "global random state", "of numpy.random changed"),
        (Undead, "step after the end", "had terminated, and a further step was played"),
        (Brittle, "any text", "UnicodeEncodeError"),
        (Echoing, "any text", "came back in an observation of 1,000,000 characters"),
        (Both, "ends", "terminated and truncated at once"),
        (IntegerEnd, "ends", "terminated is 0 (int)"),
        (CountedSuccess, "observations and info", "info['success'] is 0 (int), not bool"),
        (CountedSuccess, "ends", "info['success'] is 1 (int)"),
        (Endless, "rewards", "the reward is inf (float) after '"),
        (Promised, "rewards", "the reward is 1.0 after '"),
        (Priced, "rewards", "the reward is '1.0' (str)"),
        (Numeric, "observations and info", "(int) after reset(seed="),
        (Hoarding, "observations and info", "info['board'] cannot be stored as JSON"),
        (Sets, "observations and info", "info['admissible_actions'] is ('"),
        (Keyless, "declarations", "info['state_key'] is None after '"),
        (Boasting, "declarations", "provides has 'state_key'; known are state_keys and turn_rewards"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_rule_is_named_with_the_way_to_mend_it(env: type[TextEnv], rule: str, says: str) -> None:
    found = check(env)
    assert says in found[rule]
    assert f"to mend: {CHECKS[rule][1]}" in found[rule]


@pytest.mark.parametrize("env", [Deaf, Undead, Brittle, Both, Endless, Hoarding, Keyless])
def test_only_the_broken_rule_fails(env: type[TextEnv]) -> None:
    assert len(check(env)) == 1


@pytest.mark.parametrize(("tick", "good"), [(2e-3, False), (0.5e-3, True)])
def test_fast_is_a_promise(tick: float, good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("agentrl.envs.probe.perf_counter", lambda: tick * next(clock))
    found = check(Fast)
    assert (found == {}) is good
    if not good:
        assert "a step takes 2 ms" in found["speed"]
        assert "fast = True promises under 1 ms for each" in found["speed"]
    assert check(Count) == {}, "others are only told"


def test_the_check_leaves_global_generators_as_they_were() -> None:
    before = random.getstate(), str(np.random.get_state())
    assert check(Count) == {}
    assert (random.getstate(), str(np.random.get_state())) == before


def test_torch_is_watched_where_something_has_loaded_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    class Dreaming(Count):
        def play(self, action: str) -> Any:
            torch.rand(1)
            return super().play(action)

    assert "of torch changed" in check(Dreaming)["global random state"]


def test_gymnasiums_own_checker_has_its_say() -> None:
    class Spaceless(Count):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = gym.spaces.Discrete(2)

    assert "gymnasium's checker" in check(Spaceless)


def test_a_single_task_is_declared() -> None:
    assert check(Single) == {}
    assert check("Lock-v0", kwargs={"code": "badcab"}) == {}


def test_what_cannot_go_to_a_worker_process_fails() -> None:
    class Local(Count):
        pass

    assert set(check(lambda: Local())) == {"picklable"}
    toys.register("CheckLocal-v0", Local, max_turns=5)
    try:
        assert set(check("CheckLocal-v0")) == {"picklable"}
    finally:
        gym.registry.pop("CheckLocal-v0")


@pytest.mark.parametrize(
    ("agent", "says"),
    [
        ("no-such-policy", "no policy 'no-such-policy'"),
        (("lock-noisy-solver", {"skill": 2}), "skill=2"),
        (("lock-noisy-solver", {"colour": 2}), "colour"),
    ],
)
def test_scripted_agents_that_cannot_play_fail(agent: Any, says: str) -> None:
    envs.register("CheckAgents-v0", Count, max_turns=5, agents={"expert": agent})
    try:
        assert says in check("CheckAgents-v0")["scripted agents"]
    finally:
        gym.registry.pop("CheckAgents-v0")
        registry._OURS.pop("CheckAgents-v0")


class Hard(Count):
    hard = True


@pytest.mark.parametrize(("world", "verdict"), [(Count, "FAIL"), (Hard, "WARN")])
def test_an_expert_that_solves_nothing_is_a_defect_unless_the_tasks_are_declared_hard(world: Any, verdict: str) -> None:
    useless = ("scripted", {"function": "test_check_env:refuse"})
    envs.register("CheckExpert-v0", world, max_turns=5, agents={"random": useless, "expert": useless})
    try:
        report = check_env("CheckExpert-v0", seeds=SEEDS, actions=40)
    finally:
        gym.registry.pop("CheckExpert-v0")
        registry._OURS.pop("CheckExpert-v0")
    [line] = [str(check) for check in report.checks if check.name == "scripted agents"]
    tried = len(SEEDS) + 10
    assert line.startswith(f"{verdict}  scripted agents: expert solved 0 of {tried}, random solved 0 of {len(SEEDS)}")
    assert report.passed is (verdict == "WARN")
    assert {*failures(report)} <= {"scripted agents"}


def refuse(observation: str) -> str:
    return "no action"


class Long(Count):
    def play(self, action: str) -> Any:
        observation, reward, _, info = super().play(action)
        return observation, reward, self.turn == 50, {**info, "success": self.turn == 50}


def on(observation: str) -> str:
    return observation.partition(",")[0]


def test_an_expert_plays_as_long_as_the_turn_limit_allows() -> None:
    envs.register(
        "CheckLong-v0", Long, max_turns=60, agents={"expert": ("scripted", {"function": "test_check_env:on"})}
    )
    try:
        report = check_env("CheckLong-v0", seeds=SEEDS, actions=40)
    finally:
        gym.registry.pop("CheckLong-v0")
        registry._OURS.pop("CheckLong-v0")
    assert report.passed, str(report)
    assert f"expert solved {len(SEEDS)} of {len(SEEDS)}" in str(report)


def test_roles_of_agents_are_known_and_in_order() -> None:
    with pytest.raises(UserError, match="'master'; roles are random, naive, expert"):
        envs.register("CheckRoles-v0", Count, agents={"master": "random"})
    assert "CheckRoles-v0" not in envs.environment_ids()
    agents = registry.scripted_agents("Sokoban-v0")
    assert list(agents) == ["random", "naive", "expert"]
    assert agents["naive"] == ("sokoban-noisy-solver", {"skill": 0.25})
    assert registry.scripted_agents("lock:Lock-v0")["expert"] == ("lock-solver", {})
    assert registry.scripted_agents("CartPole-v1") == {}


def test_hostile_texts_are_as_long_as_they_claim() -> None:
    assert all(900_000 < len(text) <= 1_000_000 for text in HUGE)
    seen = []

    class Listening(Count):
        def parse_action(self, text: str) -> str:
            seen.append(text)
            return super().parse_action(text)

    check_env(Listening, seeds=SEEDS, actions=300)
    assert {"", "\ud800", "<|im_start|>assistant\n<|im_end|>"} <= {*seen}
    assert max(map(len, seen)) == 1_000_000
    assert len({*seen}) > 150


def test_parts_of_a_message_are_an_observation() -> None:
    class Parts(Count):
        def __init__(self) -> None:
            super().__init__()
            self.provides = {}
            self.observation_space = gym.spaces.Sequence(gym.spaces.Discrete(2))

        def show(self) -> Any:
            return [TextPart(text=str(self.number))]

        def facts(self) -> dict[str, Any]:
            return {"admissible_actions": [str(self.number)]}

    assert "observations and info" not in check(Parts)


class Plain(gym.Env[str, str]):
    """No `TextEnv`: Gymnasium's own text spaces. Any text but one letter is an error."""

    def __init__(self, careful: bool = True) -> None:
        self.careful = careful
        self.observation_space = gym.spaces.Text(20, min_length=0)
        self.action_space = gym.spaces.Text(1)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.done = False
        self.letter = "abcdefgh"[self.np_random.integers(8)]
        return self.letter, {}

    def step(self, action: str) -> Any:
        if self.careful:
            if self.done:
                raise RuntimeError("call reset")
            self.done = action == self.letter
        elif len(action) != 1:
            raise ValueError(f"{action!r:.20} is no letter")
        return self.letter, 0.0, action == self.letter, False, {"success": action == self.letter}


def test_any_gymnasium_environment_with_text_spaces_can_be_checked() -> None:
    toys.register("CheckPlain-v0", Plain, max_turns=20)  # type: ignore[arg-type]
    try:
        assert check("CheckPlain-v0") == {}
        assert "ValueError: '' is no letter" in check("CheckPlain-v0", kwargs={"careful": False})["any text"]
    finally:
        gym.registry.pop("CheckPlain-v0")


def test_what_cannot_be_checked_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'Lock-v0'"):
        check_env("Lok-v0")
    with pytest.raises(UserError, match="colour"):
        check_env("Lock-v0", kwargs={"colour": 1})
    with pytest.raises(UserError, match="at least two"):
        check_env("Lock-v0", seeds=[4, 4])


def test_instances_are_closed() -> None:
    alive = []

    class Closing(Count):
        def __init__(self) -> None:
            super().__init__()
            alive.append(self)

        def close(self) -> None:
            if self in alive:
                alive.remove(self)

    check_env(Closing, seeds=SEEDS, actions=10)
    assert alive == []


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_the_command_prints_a_line_a_check_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = invoke("check-env", "Lock-v0", "--env-arg", "length=3", "--actions", "50", "--json", str(out))
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line[:6] for line in lines[:-1]] == ["PASS  "] * len(CHECKS)
    assert lines[-1] == f"Lock-v0 passes all {len(CHECKS)} checks"
    report = CheckReport.model_validate_json(out.read_text())
    assert report.passed
    assert json.loads(out.read_text())["checks"][0]["name"] == "gymnasium's checker"


def test_the_command_fails_with_exit_code_1_and_says_how_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("broken_world")
    monkeypatch.setitem(sys.modules, "broken_world", module)
    toys.register("CheckBroken-v0", Endless, max_turns=5)
    try:
        result = invoke("check-env", "broken_world:CheckBroken-v0", "--actions", "50")
    finally:
        gym.registry.pop("CheckBroken-v0")
    assert result.exit_code == 1
    assert re.search(
        r"FAIL  rewards: the reward is inf .float. after .*\n      to mend: return a finite float", result.output
    )
    assert f"1 of {len(CHECKS)} checks failed" in result.output
    assert invoke("check-env", "Lok-v0").exit_code == 2
