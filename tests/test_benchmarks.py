"""The benchmarks run, say what they should, and refuse to time two things that are not the same."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
STEP = ["--trajectories", "8", "--action-tokens", "2", "--repeat", "1", "--budget", "512"]
SAMPLER = ["--batch", "4", "--turns", "2", "--observation", "8", "--max-new-tokens", "4", "--repeat", "1"]


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark as its command does: from its own folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def step(load, monkeypatch):
    """The step benchmark on short episodes."""
    module = load("step")
    monkeypatch.setattr(module, "TURNS", 3)
    return module


def test_the_step_benchmark_prints_and_writes_every_figure(step, tmp_path, capsys):
    file = tmp_path / "step.json"
    result = step.main([*STEP, "--json", str(file)])
    assert json.loads(file.read_text()) == result
    assert set(result["phases"]) == {"sampling", "scoring", "prm_update", "policy_update"}
    for row in result["phases"].values():
        assert row["ratio"] > 0
        for side in ("ours", "padded"):
            assert row[side]["seconds"] > 0
            assert row[side]["tokens_per_second"] > 0
            assert 0 < row[side]["mfu"] < 1
    scoring = result["phases"]["scoring"]["ours"]
    assert scoring["tokens_per_second"] == pytest.approx(result["tokens"] / scoring["seconds"])
    assert set(result["difference"]) == {
        "logprob",
        "prm_update_gradient",
        "policy_update_gradient",
        "sampled_logprob",
    }
    assert max(result["difference"].values()) < 1e-4
    assert {"torch", "transformers", "threads", "device"} <= set(result["surroundings"])
    printed = capsys.readouterr().out
    for part in ("sampling", "scoring", "prm update", "policy update", "ours/padded", "peak", "seed=0", "threads=1"):
        assert part in printed


def test_bfloat16_passes_run_on_the_same_weights(step):
    result = step.main([*STEP, "--dtype", "bfloat16"])
    assert max(result["difference"][name] for name in ("logprob", "prm_update_gradient")) < 1e-4
    assert 1e-4 < result["difference"]["sampled_logprob"] < 0.5


@pytest.mark.parametrize(("method", "error"), [("_logprobs", 1e-3), ("_score", 1e-3), ("_step", None)])
def test_a_baseline_that_computes_something_else_is_not_timed(step, monkeypatch, method, error):
    plain = getattr(step.Padded, method)

    def wrong(self, *args):
        if error is not None:
            return plain(self, *args) + error
        clip, loss = args
        return plain(self, clip, lambda new, k: 1.001 * loss(new, k) + 1e-3 * new.sum())

    monkeypatch.setattr(step.Padded, method, wrong)
    with pytest.raises(SystemExit, match="do not compute the same thing"):
        step.main(STEP)


@pytest.mark.parametrize(("n", "action"), [(16, 8), (32, 4), (64, 32)])
def test_synthetic_episodes_have_the_share_of_observations_and_the_fill_that_they_claim(load, n, action):
    observations, limits = load("step").ragged_episodes(n, action, 512, seed=1)
    observed = np.array([sum(map(len, turns)) for turns in observations])
    lengths = observed + limits.sum(1)
    assert {len(turns) for turns in observations} == {10}
    assert observed.sum() / lengths.sum() == pytest.approx(0.8, abs=0.02)
    assert lengths.mean() / lengths.max() == pytest.approx(0.36, abs=0.04)


def test_the_flops_of_a_forward_pass_are_those_that_torch_counts(step):
    options = step.parse(STEP)
    task = step.Task(options)
    ours = step.Ours(task)
    with FlopCounterMode(display=False) as counter:
        ours.scoring()
    counted = counter.get_flop_counts()["Global"]
    products = sum(flops for name, flops in counted.items() if str(name).startswith("aten.mm"))
    config = task.model.config
    spans = sum(n * (n + 1) / 2 for n in task.lengths)
    attended = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * spans
    assert task.flops() - attended == pytest.approx(products, rel=0.01)


def test_the_sampler_benchmark_says_the_same_as_generate(load, tmp_path, capsys):
    file = tmp_path / "sampler.json"
    result = load("sampler").main([*SAMPLER, "--json", str(file)])
    assert json.loads(file.read_text()) == result
    assert result["greedy"]["same_actions"] == 1
    assert result["greedy"]["ours"]["tokens"] == result["greedy"]["generate"]["tokens"] > 0
    for name in ("greedy", "temperature_1"):
        assert result[name]["ratio"] > 0
        assert result[name]["ours"]["tokens_per_second"] > 0
    assert "ours/generate" in capsys.readouterr().out


def test_different_greedy_actions_end_the_benchmark(load, monkeypatch):
    sampler = load("sampler")
    plain = sampler.Episodes.ours
    monkeypatch.setattr(
        sampler.Episodes, "ours", lambda self, t: [[[*ids, 1] for ids in row] for row in plain(self, t)]
    )
    with pytest.raises(SystemExit, match="greedy actions differ, first in episode 0, turn 0"):
        sampler.main(SAMPLER)


def test_paired_timing_takes_turns_and_turns_round(load):
    order = []
    sides = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    timed = load("common").paired(sides, 3, "cpu")
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert all(len(seconds) == 3 for seconds, _ in timed.values())


def test_peak_memory_sees_what_was_freed_again(load):
    memory = load("common").PeakMemory("cpu")
    if memory.megabytes() is None:
        pytest.skip("this system does not tell")
    torch.ones(16 << 20).sum()  # 64 MiB
    assert memory.megabytes() > 60


def test_the_iteration_benchmark_gives_every_method_the_same_episodes(load, tmp_path, capsys):
    file = tmp_path / "iteration.json"
    root = BENCHMARKS.parent
    small = ["rollout.groups=1", "rollout.group_size=2", "env.max_turns=2", "env.kwargs.max_solution=2"]
    options = ["--config", f"{root}/configs/sokoban_oprl.yaml", "--suite", f"{root}/benchmarks/suite.yaml"]
    arguments = [*options, "--method", "oprl", "--method", "spro", "--repeat", "1", "--json", str(file), *small]
    result = load("iteration").main(arguments)
    assert list(result["methods"]) == ["grpo", "oprl", "spro"]
    assert result["methods"]["grpo"]["ratio"] == 1
    assert result["methods"]["oprl"]["seconds"]["prm"] > result["methods"]["grpo"]["seconds"]["prm"]
    assert {m["seconds"]["generation"] for m in result["methods"].values()} == {
        result["methods"]["grpo"]["seconds"]["generation"]
    }
    assert json.loads(file.read_text()) == result
    assert "of grpo" in capsys.readouterr().out


@pytest.mark.slow
def test_the_server_benchmark_measures_our_side_where_openenv_is_not_installed(load, tmp_path, capsys):
    module = load("env_server")
    missing = tmp_path / "python"
    missing.write_text("#!/bin/sh\nexit 1\n")
    missing.chmod(0o755)
    options = ["--sessions", "4", "--steps", "20", "--seconds", "0.2", "--repeat", "1", "--openenv", str(missing)]
    result = module.main([*options, "--json", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    assert set(result["figures"]) == {"sequential", "4 sessions, single", "4 sessions, batch"}
    assert 0 < result["figures"]["sequential"]["ours"]["p50_ms"] <= result["figures"]["sequential"]["ours"]["p99_ms"]
    assert result["figures"]["4 sessions, batch"]["ours"]["steps_per_second"] > 0
    assert result["ratios"]["sequential"] == {}
    assert "openenv=not installed" in capsys.readouterr().out


def test_the_server_benchmarks_ratios_say_how_many_times_better_ours_is(load):
    figures = {"ours": {"steps_per_second": 30.0, "kb_per_session": 2.0}}
    figures["openenv"] = {"steps_per_second": 10.0, "kb_per_session": 8.0}
    assert load("env_server")._ratio(figures) == {"steps_per_second": 3.0, "kb_per_session": 4.0}
    assert load("env_server")._ratio({"ours": {"p50_ms": 1.0}, "openenv": {"p50_ms": 3.0}}) == {"p50_ms": 3.0}


@pytest.fixture
def step_of():
    """A step as a side of the TRL benchmark tells it."""

    def step(seconds, tokens):
        facts = {"turns": 3.5, "success": 0.5, "parts": {"generation": seconds / 2}}
        return {"seconds": seconds, "cpu_seconds": seconds, "tokens": tokens, **facts}

    return step


def test_the_trl_benchmarks_speedup_is_of_tokens_per_second_so_that_shorter_episodes_gain_nothing(load, step_of):
    rounds = [{"trl": [step_of(4.0, 2000)], "grpo": [step_of(1.0, 1000)], "oprl": [step_of(2.0, 2000)]}]
    result = load("vs_trl").compare([*rounds, *rounds])
    assert (result["speedup_grpo"], result["speedup_oprl"]) == (2.0, 2.0)
    assert (result["seconds_ratio_grpo"], result["tokens_ratio_grpo"]) == (4.0, 0.5)
    assert result["sides"]["trl"]["parts"] == {"generation": 2.0}


def test_the_trl_benchmark_times_no_sides_that_read_other_tokens(load):
    facts = {"trl": {"probe": [1, 2], "parameters": 9}, "grpo": {"probe": [1, 3], "parameters": 9}}
    with pytest.raises(SystemExit, match=r"trl and grpo differ in probe"):
        load("vs_trl").check_same(facts)


def test_the_guessing_game_ends_with_a_farewell_and_is_won_by_the_right_number_alone(load):
    env = load("guessing_env").Guessing()
    game = load("guessing")
    for right in (True, False):
        env.reset(seed=3)
        number = env.game.secret if right else env.game.secret % game.HIGHEST + 1
        observation, _, terminated, *_ = env.step(game.call(number))
        assert observation.startswith("<tool_response>")
        assert not terminated
        *_, terminated, _, info = env.step(game.FAREWELL)
        assert terminated
        assert info["success"] is right


@pytest.mark.slow
def test_our_side_of_the_trl_benchmark_trains_by_turns(load, tmp_path):
    """Without TRL: its template is stood in for by one that shows no tools."""
    from agentrl.models.init import CHAT_TEMPLATE

    load("guessing_env").make_model(tmp_path / "model", CHAT_TEMPLATE, episodes=40, seed=0, threads=1)
    settings = {"seed": 0, "threads": 1, "groups": 2, "group_size": 4, "lr": 1e-6, "model": str(tmp_path / "model")}
    settings |= {"steps": 4, "temperature": 1.0, "max_new_tokens": 8, "max_tokens": 512}
    module = load("vs_trl")
    with module.sides({"grpo": sys.executable, "oprl": sys.executable}, settings, tmp_path) as found:
        assert found["grpo"].facts["probe"] == found["oprl"].facts["probe"]
        for side in found.values():
            first, second = side.take_turn(2)
            assert first["tokens"] > 0
            assert second["seconds"] > sum(second["parts"].values()) * 0.5
            assert 1 <= second["turns"] <= 6


@pytest.mark.slow
def test_the_remote_training_benchmark_trains_both_sides(load, warm, tmp_path, capsys):
    config = str(BENCHMARKS.parent / "configs" / "sokoban_oprl.yaml")
    options = ["--config", config, "--base", str(warm), "--iterations", "1", "--repeat", "1", "--work", str(tmp_path)]
    result = load("remote_training").main([*options, "rollout.groups=2", "rollout.group_size=4"])
    assert result["ratio"] == result["ratios"][0] > 0
    assert "remote / local" in capsys.readouterr().out
    urls = [json.loads(line)["env"] for line in _trajectories(tmp_path / "remote")]
    assert len(urls) == 8
    assert all(url.startswith("http://127.0.0.1:") for url in urls)


def _trajectories(run: Path) -> list[str]:
    return [line for file in sorted((run / "trajectories").glob("*.jsonl")) for line in file.read_text().splitlines()]
