"""Evaluation: intervals against known values, and what is counted where."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from toys import register

from agentrl.config import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.envs import TextEnv
from agentrl.errors import ActionError, InfrastructureError, UserError
from agentrl.evaluate import EvalResult, bootstrap_mean, evaluate, wilson
from agentrl.evaluate.texts import environment_texts
from agentrl.policy import FunctionPolicy, PolicyRequest
from agentrl.types import Content, Trajectory


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
    assert (same.low, same.high) == (2.0, 2.0)
    with pytest.raises(UserError):
        bootstrap_mean([], [])
    with pytest.raises(UserError):
        bootstrap_mean([1.0], ["a", "b"])


class Guess(TextEnv):
    """Say the shown digit. `fault` lists the digits at which the environment breaks."""

    fast = True
    instructions = "Repeat the digit."

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
        if self.digit in self.fault:
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
    assert first.model_dump(exclude={"seconds"}) == again.model_dump(exclude={"seconds"})
    assert first.model_dump(exclude={"seconds", "seed"}) != other.model_dump(exclude={"seconds", "seed"})
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


def test_environment_texts_are_what_the_agent_reads_and_writes() -> None:
    texts, words = environment_texts("Guess-v0", 8, seed=1)
    assert words == ["one", "two"]
    assert texts.count("Repeat the digit.") == 8
    assert {"one", "two"} <= set(texts)
    assert any(text.startswith("Invalid action: a digit") for text in texts)
    assert (texts, words) == environment_texts("Guess-v0", 8, seed=1)
    assert texts != environment_texts("Guess-v0", 8, seed=2)[0]
