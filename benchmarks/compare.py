"""Methods x seeds with the same base model, budget and learning rate; a table with spread and two plots.

    python benchmarks/compare.py --base runs/demo/base --out runs/compare
    python benchmarks/compare.py --base runs/demo/base --methods oprl,rloo,grpo --seeds 0,1,2 --jobs 2

Runs that are complete in --out are not run again, so that the command can be stopped and repeated. Each run is one
process with one torch thread; as many run side by side as --jobs says. Wall time is therefore that of one core with a
busy neighbour, and comparable between methods only because all run so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from agentrl.report.curves import plot_methods
from agentrl.train.metrics import read_metrics

METHODS: dict[str, tuple[str, list[str]]] = {
    "oprl": ("configs/sokoban_oprl.yaml", []),
    "rloo": ("configs/sokoban_oprl.yaml", ["credit={method: rloo}"]),
    "grpo": ("configs/sokoban_oprl.yaml", ["credit={method: grpo}"]),
    "oprl-paper": ("configs/sokoban_oprl_paper.yaml", []),
}
LAST = 5
"""The final success of a run is the mean of its last evaluations: one alone has an interval of +-5 points."""


def run(method: str, seed: int, base: str, out: Path, overrides: list[str]) -> Path:
    """Trains one run unless it is complete; returns its folder."""
    folder = out / f"{method}-seed{seed}"
    if (folder / "done").exists():
        return folder
    config, settings = METHODS[method]
    command = [
        *(sys.executable, "-m", "agentrl", "train", config, "--overwrite", *settings, *overrides, f"seed={seed}"),
        *(f"run_dir={folder}", f"model.path={base}", "model.threads=1", "log.progress=false", "log.tensorboard=false"),
        *("buffer.write_trajectories=false", "checkpoint.every=100000"),
    ]
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{finished.stdout}\n{finished.stderr}")
    (folder / "done").write_text(f"{time.perf_counter() - started:.1f} s\n{' '.join(command)}\n")
    print(f"{folder.name}: {time.perf_counter() - started:.0f} s", flush=True)
    return folder


def held_out(records: list[dict[str, Any]], x: str) -> list[tuple[float, float]]:
    """(x, held-out success) of a run's evaluations."""
    return [(float(r.get(x) or 0.0), r["eval"]["success"]["value"]) for r in records if r.get("eval")]


def first_above(curve: list[tuple[float, float]], level: float) -> float | None:
    """x of the first evaluation at or above `level`."""
    return next((x for x, value in curve if value >= level), None)


def summary(method: str, runs: list[list[dict[str, Any]]], level: float) -> dict[str, Any]:
    """Means and spreads of a method's runs."""
    curves = [held_out(records, "iteration") for records in runs]
    clocks = [held_out(records, "elapsed") for records in runs]
    final = [fmean(value for _, value in curve[-LAST:]) for curve in curves]
    best = [max(value for _, value in curve) for curve in curves]
    area = [fmean(value for _, value in curve) for curve in curves]
    reached = [first_above(curve, level) for curve in curves]
    reached_s = [first_above(clock, level) for clock in clocks]
    return {
        "method": method,
        "seeds": len(runs),
        "base": fmean(curve[0][1] for curve in curves),
        "final": final,
        "final_mean": fmean(final),
        "final_sd": stdev(final) if len(final) > 1 else 0.0,
        "area": area,
        "area_mean": fmean(area),
        "area_sd": stdev(area) if len(area) > 1 else 0.0,
        "best": best,
        "iterations_to_level": reached,
        "seconds_to_level": reached_s,
        "seconds_per_iteration": fmean(records[-1]["elapsed"] / records[-1]["iteration"] for records in runs),
    }


def table(rows: list[dict[str, Any]], level: float) -> str:
    """Markdown table of the summaries."""

    def reached(values: list[float | None]) -> str:
        return ", ".join("-" if value is None else f"{value:.0f}" for value in values)

    lines = [
        f"| method | seeds | final success, mean of last {LAST} evaluations (sd over seeds) | each seed | "
        f"mean over the whole run (sd) | iterations to {level:.0%} | seconds to {level:.0%} | s / iteration |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['method']} | {row['seeds']} | {row['final_mean']:.1%} ({row['final_sd']:.1%}) | "
            f"{', '.join(f'{v:.1%}' for v in row['final'])} | {row['area_mean']:.1%} ({row['area_sd']:.1%}) | "
            f"{reached(row['iterations_to_level'])} | {reached(row['seconds_to_level'])} | "
            f"{row['seconds_per_iteration']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="runs/demo/base", help="model directory that every run starts from")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--methods", default="oprl,rloo,grpo")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--level", type=float, default=0.8, help="success level that the table counts to")
    parser.add_argument("--report", type=Path, help="also write table, plots and numbers to this folder")
    parser.add_argument("overrides", nargs="*", help="settings for every run, e.g. iterations=30")
    arguments = parser.parse_intermixed_args()
    methods, seeds = arguments.methods.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    jobs = [(method, seed) for seed in seeds for method in methods]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        pending = [pool.submit(run, m, s, arguments.base, arguments.out, arguments.overrides) for m, s in jobs]
        folders = dict(zip(jobs, (job.result() for job in pending), strict=True))
    records = {job: list(read_metrics(folder / "metrics.jsonl")) for job, folder in folders.items()}
    rows = [summary(method, [records[method, seed] for seed in seeds], arguments.level) for method in methods]
    print(table(rows, arguments.level))
    report = arguments.report or arguments.out
    report.mkdir(parents=True, exist_ok=True)
    (report / "compare.md").write_text(table(rows, arguments.level) + "\n")
    (report / "compare.json").write_text(json.dumps(rows, indent=1) + "\n")
    for x, label in (("iteration", "iteration"), ("elapsed", "wall seconds (one core)")):
        curves = {m: [held_out(records[m, seed], x) for seed in seeds] for m in methods}
        plot_methods(curves, report / f"compare_{x}.png", "Held-out success, mean and range over seeds", label)


if __name__ == "__main__":
    main()
