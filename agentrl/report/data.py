"""Everything a report says, as one JSON-able summary and the trajectories' chunks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentrl import __version__
from agentrl.config import RunConfig, dotted
from agentrl.report import health
from agentrl.report.episodes import Cache, Shown, encode, load
from agentrl.report.runs import Run, find_runs

TRAJECTORIES = 2000
"""Shown in a report, unless told otherwise."""

IMAGE_MB = 16.0
"""Megabytes of pictures in a report, unless told otherwise."""


@dataclass
class Report:
    """What a page needs."""

    summary: dict[str, Any]
    """Runs, curves, health, counts, configuration, and the list of trajectories."""
    chunks: list[dict[str, Any]]
    """Texts of the trajectories (`agentrl.report.episodes`)."""
    images: list[str]
    """PNG files, base64."""


def make_report(
    paths: Sequence[Any],
    *,
    trajectories: int = TRAJECTORIES,
    image_mb: float = IMAGE_MB,
    on_file: Callable[[int, int], None] | None = None,
    cache: Cache | None = None,
) -> Report:
    """Reads runs and returns what is to be said of them.

    Args:
        paths: as `find_runs`.
        trajectories: largest number shown, over all runs; 0 = all.
        image_mb: largest size of all pictures, in megabytes of PNG.
        on_file: called with (files read, files) after each trajectory file.
        cache: of an earlier report of the same runs; spares reading files that have not changed.

    Raises:
        DataError: a path holds nothing to report on.
    """
    runs = find_runs(paths)
    loaded, shown = load(runs, trajectories, on_file, cache)
    encode(loaded, shown, runs, int(image_mb * 1e6))
    summary = {
        "version": __version__,
        "made": int(time.time()),
        "title": _title(runs),
        "runs": [_run(run) for run in runs],
        "defaults": _plain(dotted(RunConfig().model_dump(mode="json"))),
        "trajectories": _list(shown, len(loaded)),
    }
    return Report(summary, shown.chunks, shown.images)


def _run(run: Run) -> dict[str, Any]:
    # Where nothing was counted while it was played, the stored trajectories are.
    stops = health.stop_counts(run.evaluation or run.metrics) or dict(run.stops)
    return {
        "label": run.label,
        "family": run.family,
        "path": str(run.path),
        "seed": run.seed,
        "config": _plain(dotted(run.config)),
        "plan": run.plan,
        "versions": run.versions,
        "files": [file.name for file in run.files],
        "evaluation": run.evaluation,
        "episodes": {"scored": run.scored, "successes": run.successes, "failed": run.failed, "asked": run.asked},
        "notes": run.notes,
        "curves": curves(run.metrics),
        "stops": stops,
        "dropped": health.dropped(run.metrics) or health.dropped_by_stop(stops),
        "alarm": health.reward_alarm(run.metrics),
    }


def _list(shown: Shown, count: int) -> dict[str, Any]:
    return {
        "count": count,
        "found": shown.found,
        "columns": shown.columns,
        "scales": shown.scales,
        "vocabulary": {run: {str(id): text for id, text in texts.items()} for run, texts in shown.vocabulary.items()},
        "images_left_out": shown.images_left_out,
        "errors": dict(sorted(shown.errors.items(), key=lambda item: -item[1])[:20]),
        "calibration": health.calibration(shown.pairs),
        "notes": list(dict.fromkeys(shown.notes))[:20],
    }


def curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns metrics as columns of one length, nested names joined by ``/``; None where an iteration has no value."""
    flat = [_numbers(record) for record in metrics]
    names = dict.fromkeys(name for record in flat for name in record)
    return {name: [_round(record.get(name)) for record in flat] for name in names}


def _numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found


def _round(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values that JSON has no word for as text."""
    return {
        key: value if isinstance(value, (str, int, float, bool, list)) else _word(value)
        for key, value in settings.items()
    }


def _word(value: Any) -> Any:
    return None if value is None else str(value)


def _title(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(str(run.config.get("name") or "") for run in runs))
    if len(names) == 1 and (names[0] or len(runs) == 1):
        return names[0] or runs[0].path.resolve().name
    evaluations = sum(run.evaluation is not None for run in runs)
    counts = ((len(runs) - evaluations, "run"), (evaluations, "evaluation"))
    return ", ".join(f"{count} {what if count == 1 else what + 's'}" for count, what in counts if count)
