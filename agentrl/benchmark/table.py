"""What a benchmark found: one table of success and one of cost for each environment, as JSON, markdown and cells.

Evaluations happen between iterations; ``elapsed`` contains them and the checkpoints, ``seconds`` of an iteration does
not. Seconds are those of a process with one thread and busy neighbours, and comparable only because all runs are so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from agentrl.benchmark.suite import Run, Suite
from agentrl.evaluate.stats import Interval, bootstrap_mean

LATE = 0.8
"""A run's final success is the mean of its evaluations after this share of its iterations: one alone, on 256 tasks, has
an interval of +-5 points and falls where the curve happens to be."""

PARTS = ("generation", "environment", "prm", "policy", "other")

Records = Sequence[Mapping[str, Any]]
"""The lines of a run's metrics."""

Results = Mapping[tuple[str, str, int], Records]
"""(environment, method, seed) -> metrics, of complete runs."""


def held_out(records: Records, x: str = "iteration") -> list[tuple[float, float]]:
    """Returns (x, held-out success) of a run's evaluations; `x` is ``iteration`` or ``elapsed`` (seconds)."""
    return [(float(r.get(x) or 0.0), r["eval"]["success"]["value"]) for r in records if r.get("eval")]


def run_figures(records: Records, level: float) -> dict[str, Any]:
    """Returns the figures of one run: success in [0, 1], times in wall seconds; None where `level` was not reached."""
    curve, clock = held_out(records), held_out(records, "elapsed")
    values = [value for _, value in curve]
    late = [value for x, value in curve if x > LATE * curve[-1][0]] or values[-1:]
    spent = [record["seconds"] for record in records if record.get("seconds")]
    parts = {part: fmean(seconds.get(part, 0.0) for seconds in spent) for part in PARTS}
    return {
        "start": values[0],
        "final": fmean(late),
        "area": fmean(values),
        "best": max(values),
        "iterations_to_level": _first(curve, level),
        "seconds_to_level": _first(clock, level),
        "seconds_per_iteration": sum(parts.values()),
        "seconds": parts,
    }


def paired(ours: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]], key: str) -> Interval | None:
    """Returns the mean difference ours - theirs over the seeds that both have, with a 95 % bootstrap interval.

    Seeds are resampled (percentile bootstrap, itself seeded). **Three seeds are very few**: all resamples are the same
    seed with probability 1/27 > 2.5 % each, so that the interval is the smallest and the largest of the three
    differences, which holds the true median difference with probability 75 % and not 95 %.
    """
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    return bootstrap_mean([ours[seed][key] - theirs[seed][key] for seed in seeds], seeds)


def summarise(suite: Suite, results: Results, runs: Sequence[Run]) -> dict[str, Any]:
    """Returns all figures of a benchmark, as JSON types.

    Args:
        suite: names, baseline and level.
        results: metrics of the runs that are complete.
        runs: all runs of the suite; those without a result are listed as missing.
    """
    environments = {}
    for environment in suite.environments:
        figures: dict[str, dict[int, Any]] = {method: {} for method in suite.methods}
        for (place, method, seed), records in results.items():
            if place == environment:
                figures[method][seed] = run_figures(records, suite.level)
        missing = [r for r in runs if r.environment == environment and r.seed not in figures[r.method]]
        baseline = figures[suite.baseline]
        environments[environment] = {
            "methods": [_method(name, own, baseline) for name, own in figures.items() if own],
            "missing": {m: seeds for m in suite.methods if (seeds := [r.seed for r in missing if r.method == m])},
        }
    return {
        "name": suite.name,
        "baseline": suite.baseline,
        "level": suite.level,
        "late": LATE,
        "seeds": suite.seeds,
        "environments": environments,
    }


def success_cells(summary: Mapping[str, Any], environment: str) -> list[list[str]]:
    """Returns the table of success of an environment: the head, then a row for each method."""
    baseline = summary["baseline"]
    paired_seeds = max((row["paired_seeds"] for row in summary["environments"][environment]["methods"]), default=0)
    over = f"over {baseline} [{'95%' if paired_seeds > 3 else 'range'}]"
    head = ["method", "seeds", "final success (sd)", "each seed", over, "whole run (sd)", over]
    rows = [
        [
            row["method"],
            str(len(row["seeds"])),
            _spread(row["final"]),
            ", ".join(f"{value:.1%}" for value in row["final"]),
            _points(row, "final", baseline),
            _spread(row["area"]),
            _points(row, "area", baseline),
        ]
        for row in summary["environments"][environment]["methods"]
    ]
    return [head, *rows]


def cost_cells(summary: Mapping[str, Any], environment: str) -> list[list[str]]:
    """Returns the table of cost of an environment: the head, then a row for each method."""
    level = f"{summary['level']:.0%}"
    head = ["method", f"iterations to {level}", f"seconds to {level}", "s/iteration", f"of {summary['baseline']}"]
    rows = [
        [
            row["method"],
            _reached(row["iterations_to_level"]),
            _reached(row["seconds_to_level"]),
            f"{fmean(row['seconds_per_iteration']):.2f}",
            "-" if row["seconds_ratio"] is None else f"{row['seconds_ratio']:.2f}x",
            *(f"{row['seconds'][part]:.2f}" for part in PARTS),
        ]
        for row in summary["environments"][environment]["methods"]
    ]
    return [[*head, *PARTS], *rows]


def notes(summary: Mapping[str, Any]) -> list[str]:
    """Returns what a reader must know of the tables."""
    n = max((row["paired_seeds"] for e in summary["environments"].values() for row in e["methods"]), default=0)
    if n < 2:
        doubt = "One seed has no spread and no interval."
    elif n <= 3:
        doubt = (
            f"With {n} seeds it is the smallest and the largest difference, and holds the true median difference with "
            f"probability {1 - 2.0 ** (1 - n):.0%}, not 95 %."
        )
    else:
        doubt = f"It resamples {n} seeds, and is too narrow for so few." if n < 10 else f"It resamples {n} seeds."
    found = [
        f"Final success: mean of the held-out evaluations after {summary['late']:.0%} of a run; whole run: of all. "
        "In parentheses the standard deviation over seeds.",
        f"Over {summary['baseline']}: points, paired by seed, in brackets a percentile bootstrap interval. {doubt}",
        "Iterations and seconds to a level: the first evaluation at or above it, each seed; - where none was. Seconds "
        "to it contain the evaluations before it, seconds per iteration and their parts none.",
    ]
    for name, environment in summary["environments"].items():
        if environment["missing"]:
            gaps = "; ".join(f"{m} (seed {', '.join(map(str, s))})" for m, s in environment["missing"].items())
            found.append(f"Missing in {name}: {gaps}.")
    return found


def markdown(summary: Mapping[str, Any]) -> str:
    """Returns the whole report: for each environment both tables, then the notes."""
    parts = [f"# {summary['name']}"]
    for environment in summary["environments"]:
        parts.append(f"## {environment}")
        parts += [_markdown_table(cells(summary, environment)) for cells in (success_cells, cost_cells)]
    parts.append("\n".join(f"* {note}" for note in notes(summary)))
    return "\n\n".join(parts) + "\n"


def _method(name: str, own: Mapping[int, Any], baseline: Mapping[int, Any]) -> dict[str, Any]:
    """Figures of a method: a list over its seeds for each, and its paired differences to the baseline."""
    seeds = sorted(own)
    listed = {
        key: [own[seed][key] for seed in seeds]
        for key in (
            "start",
            "final",
            "area",
            "best",
            "iterations_to_level",
            "seconds_to_level",
            "seconds_per_iteration",
        )
    }
    both = [seed for seed in seeds if seed in baseline]
    differences = {key: paired(own, baseline, key) for key in ("final", "area")}
    return {
        "method": name,
        "seeds": seeds,
        **listed,
        "paired_seeds": len(both),
        "difference": {key: None if value is None else value.model_dump() for key, value in differences.items()},
        "seconds_ratio": _ratio([own[s] for s in both], [baseline[s] for s in both], "seconds_per_iteration"),
        "seconds": {part: fmean(own[seed]["seconds"][part] for seed in seeds) for part in PARTS},
    }


def _ratio(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]], key: str) -> float | None:
    total = sum(figures[key] for figures in theirs)
    return sum(figures[key] for figures in ours) / total if total else None


def _first(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    return next((x for x, value in curve if value >= level), None)


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1%}" + (f" ({stdev(values):.1%})" if len(values) > 1 else "")


def _reached(values: Sequence[float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.0f}" for value in values)


def _points(row: Mapping[str, Any], key: str, baseline: str) -> str:
    difference = row["difference"][key]
    if difference is None or row["method"] == baseline:
        return "-"
    interval = (
        "" if difference["low"] is None else f" [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"
    )
    return f"{100 * difference['value']:+.1f}{interval}"


def _markdown_table(cells: Sequence[Sequence[str]]) -> str:
    head, *rows = cells
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
