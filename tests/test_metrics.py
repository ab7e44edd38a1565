"""The metrics file: one line per iteration, also after a kill and a resume."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from agentrl.errors import DataError, UserError
from agentrl.train.metrics import MetricsLog, read_metrics


def test_every_line_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run") as log:
        for iteration in range(3):
            log.write(iteration, {"loss": 0.5 * iteration, "seconds": {"policy": 1.0}, "stop": "x"})
            assert len(read_metrics(tmp_path / "run")) == iteration + 1
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[2] == {
        "iteration": 2,
        "loss": 1.0,
        "seconds": {"policy": 1.0},
        "stop": "x",
    }


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    values = {"nan": math.nan, "inf": -math.inf, "np": np.float32(0.5), "nested": {"a": [math.nan, np.int64(3)]}}
    with MetricsLog(tmp_path) as log:
        log.write(0, values)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "iteration": 0,
        "nan": None,
        "inf": None,
        "np": 0.5,
        "nested": {"a": [None, 3]},
    }


def test_resume_leaves_no_duplicates(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for iteration in range(5):
            log.write(iteration, {"run": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "ru')  # killed here
    assert [m["iteration"] for m in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    with MetricsLog(tmp_path) as log:
        log.truncate_after(2)
        for iteration in range(3, 5):
            log.write(iteration, {"run": 2})
    assert [(m["iteration"], m["run"]) for m in read_metrics(tmp_path)] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2)]


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read metrics"):
        read_metrics(tmp_path / "none")
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0}\n{"iteration": \n{"iteration": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2 holds no metrics"):
        read_metrics(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        MetricsLog(tmp_path / "file" / "run")


def test_without_tensorboard_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.write(0, {"loss": 1.0})
        log.write(1, {"loss": 2.0})
    notice = capsys.readouterr().err
    assert notice.count("\n") == 1
    assert str(tmp_path / "metrics.jsonl") in notice
    assert "pip install tensorboard" in notice
    assert len(read_metrics(tmp_path)) == 2


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(tmp_path, tensorboard=True) as log:
        for iteration in range(3):
            log.write(iteration, {"loss": float(iteration), "prm": {"accuracy": 0.5}, "note": "x", "none": math.nan})
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.truncate_after(0)
        log.write(1, {"loss": 10.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "prm/accuracy"}
    # The resumed run's step 1 replaces the old steps 1 and 2.
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0.0), (1, 10.0)]
