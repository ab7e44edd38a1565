"""Metrics of a run: one JSON object per line in ``metrics.jsonl``, and the same scalars for TensorBoard and trackers.

The file is the record; the others are mirrors. A mirror that fails ends no run: one line says so, and it gets no more.

A number that is not finite is written as null: JSON has no NaN, and a metric that does not exist in an iteration (pair
accuracy without a pair) is no number.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentrl.errors import DataError, UserError
from agentrl.files import atomic_write

if TYPE_CHECKING:
    from agentrl.rollout import Collected
    from agentrl.train.trackers import Tracker

FILE_NAME = "metrics.jsonl"


class MetricsLog:
    """Appends the metrics of each iteration to ``run_dir/metrics.jsonl``; every line is on disk when `write` returns.

    Args:
        run_dir: folder of the run; made where it is missing.
        tensorboard: also write scalars to ``run_dir/tensorboard``; one line says so where it is not installed.
        trackers: get the same scalars, and are closed with the log. One that raises is left out from then on.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self, run_dir: str | os.PathLike[str], tensorboard: bool = False, trackers: Sequence[Tracker] = ()
    ) -> None:
        self.path = Path(run_dir) / FILE_NAME
        self._tensorboard = tensorboard
        self._trackers = list(trackers)
        self._writer: Any = None
        self._purge_step: int | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def write(self, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line: ``{"iteration": iteration, **metrics}``. Values: numbers, strings, nested mappings, lists.

        Raises:
            UserError: the disk is full or gone.
        """
        record = {"iteration": iteration, **{key: _plain(value) for key, value in metrics.items()}}
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error
        if not self._tensorboard and not self._trackers:
            return
        scalars = dict(_scalars(record, ""))
        if self._tensorboard:
            self._tensorboard = self._mirrored("TensorBoard", partial(self._write_scalars, iteration, scalars))
        self._trackers = [
            one for one in self._trackers if self._mirrored(_name(one), partial(one.write, iteration, scalars))
        ]

    def truncate_after(self, iteration: int) -> None:
        """Drops the lines of later iterations, and a last line that a kill cut off: a resumed run writes them anew."""
        self._file.close()
        kept = [record for record in read_metrics(self.path) if record["iteration"] <= iteration]
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(record, allow_nan=False).encode() + b"\n" for record in kept)
        self._file = self.path.open("a", encoding="utf-8")
        self._purge_step = iteration + 1

    def close(self) -> None:
        """Closes the files. The log cannot be written afterwards."""
        self._file.close()
        if self._writer is not None and self._tensorboard:
            self._mirrored("TensorBoard", self._writer.close)
        for tracker in self._trackers:
            self._mirrored(_name(tracker), tracker.close)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mirrored(self, name: str, act: Callable[[], None]) -> bool:
        """Returns whether `act` of the mirror `name` went well; says on standard error that it did not."""
        try:
            act()
        except Exception as error:  # each package has errors of its own; none is a reason to stop training
            reason = f"{type(error).__name__}: {error}"
            print(f"{name} failed and gets no more metrics ({reason}); {self.path} goes on", file=sys.stderr)
            return False
        return True

    def _write_scalars(self, iteration: int, scalars: Mapping[str, float]) -> None:
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(f"not installed? pip install tensorboard: {error}") from None
            self._writer = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=self._purge_step)
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, iteration)
        self._writer.flush()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the lines of a ``metrics.jsonl`` file (or of the one in the folder `path`), oldest first.

    A last line without its end is left out: it is being written, or a kill cut it off.

    Raises:
        DataError: no such file, or a broken line; names file and line.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read metrics {str(path)!r}: {error.strerror or error}") from None
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = json.loads(line)
            if not isinstance(record["iteration"], int):
                raise ValueError(f"iteration is {record['iteration']!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} line {number} holds no metrics: {error}") from None
        records.append(record)
    return records


def rollout_metrics(collected: Collected) -> dict[str, Any]:
    """Returns means over the scorable trajectories, and counts of everything, dropped episodes included."""
    kept = collected.trajectories
    turns = [turn for t in kept for turn in t.turns]
    n = max(1, len(kept))
    return {
        "success": sum(t.success for t in kept) / n,
        "outcome": sum(t.outcome for t in kept) / n,
        "turns": len(turns) / n,
        "invalid_actions": sum(turn.info.get("valid_action") is False for turn in turns) / max(1, len(turns)),
        "truncated": sum(t.truncated for t in kept) / n,
        "episodes": len(kept),
        "episodes_failed": len(collected.failed),
        "episodes_retried": collected.retried,
        "stop_reasons": collected.counts,
    }


def peak_memory_mb(device: str = "cpu") -> float:
    """Returns the most memory held at once so far, in MB (2^20 bytes): of the device, or of this process on a CPU."""
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.max_memory_allocated(device) / 2**20)
    import resource  # not on Windows

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20


class Clock:
    """Wall seconds of an iteration by part; ``prm`` holds all judges, ``policy`` the critic's update too."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("generation", "environment", "prm", "policy", "other"), 0.0)
        self._at = time.perf_counter()

    def lap(self, part: str) -> None:
        """Gives the time since the last lap to `part`."""
        now = time.perf_counter()
        self.seconds[part] += now - self._at
        self._at = now

    def split(self, rollout: dict[str, float]) -> None:
        """Divides the time of a rollout that has just ended."""
        before = self.seconds["other"]
        self.lap("other")
        spent = self.seconds["other"] - before
        self.seconds["generation"] += rollout["policy"]
        self.seconds["environment"] += rollout["environment"]
        self.seconds["other"] = before + max(0.0, spent - rollout["policy"] - rollout["environment"])


def _plain(value: Any) -> Any:
    """Returns `value` as JSON types; tensors and numpy scalars by their `item`, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _name(tracker: Tracker) -> str:
    return f"tracker {type(tracker).__name__.removesuffix('Tracker').lower()}"


def _scalars(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "iteration":
            yield f"{prefix}{key}", float(value)
