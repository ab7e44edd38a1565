"""Evaluation: intervals against known values, and what is counted where."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from toys import register
from typer.testing import CliRunner

from agentrl.buffer import read_jsonl
from agentrl.cli import app
from agentrl.cli.evaluate import Running, _Watch, short
from agentrl.config import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.envs import TextEnv
from agentrl.errors import ActionError, DataError, InfrastructureError, UserError
from agentrl.evaluate import (
    EvalReport,
    EvalResult,
    EvaluationFailed,
    bootstrap_mean,
    cluster_proportion,
    evaluate,
    wilson,
)
from agentrl.evaluate.functions import function_hash
from agentrl.evaluate.store import OtherEvaluation, identity
from agentrl.evaluate.texts import environment_texts
from agentrl.policy import FunctionPolicy, PolicyRequest, Sampling, load_policy, register_policy
from agentrl.rollout import Summary
from agentrl.types import Content, StopReason, Trajectory


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    # R: binom::binom.confint(x, n, methods = "wilson")
    [(0, 10, 0.0, 0.2775328), (10, 10, 0.7224672, 1.0), (50, 100, 0.4038315, 0.5961685), (1, 3, 0.0614919, 0.7923404)],
)
def test_wilson_known_values(successes: int, episodes: int, low: float, high: float) -> None:
    found = wilson(successes, episodes)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)
    assert found.value == successes / episodes
    assert found.episodes == episodes


def test_wilson_contains_the_rate_and_is_symmetric() -> None:
    for n in (1, 2, 7, 256):
        for k in range(n + 1):
            found, mirrored = wilson(k, n), wilson(n - k, n)
            assert 0 <= found.low <= found.value <= found.high <= 1
            assert found.low == pytest.approx(1 - mirrored.high)
            assert found.high - found.low > 0


def test_wilson_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for rate in (0.02, 0.3, 0.9):
        intervals = [wilson(int(k), 100) for k in rng.binomial(100, rate, 2000)]
        covered = np.mean([i.low <= rate <= i.high for i in intervals])
        assert 0.925 < covered < 0.985


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_rate(successes: int, episodes: int) -> None:
    with pytest.raises(UserError):
        wilson(successes, episodes)


def test_bootstrap_resamples_tasks_not_episodes() -> None:
    values = np.random.default_rng(1).normal(size=40).tolist()
    tasks = list(range(40))
    single = bootstrap_mean(values, tasks, seed=3)
    # Ten identical episodes of each task tell nothing more about the tasks.
    repeated = bootstrap_mean([v for v in values for _ in range(10)], [t for t in tasks for _ in range(10)], seed=3)
    assert (repeated.value, repeated.low, repeated.high) == pytest.approx((single.value, single.low, single.high))
    assert single.low is not None
    assert single.high is not None
    assert single.low < single.value < single.high
    assert single.high - single.low == pytest.approx(2 * 1.96 * np.std(values) / np.sqrt(40), rel=0.1)


def test_bootstrap_weighs_tasks_by_their_episodes() -> None:
    assert bootstrap_mean([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]).value == 0.75


def test_bootstrap_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(300):
        tasks = rng.normal(size=40)
        values = np.repeat(tasks, 3) + rng.normal(size=120)
        found = bootstrap_mean(values.tolist(), np.repeat(np.arange(40), 3).tolist(), resamples=400, seed=trial)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0 <= found.high
    assert 0.88 < hits / 300 < 0.98


def test_bootstrap_without_spread_or_values() -> None:
    one = bootstrap_mean([1.0, 2.0], ["task", "task"])
    assert (one.value, one.low, one.high) == (1.5, None, None)
    same = bootstrap_mean([2.0, 2.0], ["a", "b"])
    assert (same.value, same.low, same.high) == (2.0, None, None)  # no width would promise what was not seen
    with pytest.raises(UserError):
        bootstrap_mean([], [])
    with pytest.raises(UserError):
        bootstrap_mean([1.0], ["a", "b"])


class Guess(TextEnv):
    """Say the shown digit. `fault` lists the digits at which the environment breaks."""

    fast = True
    instructions = "Repeat the digit."
    broken = True

    def __init__(self, fault: tuple[int, ...] = (), shift: int = 0) -> None:
        super().__init__()
        self.fault, self.shift = fault, shift

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        self.digit = int(self.np_random.integers(10)) + self.shift
        return str(self.digit), {"admissible_actions": ["one", "two"]}

    def parse_action(self, text: str) -> int:
        if not text.isdigit():
            raise ActionError("a digit")
        return int(text)

    def play(self, action: int) -> tuple[str, float, bool, dict[str, Any]]:
        if self.broken and self.digit in self.fault:
            raise RuntimeError("broken pipe")
        return "done", 2.0 * (action == self.digit), action == self.digit, {"success": action == self.digit}


def echo(observation: Content) -> str:
    return str(observation)


@pytest.fixture(autouse=True)
def guess() -> Iterator[None]:
    register("Guess-v0", Guess, max_turns=3)
    yield
    gym.registry.pop("Guess-v0")


def test_evaluation_of_a_plain_function() -> None:
    seen: list[Trajectory] = []
    result = evaluate(echo, "Guess-v0", episodes=20, seed=5, on_episode=seen.append)
    assert result.success.value == 1.0
    assert result.success.episodes == result.episodes == 20
    assert (result.outcome.value, result.turns, result.action_tokens) == (1.0, 1.0, 0.0)
    assert result.stop_reasons == {"terminated": 20}
    assert result.infrastructure_failures == 0
    assert result.temperature is None
    assert sorted(t.seed for t in seen) == list(range(5, 25))
    assert len({t.group_id for t in seen}) == 20


def test_invalid_actions_and_turn_limits_are_counted() -> None:
    def sometimes(request: PolicyRequest) -> str:
        return "what?" if request.turn % 2 == 0 else "99"

    result = evaluate(FunctionPolicy(sometimes), "Guess-v0", episodes=6)
    assert result.policy == "sometimes"
    assert result.success.value == 0
    assert result.stop_reasons == {"turn_limit": 6}
    assert result.turns == 3
    assert result.invalid_action_rate == pytest.approx(2 / 3)


def test_infrastructure_failures_are_apart() -> None:
    env = EnvConfig(id="Guess-v0", kwargs={"fault": (0, 1, 2, 3)})
    result = evaluate(echo, env, episodes=40, rollout=RolloutConfig(retries=1))
    assert 0 < result.infrastructure_failures < 40
    assert result.success.episodes == 40 - result.infrastructure_failures
    assert result.success.value == 1.0
    assert result.outcome.value == 1.0
    assert sum(result.stop_reasons.values()) == 40
    assert result.stop_reasons["environment_error"] == result.infrastructure_failures
    with pytest.raises(InfrastructureError, match="broken pipe"):
        evaluate(echo, EnvConfig(id="Guess-v0", kwargs={"fault": tuple(range(10))}), episodes=4)


def test_evaluation_settings_override_those_of_training() -> None:
    env = EnvConfig(id="Guess-v0", kwargs={"shift": 0, "fault": ()}, eval_kwargs={"shift": 100})
    seen: list[Trajectory] = []
    result = evaluate(echo, env, episodes=3, on_episode=seen.append)
    assert all(int(str(t.turns[0].observation)) >= 100 for t in seen)
    assert result.env_kwargs == {"shift": 100, "fault": ()}


def test_outcome_rule_and_reproducibility() -> None:
    def coin(request: PolicyRequest) -> str:
        return str(random.Random(request.seed).choice([request.observation, 42]))

    def run(seed: int) -> EvalResult:
        rule = OutcomeConfig(rule="return", success_above=1.0)
        return evaluate(FunctionPolicy(coin), "Guess-v0", episodes=64, seed=seed, outcome=rule)

    first, again, other = run(1), run(1), run(2)
    assert without_clock(first) == without_clock(again)
    assert first.model_dump(exclude={"seconds", "episode_seconds", "seed"}) != other.model_dump(
        exclude={"seconds", "episode_seconds", "seed"}
    )
    assert first.outcome.value == pytest.approx(2 * first.success.value)
    assert first.outcome.low is not None
    assert 0 < first.outcome.low < first.outcome.value


def test_result_survives_json() -> None:
    result = evaluate(echo, "Guess-v0", episodes=1)
    assert EvalResult.model_validate_json(result.model_dump_json()) == result
    assert json.loads(result.model_dump_json())["success"].keys() == {"value", "low", "high", "episodes"}


def test_no_episodes_is_refused() -> None:
    with pytest.raises(UserError, match="episodes=0"):
        evaluate(echo, "Guess-v0", episodes=0)


def test_async_functions_are_policies_and_wait_side_by_side() -> None:
    waiting = 0
    most = 0

    async def slow_echo(observation: Content) -> str:
        nonlocal waiting, most
        waiting += 1
        most = max(most, waiting)
        await asyncio.sleep(0)
        waiting -= 1
        return str(observation)

    result = evaluate(slow_echo, "Guess-v0", episodes=12)
    assert (result.success.value, result.policy) == (1.0, "slow_echo")
    assert most > 1
    with pytest.raises(UserError, match="not int"):
        evaluate(3, "Guess-v0")  # type: ignore[call-overload]


def test_several_environments_make_one_report() -> None:
    envs: list[EnvConfig | str] = ["Guess-v0", EnvConfig(id="Guess-v0", kwargs={"shift": 100})]
    seen: list[Summary] = []
    report = evaluate(lambda text: str(text)[:1], envs, episodes=10, seed=5, on_summary=seen.append)
    assert [one.env_kwargs for one in report.results] == [{}, {"shift": 100}]
    assert [one.success.value for one in report.results] == [1.0, 0.0]
    assert report.success == 0.5
    assert len(seen) == 20
    assert EvalReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(UserError, match="no environment"):
        evaluate(echo, [])


def coin(request: PolicyRequest) -> str:
    return str(request.observation) if random.Random(request.seed).random() < 0.3 else "42"


def test_several_episodes_a_task_give_pass_at_k_over_tasks() -> None:
    result = evaluate(FunctionPolicy(coin), EnvConfig(id="Guess-v0", max_turns=1), episodes=400, per_task=4)
    assert (result.tasks, result.per_task, result.success_interval) == (100, 4, "bootstrap")
    rate = result.success.value
    assert rate == pytest.approx(0.3, abs=0.08)
    for k in range(1, 5):
        assert result.pass_at_k[k].value == pytest.approx(1 - (1 - rate) ** k, abs=0.1)
        assert result.pass_hat_k[k].value == pytest.approx(rate**k, abs=0.1)
    assert result.pass_at_k[1].value == result.pass_hat_k[1].value == pytest.approx(rate)
    stopped = result.by_stop_reason
    assert (stopped["terminated"].success, stopped["turn_limit"].success) == (1.0, 0.0)
    assert stopped["terminated"].episodes == result.stop_reasons["terminated"] == round(rate * 400)
    with pytest.raises(UserError, match="per_task=3"):
        evaluate(echo, "Guess-v0", episodes=10, per_task=3)


def without_clock(result: EvalResult) -> dict[str, Any]:
    return result.model_dump(exclude={"seconds", "episode_seconds"})


def test_an_interrupted_evaluation_is_completed_by_the_same_call(tmp_path: Path) -> None:
    options: dict[str, Any] = {"episodes": 24, "per_task": 3, "seed": 5}
    env = EnvConfig(id="Guess-v0", max_turns=2)
    whole = evaluate(FunctionPolicy(coin), env, **options, out=tmp_path / "whole")
    played: list[Trajectory] = []

    def stop(trajectory: Trajectory) -> None:
        played.append(trajectory)
        if len(played) == 10:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate(FunctionPolicy(coin), env, **options, out=tmp_path / "cut", on_episode=stop)
    assert not (tmp_path / "cut" / "result.json").exists()
    file = tmp_path / "cut" / "trajectories" / "0-Guess-v0.jsonl"
    with file.open("ab") as half:
        half.write(b'{"id": "eval-9')  # what a kill leaves of a line
    again: list[Trajectory] = []
    seen: list[Summary] = []
    result = evaluate(
        FunctionPolicy(coin), env, **options, out=tmp_path / "cut", on_episode=again.append, on_summary=seen.append
    )
    assert (len(again), len(seen)) == (14, 24)
    assert without_clock(result) == without_clock(whole)
    ids = [one.id for one in read_jsonl(file)]
    assert len(set(ids)) == len(ids) == 24
    assert evaluate(FunctionPolicy(coin), env, **options, out=tmp_path / "cut", on_episode=again.append) == (
        result.model_copy(update={"seconds": pytest.approx(0, abs=60)})
    )
    assert len(again) == 14


def test_infrastructure_failures_are_played_again_on_resume(tmp_path: Path) -> None:
    env = EnvConfig(id="Guess-v0", kwargs={"fault": (0, 1, 2, 3)})
    options: dict[str, Any] = {"episodes": 20, "rollout": RolloutConfig(retries=0), "out": tmp_path}
    first = evaluate(echo, env, **options)
    again: list[Trajectory] = []
    second = evaluate(echo, env, **options, on_episode=again.append)
    assert 0 < first.infrastructure_failures == len(again)
    assert without_clock(second) == without_clock(first), "they failed again, all of them"
    Guess.broken = False
    try:
        mended = evaluate(echo, env, **options)
    finally:
        Guess.broken = True
    assert (mended.infrastructure_failures, mended.success.episodes) == (0, 20)


def test_a_folder_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    evaluate(echo, "Guess-v0", episodes=4, out=tmp_path / "a")
    for changed, key in (
        ({"episodes": 6}, "episodes=4, now episodes=6"),
        ({"seed": 3}, "seed=1000000000000, now seed=3"),
        ({"env": EnvConfig(id="Guess-v0", kwargs={"shift": 1})}, "environments.0.kwargs.shift='not set'"),
        ({"outcome": OutcomeConfig(rule="return")}, "outcome.rule='success', now outcome.rule='return'"),
        ({"policy_options": {"skill": 1}}, "policy.options"),
    ):
        options: dict[str, Any] = {"env": "Guess-v0", "episodes": 4, "out": tmp_path / "a"} | changed
        with pytest.raises(UserError, match=re.escape(key)):
            evaluate(echo, **options)
    evaluate(echo, "Guess-v0", episodes=4, out=tmp_path / "a", rollout=RolloutConfig(concurrency=2, retries=0))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that is no evaluation"):
        evaluate(echo, "Guess-v0", episodes=4, out=tmp_path / "b")
    (tmp_path / "a" / "settings.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*settings\.json"):
        evaluate(echo, "Guess-v0", episodes=4, out=tmp_path / "a")


def test_a_folder_of_another_function_is_refused_whatever_it_is_called(tmp_path: Path) -> None:
    def skilled(skill: float) -> Any:
        def play(observation: Content) -> str:
            return str(observation) if skill > 0.5 else "42"

        return play

    first, second = (lambda text: str(text)), (lambda text: "42")
    pairs = {"lambda": (first, second), "closure": (skilled(0.9), skilled(0.1))}
    for name, (one, other) in pairs.items():
        options: dict[str, Any] = {"episodes": 4, "out": tmp_path / name}
        evaluate(one, "Guess-v0", **options)
        with pytest.raises(UserError, match=r"episodes of another function than this .*choose another folder"):
            evaluate(other, "Guess-v0", **options)
        again: list[Trajectory] = []
        evaluate(one, "Guess-v0", **options, on_episode=again.append)
        assert again == [], "the same function is completed"


EDITED = {
    "itself": "def play(text): return str(text)",
    "a constant": "def play(text): return str(text)[:2]",
    "a default": "def play(text, size=1): return str(text)[:size]",
    "another default": "def play(text, size=2): return str(text)[:size]",
    "a keyword's default": "def play(text, *, size=2): return str(text)[:size]",
    "a name": "def play(text): return repr(text)",
    "an inner function": "def play(text): return (lambda t: t + '!')(str(text))",
    "another inner function": "def play(text): return (lambda t: t + '?')(str(text))",
    "a global": "SIZE = 1\ndef play(text): return str(text)[:SIZE]",
    "another global": "SIZE = 2\ndef play(text): return str(text)[:SIZE]",
    "a helper": "def cut(t): return t[:1]\ndef play(text): return cut(str(text))",
    "another helper": "def cut(t): return t[:2]\ndef play(text): return cut(str(text))",
    "a method": "class A:\n  def __init__(s): s.n = 1\n  def act(s, text): return str(text)[s.n]\nplay = A().act",
    "another self": "class A:\n  def __init__(s): s.n = 2\n  def act(s, text): return str(text)[s.n]\nplay = A().act",
    "an object": "class A:\n  def __call__(s, text): return str(text)\nplay = A()",
    "another object": "class A:\n  def __call__(s, text): return 'x'\nplay = A()",
    "a part": "from functools import partial\nplay = partial(lambda n, text: n, 1)",
    "another part": "from functools import partial\nplay = partial(lambda n, text: n, 2)",
    "a set": "def play(text): return text in {'a', 'b', 'c', 'd', 'e', 'f'}",
    "itself twice": "def play(text): return play(text[1:]) if text else ''",
    "a closure's object": "def make(o):\n  def play(text): return str(o)\n  return play\nplay = make(object())",
}
HASHED = """
import json, sys
from agentrl.evaluate.functions import function_hash
found = {}
for name, source in json.load(sys.stdin).items():
    space = {"__name__": "mine"}
    exec(source, space)
    found[name] = function_hash(space["play"])
print(json.dumps(found))
"""


def test_a_function_is_told_by_what_it_does_in_every_process_alike() -> None:
    tables = []
    for salt in ("1", "2"):  # sets come in another order, objects lie at other addresses
        done = subprocess.run(
            [sys.executable, "-c", HASHED],
            input=json.dumps(EDITED),
            env={**os.environ, "PYTHONHASHSEED": salt},
            capture_output=True,
            text=True,
            check=True,
        )
        tables.append(json.loads(done.stdout))
    assert tables[0] == tables[1]
    assert len(set(tables[0].values())) == len(EDITED)
    before = function_hash(echo)
    for _ in range(1000):  # Python rewrites what runs often
        echo("1")
    assert function_hash(echo) == before


KILLED = """
import os, sys
from agentrl.evaluate import evaluate
from agentrl.policy import load_policy
count = 0
def die(trajectory):
    global count
    count += 1
    if count == 17:
        os.kill(os.getpid(), 9)
evaluate(load_policy("sokoban-noisy-solver"), ["Sokoban-v0", "Sokoban-v0"], episodes=24, per_task=2, out=sys.argv[1],
    on_episode=die if sys.argv[2] == "die" else None)
"""


def test_a_killed_evaluation_gives_the_same_table_in_the_end(tmp_path: Path) -> None:
    tables = {}
    for name, ends in (("cut", ["die", "live"]), ("whole", ["live"])):
        for how in ends:
            done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name), how])
            assert done.returncode == (-9 if how == "die" else 0)
        report = EvalReport.model_validate_json((tmp_path / name / "result.json").read_bytes())
        tables[name] = [without_clock(one) for one in report.results]
    assert tables["cut"] == tables["whole"]
    assert [one["episodes"] for one in tables["cut"]] == [24, 24]


def test_command_line_plays_compares_and_fails_builds(tmp_path: Path) -> None:
    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "80"})

    common = ("eval", "Sokoban-v0", "--episodes", 30, "--per-task", 2, "--env-arg", "max_solution=4")
    weak = run(*common, "--policy", "random", "--out", tmp_path / "weak", "--fail-under", 0.99)
    assert weak.exit_code == 3
    assert "is below 99.0%" in weak.output
    strong = run(
        *common,
        "--policy",
        "sokoban-solver",
        "--out",
        tmp_path / "strong",
        "--fail-under",
        1,
        "--json",
        tmp_path / "s.json",
    )
    assert strong.exit_code == 0, strong.output
    assert "pass^k" in strong.output
    assert EvalResult.model_validate_json((tmp_path / "s.json").read_bytes()).tasks == 15
    better = run("compare", tmp_path / "weak", tmp_path / "strong", "--json", tmp_path / "c.json")
    assert better.exit_code == 0, better.output
    assert "B succeeds more often" in better.output
    assert json.loads((tmp_path / "c.json").read_text())["tasks"] == 15
    refused = run(*common, "--policy", "random", "--out", tmp_path / "strong")
    assert (refused.exit_code, "policy.name=" in refused.output) == (2, True)
    mixed = run("eval", "Sokoban-v0", "configs/sokoban_oprl.yaml", "--policy", "random")
    assert (mixed.exit_code, "beside other targets" in mixed.output) == (2, True)
    two = run("eval", "Sokoban-v0", "Lock-v0", "--policy", "random", "--episodes", 6, "--json", tmp_path / "two.json")
    assert two.exit_code == 0, two.output
    assert "in 2 environments" in two.output
    assert len(EvalReport.model_validate_json((tmp_path / "two.json").read_bytes()).results) == 2
    assert max(map(len, (weak.stdout + two.stdout + better.stdout).splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ((), 0, ""),
        (("--fail-under", "0.9"), 4, "infrastructure ended {n} of 40 episodes and --max-failures is 0"),
        (("--fail-under", "0.9", "--max-failures", "39"), 0, ""),
        (("--max-failures", "2"), 4, "and --max-failures is 2; success is that of the other"),
        (("--fail-under", "1", "--max-failures", "39", "--policy-arg", "digit=7"), 3, "is below 100.0%"),
        (("--fail-under", "1", "--policy-arg", "digit=7"), 4, "is below 100.0%"),
    ],
)
def test_a_build_fails_where_infrastructure_ended_episodes(options: tuple[str, ...], code: int, says: str) -> None:
    def player(digit: int | None = None) -> FunctionPolicy:
        return FunctionPolicy(lambda text: str(text) if digit is None else str(digit), "echo", reads="observation")

    register_policy("test-echo", player)
    result = CliRunner().invoke(
        app,
        ["eval", "Guess-v0", "--policy", "test-echo", "--episodes", "40", "--env-arg", "fault=[0,1,2,3]", *options],
        env={"COLUMNS": "80"},
    )
    failed = evaluate(echo, EnvConfig(id="Guess-v0", kwargs={"fault": [0, 1, 2, 3]}), episodes=40)
    assert result.exit_code == code, result.output
    assert says.format(n=failed.infrastructure_failures) in result.output


def summary(place: int, seed: int, success: bool, reason: StopReason = StopReason.TERMINATED) -> Summary:
    return Summary(place, 0, seed, float(success), success, reason, 1, 0, 0, 0.0)


def test_the_running_interval_is_over_tasks_and_not_computed_whenever_it_is_drawn() -> None:
    time = [0.0]
    running = Running(per_task=16, clock=lambda: time[0])
    assert str(running) == ""
    episodes = [summary(i, i // 16, i < 32) for i in range(64)]
    for one in episodes[:-1]:
        running.add(one)
    running.add(summary(64, 4, False, StopReason.POLICY_ERROR))

    def over_tasks(count: int) -> str:
        successes, tasks = [one.success for one in episodes[:count]], [one.seed for one in episodes[:count]]
        return short(cluster_proportion(successes, tasks, resamples=500))

    assert str(running) == over_tasks(63) != short(wilson(32, 63))
    running.add(episodes[-1])
    time[0] = 0.4
    assert str(running) == over_tasks(63)
    time[0] = 1.0
    assert str(running) == over_tasks(64)
    running.reset()
    running.add(summary(0, 0, True))
    running.settle()
    assert str(running) == short(cluster_proportion([True], [0]))
    running.settle(wilson(1, 2))
    assert str(running) == short(wilson(1, 2))
    plain = Running(per_task=1)
    plain.add(summary(0, 0, True))
    assert str(plain) == short(wilson(1, 1))


def test_progress_tells_of_the_environment_that_it_names_and_counts_every_episode() -> None:
    watch = _Watch(load_policy("random"), ["First-v0", "Second-v0"], 4, per_task=1)
    (task,) = watch._bar.tasks
    shown = []
    for place in range(8):
        watch.hooks["on_summary"](summary(place % 4, place % 4, place < 4))
        watch.running.settle()
        shown.append((task.completed, task.description, str(task.fields["success"])))
    assert [count for count, *_ in shown] == [*range(1, 9)]
    assert shown[3][1:] == ("First-v0", short(wilson(4, 4)))
    assert shown[7][1:] == ("Second-v0", short(wilson(0, 4)))


def test_one_environment_that_fails_whole_costs_no_other(tmp_path: Path) -> None:
    register_policy("test-lock-only", lambda: FunctionPolicy(lock_only, "lock-only"))
    found = tmp_path / "found.json"
    common = ["eval", "--policy", "test-lock-only", "--episodes", "6", "--json", str(found)]
    both = CliRunner().invoke(app, [*common, "Guess-v0", "Lock-v0"], env={"COLUMNS": "100"})
    assert both.exit_code == 4, both.output
    assert "lock-only in Lock-v0" in both.output
    assert "Error: Guess-v0: every one of 6 episodes ended with 'policy_error'" in both.output
    assert "Traceback" not in both.output.partition("Error:")[2]
    assert [one.env for one in EvalReport.model_validate_json(found.read_bytes()).results] == ["Lock-v0"]
    alone = CliRunner().invoke(app, [*common, "Guess-v0"], env={"COLUMNS": "100"})
    assert (alone.exit_code, "Error: every one of 6 episodes" in alone.output) == (4, True)
    with pytest.raises(EvaluationFailed, match=r"^Guess-v0: ") as told:
        evaluate(load_policy("test-lock-only"), ["Guess-v0", "Lock-v0"], episodes=2)
    assert [one.env for one in told.value.finished.results] == ["Lock-v0"]


def lock_only(request: PolicyRequest) -> str:
    if len(str(request.observation)) < 2:
        raise ValueError("no lock")
    return str(request.info["admissible_actions"][0])


def test_a_wrong_environment_is_told_before_the_first_has_been_played() -> None:
    played: list[Summary] = []
    with pytest.raises(UserError, match="no environment 'Locc-v0'"):
        evaluate(echo, ["Guess-v0", "Locc-v0"], episodes=2, on_summary=played.append)
    assert played == []
    for env in (5, {"id": "Guess-v0"}, gym.make("Guess-v0"), ["Guess-v0", None]):
        with pytest.raises(UserError, match="env is an environment's id or an EnvConfig"):
            evaluate(echo, env)  # type: ignore[arg-type, call-overload]
    with pytest.raises(UserError, match="seed=-1"):
        evaluate(echo, "Guess-v0", episodes=2, seed=-1)


def test_a_first_try_that_failed_does_not_occupy_the_folder(tmp_path: Path) -> None:
    def fault(observation: str) -> str:
        raise ValueError("a fault")

    out = tmp_path / "out"
    with pytest.raises(UserError, match="no environment 'Gess-v0'"):
        evaluate(echo, "Gess-v0", episodes=2, out=out)
    with pytest.raises(InfrastructureError):
        evaluate(fault, "Guess-v0", episodes=2, out=out)
    assert evaluate(echo, "Guess-v0", episodes=2, out=out).success.value == 1
    with pytest.raises(OtherEvaluation):  # now there is something to be lost
        evaluate(fault, "Guess-v0", episodes=2, out=out)


def test_two_evaluations_do_not_play_into_one_folder(tmp_path: Path) -> None:
    def meddle(observation: str) -> str:
        with pytest.raises(UserError, match="another evaluation is at work"):
            evaluate(meddle, "Guess-v0", episodes=2, out=tmp_path / "out")
        return echo(observation)

    evaluate(meddle, "Guess-v0", episodes=2, out=tmp_path / "out")
    evaluate(meddle, "Guess-v0", episodes=2, out=tmp_path / "out")


@pytest.mark.parametrize("change", [{"id": "eval-0"}, {"seed": 7}, {"id": "eval-0/2"}])
def test_an_episode_that_nobody_asked_for_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    evaluate(echo, "Guess-v0", episodes=4, per_task=2, seed=0, out=tmp_path)
    (file,) = (tmp_path / "trajectories").glob("*.jsonl")
    line = json.loads(file.read_text().splitlines()[0]) | {"id": "more/1"} | change
    file.write_text(f"{file.read_text()}{json.dumps(line)}\n")
    with pytest.raises(DataError, match="is none of this evaluation's"):
        evaluate(echo, "Guess-v0", episodes=4, per_task=2, seed=0, out=tmp_path)


def test_environment_texts_are_what_the_agent_reads_and_writes() -> None:
    texts, words = environment_texts("Guess-v0", 8, seed=1)
    assert words == ["one", "two"]
    assert texts.count("Repeat the digit.") == 8
    assert {"one", "two"} <= set(texts)
    assert any(text.startswith("Invalid action: a digit") for text in texts)
    assert (texts, words) == environment_texts("Guess-v0", 8, seed=1)
    assert texts != environment_texts("Guess-v0", 8, seed=2)[0]


def test_a_token_budget_of_episodes_makes_another_evaluation_and_none_leaves_old_folders_alone() -> None:
    def played(rollout: RolloutConfig) -> dict[str, Any]:
        policy, outcome = FunctionPolicy(lambda _: "0", "zero", reads="observation"), OutcomeConfig()
        found = identity(policy, None, [EnvConfig(id="Lock-v0")], 4, 1, 0, rollout, Sampling(), outcome)
        return dict(found["rollout"])

    assert played(RolloutConfig()).keys() == {"history", "max_context_tokens"}
    assert played(RolloutConfig(max_episode_tokens=7))["max_episode_tokens"] == 7
