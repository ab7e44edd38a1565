"""What there is to report on: folders of runs and evaluations, folders of those, and plain trajectory files.

Reading is tolerant: a file that is missing, cut off or broken costs what it held and leaves a note, never the report.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agentrl.config import RunConfig
from agentrl.errors import DataError
from agentrl.evaluate.result import EvalReport
from agentrl.evaluate.store import RESULT, SETTINGS
from agentrl.report.health import COUNTS, TABLES
from agentrl.report.plain import is_count, plain, reason
from agentrl.train.metrics import FILE_NAME as METRICS
from agentrl.versions import VERSIONS

SIGNS = ("config.yaml", METRICS, "trajectories")
"""A folder with one of these is a run, or an evaluation."""


@dataclass
class Run:
    """One run, evaluation or file of trajectories, as far as it could be read."""

    path: Path
    label: str = ""
    """Its name beside the others."""
    family: str = ""
    """What it shares with runs that differ from it in their seed alone; an evaluation is one of its own."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    """Its configuration; of an evaluation its settings."""
    evaluation: list[dict[str, Any]] | None = None
    """The `EvalResult` of each environment, none before it is complete; None: this is no evaluation."""
    plan: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    """Trajectory files, in the order of the iterations."""
    notes: list[str] = field(default_factory=list)
    """What is absent or could not be read, in words."""
    scored: int = 0
    """Scorable episodes in its files (`agentrl.report.episodes.load` counts)."""
    successes: int = 0
    failed: int = 0
    """Episodes in its files that a failure of infrastructure ended."""
    stops: Counter[str] = field(default_factory=Counter)
    """How the episodes in its files ended."""

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def asked(self) -> int | None:
        """Episodes that an evaluation is of; None where its settings do not say, and of what is no evaluation."""
        each, envs = _under(self.config, "episodes"), _under(self.config, "environments")
        known = self.evaluation is not None and is_count(each) and isinstance(envs, list)
        return int(each) * len(envs) if known else None

    def credit_file(self, trajectories: Path) -> Path:
        """Where the credit of a trajectory file's turns lies, if it was stored."""
        return self.path / "credit" / trajectories.name

    def tokenizer_file(self) -> Path | None:
        """The tokenizer of the model that acted; None where there is none."""
        names = [_under(self.config, "model", "path"), _under(self.config, "policy", "options", "model")]
        folders = [self.path / "model", *(Path(name) for name in names if isinstance(name, str) and name)]
        return next((file for folder in folders if os.path.isfile(file := folder / "tokenizer.json")), None)


def find_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Reads the runs that `paths` name.

    Args:
        paths: each the folder of a run or of an evaluation, a trajectory file (``.jsonl``), a folder of such files, or
            a folder with runs or evaluations below.

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
    """Reads the folder of a run or an evaluation, or a trajectory file; what is missing or broken becomes a note."""
    run = Run(path)
    if path.is_file():
        run.files = [path]
        run.notes.append("A trajectory file alone: no metrics, no configuration and no credit belong to it.")
        return run
    stored = path / "trajectories"
    run.files = sorted((stored if stored.is_dir() else path).glob("*.jsonl"))
    run.files = [file for file in run.files if file.name != METRICS]
    if (path / SETTINGS).exists() and not any((path / name).exists() for name in SIGNS[:2]):
        if not run.files:
            run.notes.append("No trajectories are stored: no episode has ended yet.")
        _read_evaluation(path, run)
    else:
        if not run.files:
            run.notes.append("No trajectories are stored (buffer.write_trajectories=false keeps none).")
        run.metrics = _read_metrics(path / METRICS, run.notes)
        run.config = _read_config(path / "config.yaml", run.notes)
    try:
        run.plan = (path / "plan.txt").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        pass
    except OSError as error:
        run.notes.append(f"plan.txt cannot be read: {error.strerror or error}.")
    try:
        run.versions = {name: str(value) for name, value in _read_object(path / VERSIONS).items()}
    except FileNotFoundError:
        run.notes.append("Versions of packages are not recorded (made before versions.json was written).")
    except (OSError, ValueError, RecursionError) as error:
        run.notes.append(f"Versions of packages are not recorded: versions.json cannot be read: {reason(error)}.")
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
    if any((path / name).exists() for name in SIGNS) or _is_evaluation(path):
        return [path]
    below = sorted(
        {file.parent for name in SIGNS for file in path.rglob(name)}
        | {file.parent for file in path.rglob(SETTINGS) if _is_evaluation(file.parent)}
    )
    # What lies inside a run (checkpoints, a tracker's files) is no run of its own.
    below = [folder for folder in below if not any(other in folder.parents for other in below)]
    if below:
        return below
    if list(path.glob("*.jsonl")):
        return [path]
    raise DataError(f"{str(path)!r} holds no run (config.yaml, {METRICS}, trajectories/) and no .jsonl file")


def _is_evaluation(path: Path) -> bool:
    """Whether an evaluation was begun in a folder: before the first episode has ended its settings are all there is."""
    try:
        return {"policy", "environments"} <= _read_object(path / SETTINGS).keys()
    except (OSError, ValueError, RecursionError):
        return False


def _read_metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    records: dict[int, dict[str, Any]] = {}
    broken: list[int] = []
    odd: list[str] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        notes.append(f"No {METRICS}: there are no learning curves.")
        return []
    for number, line in enumerate(lines[:-1], 1):  # the last one is being written, or empty
        try:
            record = plain(json.loads(line))
            iteration = int(record["iteration"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            broken.append(number)
        else:
            odd += [f"{METRICS} line {number}: {what}" for what in _drop_odd(record)]
            records[iteration] = record | {"iteration": iteration}
    if broken:
        lines_are = "1 broken line" if len(broken) == 1 else f"{len(broken)} broken lines"
        notes.append(f"{lines_are} of {METRICS} left out, the first is line {broken[0]}.")
    if odd:
        notes.append(f"{odd[0]} is no count and left out{f' (and {len(odd) - 1} more)' if odd[1:] else ''}.")
    if not records:
        notes.append(f"{METRICS} holds no iteration yet: there are no learning curves.")
    return [records[number] for number in sorted(records)]


def _drop_odd(record: dict[str, Any]) -> list[str]:
    """Takes out of a line of metrics what should be a count, or a table of counts, and is none; says what that was."""
    odd = []
    for key in (key for key in COUNTS if record.get(key) is not None and not is_count(record[key])):
        odd.append(f"{key}={record.pop(key)!r:.60}")
    for key in (key for key in TABLES if record.get(key) is not None):
        table = record[key]
        if not isinstance(table, dict):
            odd.append(f"{key}={record.pop(key)!r:.60}")
            continue
        for name in [name for name, value in table.items() if not is_count(value)]:
            odd.append(f"{key}.{name}={table.pop(name)!r:.60}")
    return odd


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        config = plain(yaml.safe_load(path.read_text(encoding="utf-8")))
        if not isinstance(config, dict):
            raise ValueError("no mapping")
    except FileNotFoundError:
        notes.append("No config.yaml: the settings are not known.")
        return {}
    except Exception as error:  # besides its own errors yaml lets out whatever int(), float() or no match raise
        notes.append(f"config.yaml cannot be read: {reason(error)}.")
        return {}
    for name, section in RunConfig().model_dump().items():
        if isinstance(section, dict) and not isinstance(config.get(name, {}), dict | None):
            notes.append(f"config.yaml: {name}={config[name]!r:.60} is no section; its settings are not known.")
    return config


def _read_evaluation(path: Path, run: Run) -> None:
    """Reads what `agentrl.evaluate.store.EvalStore` has written."""
    try:
        run.config = _read_object(path / SETTINGS)
    except (OSError, ValueError, RecursionError) as error:
        run.notes.append(f"{SETTINGS} cannot be read: {reason(error)}.")
    run.evaluation = []
    try:
        found = EvalReport.model_validate_json((path / RESULT).read_bytes())
    except FileNotFoundError:
        run.notes.append(
            f"No {RESULT}: the evaluation is not complete, and figures are of the episodes played so far. "
            "Short ones end first, which biases rates."
        )
    except (OSError, ValueError) as error:
        run.notes.append(f"{RESULT} cannot be read, and figures are of the stored episodes: {reason(error)}.")
    else:
        run.evaluation = [one.model_dump(mode="json") for one in found.results]


def _read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read, or holds none.
    """
    found = plain(json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def _under(value: Any, *keys: str) -> Any:
    """What lies under nested keys; None where there is no such thing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _name(runs: Sequence[Run]) -> None:
    """Gives every run a label that no other has, and runs that differ in their seed alone one family.

    Evaluations that do are shown one by one: each has an interval of its own, and one may not be complete.
    """
    shared = Path(os.path.commonpath([run.path.resolve() for run in runs])) if len(runs) > 1 else None
    kin: dict[str, list[Run]] = {}
    for run in runs:
        where = run.path.resolve()
        run.label = str(where.relative_to(shared)) if shared else str(run.config.get("name") or where.name)
        settings = {key: value for key, value in run.config.items() if key not in ("seed", "name", "run_dir", "log")}
        alone = run.evaluation is not None or not settings
        kin.setdefault(run.label if alone else json.dumps(settings, sort_keys=True, default=str), []).append(run)
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
