"""The credit lab: exact values against brute force, measures against hand-made cases, a small lab end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from toys import make_model, run_config
from typer.testing import CliRunner

from agentrl.config import EnvConfig
from agentrl.envs import Tabular, make
from agentrl.errors import ConfigError, UserError
from agentrl.lab import ExactValues, run_lab
from agentrl.lab.exact import solve
from agentrl.lab.measure import explained, luck, sign_accuracy, spearman

LOCK: dict[str, Any] = {
    "id": "Lock-v0",
    "kwargs": {"length": 3, "symbols": 2, "reward": "shaped"},
    "instructions": "",
    "max_turns": 5,
}


def chain(ends: bool = False) -> Tabular:
    """Two states and two actions: the second action leads on, in the last state it solves; the first ends or stays."""
    solved = np.array([[False, False], [False, True]])
    return Tabular(
        keys=["s0", "s1"],
        observations=["at 0", "at 1"],
        actions=["no", "yes"],
        next_state=np.array([[0, 1], [1, 1]]),
        solved=solved,
        ended=solved | np.array([[ends, False], [ends, False]]),
        start=0,
    )


def brute_force(table: Tabular, pi: np.ndarray, state: int, turns: int) -> float:
    """Probability of solving, by following every path."""
    if turns == 0:
        return 0.0
    total = (1 - pi[state].sum()) * brute_force(table, pi, state, turns - 1)
    for action, p in enumerate(pi[state]):
        if table.solved[state, action]:
            total += p
        elif not table.ended[state, action]:
            total += p * brute_force(table, pi, int(table.next_state[state, action]), turns - 1)
    return float(total)


@pytest.mark.parametrize("ends", [False, True])
def test_values_are_the_probability_of_solving_in_the_turns_left(ends: bool) -> None:
    table, pi = chain(ends), np.array([[0.5, 0.3], [0.1, 0.6]])
    values, quality = solve(table, pi, 6)
    for h in range(7):
        for state in range(2):
            assert values[h, state] == pytest.approx(brute_force(table, pi, state, h))
    assert quality[3][1, 1] == 1
    assert quality[3][0, 0] == pytest.approx(0.0 if ends else values[2, 0])
    assert quality[3][0, 1] == pytest.approx(values[2, 1])


def test_advantages_average_to_zero_under_the_policy_and_agree_with_play(tmp_path: Path) -> None:
    from agentrl.models.load import load_model, load_tokenizer
    from agentrl.policy import Sampling, load_policy
    from agentrl.rollout import Collector, Task

    path = make_model(tmp_path / "model", EnvConfig(**LOCK))
    model, tokenizer = load_model(path), load_tokenizer(path)
    policy = load_policy("transformers", model=model, tokenizer=tokenizer)
    env = make("Lock-v0", **LOCK["kwargs"])
    env.reset(seed=3)
    table = env.unwrapped.tabular()
    exact = ExactValues(model, policy.chat, {"3": table}, instructions="", horizon=5)
    pi = exact._policies(model, policy.chat, "", 1.0, 10**6)["3"]
    assert np.all(pi > 0)
    for state, key in enumerate(table.keys):
        moves = [exact.advantage("3", key, action, 2) for action in table.actions]
        nothing = exact.advantage("3", key, None, 2)
        assert float(pi[state] @ moves + (1 - pi[state].sum()) * nothing) == pytest.approx(0, abs=1e-12)
    config = run_config(tmp_path / "run", path, env=LOCK)
    with Collector(policy, config.env, config.rollout, config.outcome) as collector:
        sampling = Sampling(temperature=1.0, max_new_tokens=3)
        played = collector.collect([Task(3, "g", members=600)], sampling=sampling).trajectories
    seen, expected = np.mean([t.success for t in played]), exact.values["3"][5][table.start]
    assert abs(seen - expected) < 4 * math.sqrt(max(expected * (1 - expected), 0.01) / len(played))


# --- measures ---


def test_rank_correlation_takes_ties_at_their_middle() -> None:
    assert spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    assert spearman(np.array([1.0, 1, 2, 2]), np.array([1.0, 2, 3, 4])) == pytest.approx(2 / math.sqrt(5))
    assert spearman(np.ones(4), np.arange(4.0)) == 0
    assert spearman(np.array([]), np.array([])) == 0


def test_signs_count_on_decisive_turns_only() -> None:
    truth = np.array([0.5, -0.5, 0.05, 0.2])
    assert sign_accuracy(np.array([1.0, 1.0, -1.0, 0.0]), truth) == pytest.approx((1 + 0 + 0.5) / 3)
    assert math.isnan(sign_accuracy(np.ones(1), np.array([0.01])))


def test_explained_variance_is_that_of_the_best_combination() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 4000))
    truth = 3 * a - b
    assert explained(truth, a, b) == pytest.approx(1)
    assert explained(truth, a) == pytest.approx(0.9, abs=0.02)
    assert explained(np.zeros(5), a[:5]) == 0


def test_luck_is_what_differs_between_equal_moves() -> None:
    keys = [(move, "s") for move in range(50) for _ in range(20)]
    random = np.random.default_rng(0)
    own = np.repeat(random.normal(size=50), 20)
    noise = random.normal(size=1000)
    assert luck(own, keys) == pytest.approx(0, abs=1e-12)
    assert luck(noise, keys) == pytest.approx(1, abs=0.1)
    assert luck(own + noise, keys) == pytest.approx(0.5, abs=0.12)
    assert math.isnan(luck(noise, list(range(1000))))
    assert math.isnan(luck(np.ones(1000), keys))


# --- the lab ---


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that opens small locks some of the time."""
    from toys import clone

    from agentrl.policy import load_policy

    env, folder = EnvConfig(**LOCK), tmp_path_factory.mktemp("lock")
    teacher = load_policy("lock-noisy-solver", skill=0.3)
    return clone(make_model(folder / "random", env), folder / "taught", env, teacher, 300, history="window(0)")


def configs_of(folder: Path, model: Path, **more: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "env": LOCK,
        "iterations": 2,
        "rollout": {"groups": 4, "group_size": 4, "history": "window(0)", "max_new_tokens": 3},
    } | more
    methods: dict[str, dict[str, Any]] = {
        "grpo": {"credit": {"method": "grpo"}},
        "oprl": {"credit": {"method": "oprl"}, "prm": {"lr": 1e-3, "centred": True, "reference": "frozen"}},
        "oprl again": {
            "credit": {"method": "oprl", "options": {"alpha": 0.5}},
            "prm": {"lr": 1e-3, "centred": True, "reference": "frozen"},
        },
        "prime": {"credit": {"method": "prime"}, "prm": {"lr": 1e-3, "loss": "ce"}},
        "ppo": {"credit": {"method": "ppo"}, "critic": {"lr": 1e-3}},
        "truth": {"credit": {"method": "ground_truth"}},
    }
    return {name: run_config(folder / name, model, **common, **settings) for name, settings in methods.items()}


def test_a_lab_scores_every_method_on_the_same_episodes(tmp_path: Path, taught: Path) -> None:
    configs = configs_of(tmp_path, taught)
    ticks: list[Any] = []
    scores = run_lab(configs, "grpo", resamples=2, on_iteration=ticks.append)
    assert [m["iteration"] for m in ticks] == [1, 2]
    assert list(scores) == list(configs)
    for name, score in scores.items():
        assert len(score.rank) == len(score.sign) == len(score.explained) == 2
        assert all(-1 <= value <= 1 for value in score.rank)
        assert (score.fresh_rank_reward is not None) == (name in ("oprl", "oprl again", "prime"))
        assert 0 <= score.luck <= 2
    assert scores["grpo"].rank_step == [0, 0]
    assert scores["oprl"].rank_reward == scores["oprl again"].rank_reward, "equal PRMs are one"
    assert scores["oprl"].rank_reward != scores["prime"].rank_reward
    assert abs(scores["oprl"].rank_reward_before) < abs(scores["oprl"].rank_reward[-1])
    assert scores["truth"].rank_step[0] > 0.2, "a shaped reward tells right symbols from wrong ones"
    again = run_lab(configs_of(tmp_path / "again", taught), "grpo", resamples=2)
    assert scores == again


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rollout": {"groups": 4, "group_size": 4, "history": "full"}}, UserError, "sees the state and nothing else"),
        ({"env": LOCK | {"instructions": None}}, UserError, "sees the state and nothing else"),
        ({"env": {"id": "Echo-v0", "instructions": "", "max_turns": 3}}, UserError, "'Echo-v0' has no exact values"),
    ],
)
def test_a_lab_without_the_truth_is_refused(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, taught: Path
) -> None:
    configs = {"grpo": configs_of(tmp_path, taught, **change)["grpo"]}
    with pytest.raises(error, match=message):
        run_lab(configs, "grpo", resamples=2)


def test_methods_that_would_see_other_episodes_are_refused(tmp_path: Path, taught: Path) -> None:
    configs = configs_of(tmp_path, taught)
    configs["oprl"].rollout.groups = 5
    with pytest.raises(ConfigError, match="methods 'grpo' and 'oprl' differ in 'rollout'"):
        run_lab(configs, "grpo")


def test_the_command_writes_every_figure(tmp_path: Path, taught: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentrl.cli.app import app

    monkeypatch.chdir(tmp_path)
    config = run_config(tmp_path / "x", taught, env=LOCK, iterations=2).model_dump(mode="json")
    config["rollout"] |= {"groups": 3, "group_size": 4}
    config["eval"]["every"] = 1
    for key in ("name", "run_dir", "seed"):
        del config[key]
    Path("lock.yaml").write_text(yaml.safe_dump(config))
    suite = {
        "out": "runs/lab",
        "seeds": [0, 1],
        "baseline": "grpo",
        "environments": {"lock": {"config": "lock.yaml"}},
        "methods": {
            "grpo": {"credit": {"method": "grpo"}},
            "oprl": {"credit": {"method": "oprl"}, "prm": {"lr": 1e-3}},
            "rloo": {"credit": {"method": "rloo"}},
        },
    }
    Path("suite.yaml").write_text(yaml.safe_dump(suite))
    command = ["credit-lab", "suite.yaml", "--method", "oprl", "--resamples", "2", "--json", "figures.json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    figures = json.loads(Path("figures.json").read_text())
    assert set(figures["environments"]["lock"]) == {"grpo", "oprl"}, "the baseline always plays"
    assert len(figures["environments"]["lock"]["oprl"]["rank"]) == 2
    assert figures == json.loads(Path("runs/lab/credit_lab.json").read_text())
    assert Path("runs/lab/credit_lab_lock.png").stat().st_size > 10_000
    table = Path("runs/lab/credit_lab.md").read_text()
    mean = sum(figures["environments"]["lock"]["oprl"]["fresh_rank"]) / 2
    assert f"| oprl | {mean:.2f} (" in table
    assert "| oprl |" in table.split("turn rewards of the implicit PRM")[1]
    before = {path: path.stat().st_mtime_ns for path in Path("runs/lab").rglob("metrics.jsonl")}
    again = CliRunner().invoke(app, command)
    assert "2 of 2 environments x seeds were scored before" in again.output
    assert json.loads(Path("figures.json").read_text()) == figures
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs/lab").rglob("metrics.jsonl")}
    bad = CliRunner().invoke(app, ["credit-lab", "suite.yaml", "--method", "oprk"])
    assert bad.exit_code == 2
    assert "did you mean 'oprl'" in bad.output
