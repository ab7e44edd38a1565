"""Trackers get what metrics.jsonl gets, from the real packages, without a network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from agentrl.errors import ConfigError, UserError
from agentrl.train import trackers
from agentrl.train.metrics import MetricsLog, read_metrics
from agentrl.train.trackers import check_trackers, dotted, make_trackers

CONFIG = {"seed": 0, "env": {"id": "Toy-v0", "kwargs": {}}}


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed: pip install 'agentrl\[wandb\]'"):
        check_trackers(["wandb"])
    with pytest.raises(UserError, match=r"pip install 'agentrl\[mlflow\]'"):
        make_trackers(["mlflow"], Path(), "run", {})
    check_trackers([])


def test_an_unknown_tracker_is_refused() -> None:
    from agentrl.config import load_config

    with pytest.raises(UserError, match="no tracker 'wandbb'; did you mean 'wandb'"):
        check_trackers(["wandbb"])
    with pytest.raises(ConfigError, match=r"log\.trackers"):
        load_config(None, ["log.trackers=[comet]"])
    assert load_config(None, ["log.trackers=[wandb]"]).log.trackers == ["wandb"]


def test_the_log_gives_scalars_to_every_tracker_and_closes_it(tmp_path: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def write(self, iteration: int, scalars: Any) -> None:
            self.seen.append((iteration, scalars))

        def close(self) -> None:
            self.seen.append("closed")

    first, second = Recorder(), Recorder()
    with MetricsLog(tmp_path, trackers=[first, second]) as log:
        log.write(1, {"loss": 0.5, "seconds": {"policy": 2}, "note": "x", "none": None})
    assert first.seen == second.seen == [(1, {"loss": 0.5, "seconds/policy": 2.0}), "closed"]
    assert read_metrics(tmp_path)[0]["note"] == "x"


@pytest.mark.parametrize("fault", ["write", "close"])
def test_a_tracker_that_fails_ends_no_run_and_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def write(self, iteration: int, scalars: Any) -> None:
            self.seen.append(iteration)

        def close(self) -> None:
            self.seen.append("closed")

    class FlakyTracker(Recorder):
        def write(self, iteration: int, scalars: Any) -> None:
            super().write(iteration, scalars)
            if fault == "write" and iteration == 2:
                raise ConnectionError("server gone")

        def close(self) -> None:
            super().close()
            raise ConnectionError("server gone")

    flaky, good = FlakyTracker(), Recorder()
    with MetricsLog(tmp_path, trackers=[flaky, good]) as log:
        for iteration in (1, 2, 3):
            log.write(iteration, {"loss": 0.5})
    assert good.seen == [1, 2, 3, "closed"]
    assert flaky.seen == ([1, 2] if fault == "write" else [1, 2, 3, "closed"])
    assert [one["iteration"] for one in read_metrics(tmp_path)] == [1, 2, 3]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tracker flaky failed and gets no more metrics (ConnectionError: server gone)")


def test_a_tracker_that_cannot_start_says_so_and_the_others_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    class Good:
        def __init__(self, *given: Any) -> None:
            pass

        def close(self) -> None:
            closed.append("good")

    def refuse(*given: Any) -> Any:
        raise RuntimeError("no account")

    monkeypatch.setattr(trackers, "TRACKERS", {"json": Good, "ast": refuse})  # names of packages that are there
    with pytest.raises(UserError, match="ast cannot start: no account"):
        make_trackers(["json", "ast"], tmp_path, "run", CONFIG)
    assert closed == ["good"]


def test_dotted_keeps_empty_mappings() -> None:
    assert dotted(CONFIG) == {"seed": 0, "env.id": "Toy-v0", "env.kwargs": {}}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="pip install 'agentrl[mlflow]'")
def test_mlflow_keeps_metrics_and_parameters_and_goes_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    for values in ((0.5, 0.75), (1.0,)):
        with MetricsLog(tmp_path, trackers=make_trackers(["mlflow"], tmp_path, "toy", CONFIG)) as log:
            for n, value in enumerate(values):
                log.write(n + 1, {"success": value, "seconds": {"policy": 1.0}})
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    run = client.get_run(json.loads((tmp_path / "tracker-mlflow.json").read_text())["id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "toy"
    assert run.data.params["env.id"] == "Toy-v0"
    assert set(run.data.metrics) == {"success", "seconds/policy"}
    assert sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "success")) == [
        (1, 0.5),
        (1, 1.0),
        (2, 0.75),
    ]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="pip install 'agentrl[wandb]'")
def test_wandb_keeps_metrics_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with MetricsLog(tmp_path, trackers=make_trackers(["wandb"], tmp_path, "toy", CONFIG)) as log:
        log.write(1, {"success": 0.625, "seconds": {"policy": 1.0}})
    import wandb

    wandb.teardown()  # its service, a process of its own, writes on after the run has ended
    known = json.loads((tmp_path / "tracker-wandb.json").read_text())["id"]
    (stored,) = tmp_path.glob(f"wandb/offline-run-*-{known}/run-{known}.wandb")
    content = stored.read_bytes()
    assert b"seconds/policy" in content
    assert b"0.625" in content
