"""Experiment trackers beside ``metrics.jsonl``: one tiny interface, a class for each (``log.trackers: [wandb]``).

A tracker gets the scalars of every iteration under the names that `metrics.jsonl` has, nested ones joined by ``/``. It
is a mirror: the file is the record, and a tracker that fails is left out while the run goes on. Each remembers its run
in ``run_dir/tracker-*.json``, so that a resumed run goes on in the same one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from agentrl.config import dotted
from agentrl.errors import UserError, unknown_name
from agentrl.files import atomic_write


class Tracker(Protocol):
    """Where scalars go."""

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Takes the scalars of an iteration. An iteration that comes twice replaces the first or stands beside it."""

    def close(self) -> None:
        """Ends the run, and waits until what was written is kept."""


class WandbTracker:
    """Weights & Biases. Account, server and mode come from its own variables (``WANDB_MODE=offline``, ...).

    Args:
        run_dir: of the run; wandb's own files go to its folder ``wandb``.
        name: of the run; also the project where ``WANDB_PROJECT`` is not set.
        config: resolved configuration, shown with the run.
    """

    def __init__(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        known = _remembered(run_dir, "wandb")
        self._run = wandb.init(
            dir=str(run_dir),
            project=os.environ.get("WANDB_PROJECT") or "agentrl",
            name=name,
            id=known.get("id"),
            resume="allow" if known else None,
            config=dict(config),
        )
        # wandb's own step cannot go back, which a resumed run does: the iteration is a metric, and the axis of all.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        _remember(run_dir, "wandb", {"id": self._run.id})

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **scalars})

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """MLflow. The server is ``MLFLOW_TRACKING_URI``; without it runs go to the folder ``mlruns`` of the run's folder.

    Args:
        run_dir: of the run.
        name: of the run.
        config: resolved configuration; its dotted keys become parameters.
    """

    def __init__(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (run_dir / "mlruns").resolve().as_uri()
            # MLflow asks for a yes before it keeps runs in plain files.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        known = _remembered(run_dir, "mlflow")
        if known:
            self._id = known["id"]
            self._client.update_run(self._id, status="RUNNING")
            return
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "agentrl"
        experiment = self._client.get_experiment_by_name(title)
        number = experiment.experiment_id if experiment is not None else self._client.create_experiment(title)
        self._id = self._client.create_run(number, run_name=name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in dotted(config).items()]
        for start in range(0, len(params), 100):  # a request holds no more
            self._client.log_batch(self._id, params=params[start : start + 100])
        _remember(run_dir, "mlflow", {"id": self._id})

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(k, v, now, iteration) for k, v in scalars.items()])

    def close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}
"""Name in ``log.trackers`` -> tracker. The name is also that of the package it needs."""


def check_trackers(names: Sequence[str]) -> None:
    """Checks that the trackers exist and their packages are installed.

    Raises:
        UserError: unknown, or not installed; names the command that installs it.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError("log.trackers: " + unknown_name("tracker", name, TRACKERS))
        if find_spec(name) is None:
            raise UserError(f"log.trackers: {name} is not installed: pip install 'agentrl[{name}]'")


def make_trackers(names: Sequence[str], run_dir: Path, name: str, config: Mapping[str, Any]) -> list[Tracker]:
    """Returns the trackers called `names`, each with its run begun or gone on with.

    Args:
        names: entries of `TRACKERS`.
        run_dir: of the run.
        name: of the run.
        config: resolved configuration.

    Raises:
        UserError: as `check_trackers`, or a tracker refuses (no account, no server).
    """
    check_trackers(names)
    made: list[Tracker] = []
    for kind in dict.fromkeys(names):
        try:
            made.append(TRACKERS[kind](run_dir, name, config))
        except Exception as error:  # each package has errors of its own; all mean that its set-up needs a person
            for tracker in made:
                tracker.close()
            raise UserError(f"log.trackers: {kind} cannot start: {error}") from error
    return made


def _remembered(run_dir: Path, kind: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((run_dir / f"tracker-{kind}.json").read_text())
    except FileNotFoundError:
        return {}
    return found


def _remember(run_dir: Path, kind: str, values: Mapping[str, Any]) -> None:
    with atomic_write(run_dir / f"tracker-{kind}.json") as file:
        file.write(json.dumps(values).encode() + b"\n")
