"""Whole runs on a game of words: each method learns it, and the PRM learns to tell good episodes from bad ones."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from toys import run_config

from agentrl.train.metrics import read_metrics
from agentrl.train.trainer import train

METHODS: dict[str, dict[str, Any]] = {
    "rloo": {"credit": {"method": "rloo"}},
    "grpo": {"credit": {"method": "grpo"}},
    "oprl": {"credit": {"method": "oprl", "options": {"alpha": 0.3}}, "prm": {"lr": 1e-3}},
}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method: str, seed: int, tmp_path: Path, hesitant: Path) -> None:
    config = run_config(
        tmp_path / "run",
        hesitant,
        seed=seed,
        iterations=16,
        env={"id": "Echo-v0"},
        rollout={"groups": 8, "group_size": 8, "history": "full", "max_new_tokens": 3},
        checkpoint__every=16,
        eval={"every": 16, "episodes": 100},
        **METHODS[method],
    )
    train(config)
    records = read_metrics(tmp_path / "run")
    before, after = (record["eval"]["success"] for record in records if record.get("eval"))
    assert before["value"] < 0.3
    assert after["value"] > 0.6
    assert after["low"] > before["high"]
    success = [record["success"] for record in records[1:]]
    assert fmean(success[-4:]) > 2.5 * fmean(success[:4])
    if method == "oprl":
        # Every new batch is judged before the PRM has learned from it.
        accuracy = [record["pair_accuracy"] for record in records[1:] if record.get("pair_accuracy") is not None]
        assert fmean(accuracy[-6:]) > 0.8
        assert all(record["prm_moved"] > 0 for record in records[1:] if record["prm_steps"])
        assert records[-1]["prm_skill"] > 0.2
