"""What there is to report on: folders of runs, folders of runs in folders, and plain trajectory files.

Reading is tolerant: a file that is missing, cut off or broken costs what it held and leaves a note, never the report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agentrl.errors import DataError
from agentrl.train.metrics import FILE_NAME as METRICS

SIGNS = ("config.yaml", METRICS, "trajectories")
"""A folder with one of these is a run."""


@dataclass
class Run:
    """One run, or one file of trajectories, as far as it could be read."""

    path: Path
    label: str = ""
    """Its name beside the others."""
    family: str = ""
    """What it shares with runs that differ from it in their seed alone."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    plan: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    """Trajectory files, in the order of the iterations."""
    notes: list[str] = field(default_factory=list)
    """What is absent or could not be read, in words."""

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    def credit_file(self, trajectories: Path) -> Path:
        """Where the credit of a trajectory file's turns lies, if it was stored."""
        return self.path / "credit" / trajectories.name

    def tokenizer_file(self) -> Path | None:
        """The tokenizer of the model that acted; None where there is none."""
        start = (self.config.get("model") or {}).get("path")
        files = [folder / "tokenizer.json" for folder in (self.path / "model", *((Path(start),) if start else ()))]
        return next((file for file in files if file.is_file()), None)


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Reads the runs that `paths` name.

    Args:
        paths: each a run's folder, a trajectory file (``.jsonl``), a folder of such files, or a folder with runs below.

    Raises:
        DataError: a path that does not exist, or holds none of these.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        found += [one for one in _runs_at(path) if one not in found]
    runs = [read_run(path) for path in found]
    _name(runs)
    return runs


def read_run(path: Path) -> Run:
    """Reads one run's folder or trajectory file; what is missing or broken becomes a note."""
    run = Run(path)
    if path.is_file():
        run.files = [path]
        run.notes.append("A trajectory file alone: no metrics, no configuration and no credit belong to it.")
        return run
    stored = path / "trajectories"
    run.files = sorted((stored if stored.is_dir() else path).glob("*.jsonl"))
    run.files = [file for file in run.files if file.name != METRICS]
    if not run.files:
        run.notes.append("No trajectories are stored (buffer.write_trajectories=false keeps none).")
    run.metrics = _read_metrics(path / METRICS, run.notes)
    run.config = _read_config(path / "config.yaml", run.notes)
    if (path / "plan.txt").is_file():
        run.plan = (path / "plan.txt").read_text(encoding="utf-8", errors="replace")
    try:
        known = json.loads((path / "versions.json").read_text(encoding="utf-8"))
        run.versions = {str(name): str(value) for name, value in known.items()}
    except (OSError, ValueError, AttributeError):
        run.notes.append("Versions of packages are not recorded (runs made before versions.json was written).")
    if run.files and not any(run.credit_file(file).is_file() for file in run.files):
        run.notes.append("No credit is stored beside the trajectories: turns have no advantages and no step rewards.")
    return run


def _runs_at(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"nothing to report on: {str(path)!r} does not exist")
    if path.is_file():
        if path.suffix != ".jsonl":
            raise DataError(f"{str(path)!r} is neither a run's folder nor a trajectory file (.jsonl)")
        return [path.parent] if path.name == METRICS else [path]
    if any((path / name).exists() for name in SIGNS):
        return [path]
    below = sorted({file.parent for name in SIGNS[:2] for file in path.rglob(name)})
    # What lies inside a run (checkpoints, a tracker's files) is no run of its own.
    below = [folder for folder in below if not any(other in folder.parents for other in below)]
    if below:
        return below
    if list(path.glob("*.jsonl")):
        return [path]
    raise DataError(f"{str(path)!r} holds no run (config.yaml, {METRICS}, trajectories/) and no .jsonl file")


def _read_metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    records: dict[int, dict[str, Any]] = {}
    broken = 0
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        notes.append(f"No {METRICS}: there are no learning curves.")
        return []
    for line in lines[:-1]:  # the last one is being written, or empty
        try:
            record = json.loads(line)
            records[int(record["iteration"])] = record
        except (ValueError, KeyError, TypeError):
            broken += 1
    if broken:
        notes.append(f"{broken} broken {'line' if broken == 1 else 'lines'} of {METRICS} left out.")
    if not records:
        notes.append(f"{METRICS} holds no iteration yet: there are no learning curves.")
    return [records[number] for number in sorted(records)]


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no mapping")
    except FileNotFoundError:
        notes.append("No config.yaml: the settings are not known.")
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"config.yaml cannot be read: {str(error).splitlines()[0]}.")
    else:
        return config
    return {}


def _name(runs: Sequence[Run]) -> None:
    """Gives every run a label that no other has, and runs that differ in their seed alone one family."""
    shared = Path(os.path.commonpath([run.path.resolve() for run in runs])) if len(runs) > 1 else None
    kin: dict[str, list[Run]] = {}
    for run in runs:
        where = run.path.resolve()
        run.label = str(where.relative_to(shared)) if shared else (run.config.get("name") or where.name)
        settings = {key: value for key, value in run.config.items() if key not in ("seed", "name", "run_dir", "log")}
        kin.setdefault(json.dumps(settings, sort_keys=True, default=str) if settings else run.label, []).append(run)
    for members in kin.values():
        names = {str(Path(run.label).parent) for run in members}
        same = len(members) > 1 and len(names) == 1 and names != {"."}
        for run in members:
            run.family = names.copy().pop() if same else members[0].label
    taken: dict[str, str] = {}
    for key, members in kin.items():
        if taken.setdefault(members[0].family, key) != key:
            for run in members:
                run.family = run.label
