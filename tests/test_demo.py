"""``agentrl demo`` in small: what it writes, what it refuses, and that it repeats itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from agentrl.cli import app
from agentrl.train.metrics import read_metrics

SUCCESS = {"base_success", "final_success", "base_success_greedy", "final_success_greedy"}
CONFIG: dict[str, Any] = {
    "iterations": 2,
    "env": {
        "id": "Sokoban-v0",
        "kwargs": {"size": 6, "observation": "cells", "max_solution": 4, "split": "train"},
        "eval_kwargs": {"split": "test"},
        "instructions": "",
        "max_turns": 6,
    },
    "model": {"threads": 1},
    "rollout": {"groups": 2, "group_size": 4, "history": "window(0)", "max_new_tokens": 3},
    "credit": {"method": "oprl"},
    "prm": {"lr": 1e-4},
    "policy_update": {"lr": 1e-4},
    "eval": {"every": 1, "episodes": 8},
    "checkpoint": {"every": 100},
    "log": {"tensorboard": False, "progress": False},
}


def demo(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["demo", "--config", "small.yaml", *map(str, arguments)])


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(CONFIG))


def test_the_whole_story_in_small_and_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    small = ["--demonstrations", 40, "--levels", 10, "iterations=2", "rollout.groups=2", "eval.episodes=8"]
    result = demo("--out", "one", "--seed", 3, *small)
    assert result.exit_code == 0, result.output
    one = tmp_path / "one"
    summary = json.loads((one / "summary.json").read_text())
    assert set(summary) == SUCCESS | {"iterations", "seconds", "peak_rss_mb", "seed", "config_sha256"}
    for name in SUCCESS:
        assert set(summary[name]) == {"value", "low", "high", "episodes"}
        assert summary[name]["episodes"] == 10
        assert 0 <= summary[name]["low"] <= summary[name]["value"] <= summary[name]["high"] <= 1
    assert set(summary["seconds"]) == {"generation", "environment", "prm", "policy", "other"}
    assert sum(summary["seconds"].values()) > 0
    assert (summary["iterations"], summary["seed"]) == (2, 3)
    assert 100 < summary["peak_rss_mb"] < 3000
    assert re.fullmatch(r"[0-9a-f]{64}", summary["config_sha256"])
    assert b"</html>" in (one / "report.html").read_bytes()
    assert (one / "learning_curve.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert "10 held-out levels" in result.output
    assert f"{summary['final_success']['value']:.1%}" in result.output
    assert [record["iteration"] for record in read_metrics(one / "train")] == [0, 1, 2]
    for model in ("base", "train/model"):
        assert (one / model / "model.safetensors").exists()

    # A demo's folder is replaced, and the same seed in another folder gives the same numbers.
    (one / "train" / "left over").write_text("x")
    assert demo("--out", "two", "--seed", 3, *small).exit_code == 0
    again = json.loads((tmp_path / "two" / "summary.json").read_text())
    measured = {"seconds", "peak_rss_mb"}
    assert {k: v for k, v in again.items() if k not in measured} == {
        k: v for k, v in summary.items() if k not in measured
    }
    for model in ("base", "train/model"):
        weights = [(tmp_path / run / model / "model.safetensors").read_bytes() for run in ("one", "two")]
        assert weights[0] == weights[1]


def test_an_old_demo_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "demo.txt").write_text("a demo")
    (tmp_path / "runs" / "demo" / "old").write_text("x")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("agentrl.cli.demo.make_base", stop)
    assert demo().exit_code == 130
    assert [path.name for path in (tmp_path / "runs" / "demo").iterdir()] == ["demo.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "mine"], "'mine' holds something that is no demo; give another folder (--out)"),
        (["--out", "mine/thesis.tex"], "'mine/thesis.tex' holds something that is no demo"),
        (["--out", "mine/thesis.tex/demo"], "cannot write to mine/thesis.tex/demo"),
        (["--out", "new", "credit.method=opral"], "no credit method 'opral'; did you mean 'oprl'"),
        (["--out", "new", "env.kwargs.siz=6"], "'siz'"),
        (["--out", "new", "rollout.group_size=1"], "a group of one has no baseline"),
        (["--out", "new", "prm.bta=1"], "did you mean 'prm.beta'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_work_is_refused_before_a_demonstration_is_played(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("my own work")
    result = demo(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "my own work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "small.yaml"]


def test_an_interrupted_demo_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    from agentrl.train.trainer import Trainer

    real = Trainer.iterate

    def interrupted(trainer: Trainer) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(trainer)

    monkeypatch.setattr(Trainer, "iterate", interrupted)
    result = demo("--out", "cut", "--demonstrations", 20, "--levels", 4)
    assert result.exit_code == 0, result.output
    assert "agentrl train cut/train/config.yaml --resume" in result.output
    assert not (tmp_path / "cut" / "summary.json").exists()
    monkeypatch.setattr(Trainer, "iterate", real)
    result = CliRunner().invoke(app, ["train", "cut/train/config.yaml", "--resume"])
    assert result.exit_code == 0, result.output
    assert "2 of 2" in result.output
