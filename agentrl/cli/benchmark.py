"""``agentrl benchmark``: methods x seeds x environments from one file, and a table of what came out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agentrl.cli.common import EXIT_INTERRUPTED, ShownLessons, console, errors
from agentrl.errors import UserError
from agentrl.files import atomic_write, check_writable

if TYPE_CHECKING:
    from agentrl.benchmark.run import Failure, Runner
    from agentrl.benchmark.suite import Run, Suite

EXIT_RUN_FAILED = 1


def add_commands(app: typer.Typer) -> None:
    """Adds `benchmark`."""
    app.command("benchmark")(benchmark)


def benchmark(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="YAML file.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder, instead of the file's.")] = None,
    jobs: Annotated[int | None, typer.Option(metavar="N", min=1, help="Runs at once; default: the cores.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="ENV/METHOD", help="Only these runs, e.g. 'lock/*'; repeatable.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,N", help="Seeds, instead of the file's.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of table and curves; default: --out.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, list the runs, run nothing.")] = False,
) -> None:
    """Train methods x seeds x environments side by side, and compare them. The same command goes on where it stopped.

    Example:  [b]agentrl benchmark benchmarks/suite.yaml --seeds 0 --jobs 2[/b]
    """
    from agentrl.benchmark.suite import check_runs, load_suite, plan_runs, select

    settings = load_suite(suite)
    settings.out = str(out or settings.out)
    if seeds is not None:
        settings.seeds = parse_seeds(seeds)
    runs = plan_runs(settings)
    chosen = select(runs, only or [])
    jobs = jobs or cores()
    with errors.status("checking"):
        check_runs(settings, chosen)
    console.print(plan_table(settings, chosen, jobs))
    if dry_run:
        return
    if report is not None:
        check_writable(report)
    failed, stopped = train(settings, chosen, jobs)
    write_report(settings, runs, Path(report or settings.out))
    for failure in failed:
        errors.print(Text(f"{failure.run} failed, exit code {failure.code}:", style="bold red"))
        errors.print(Text(f"{failure.log}\n(all of it: {failure.run.folder / 'log.txt'})"))
    if stopped:
        errors.print("Stopped; the same command goes on.")
    if stopped or failed:
        raise typer.Exit(EXIT_INTERRUPTED if stopped else EXIT_RUN_FAILED)


def parse_seeds(text: str) -> list[int]:
    """Returns [0, 1] for ``0,1``.

    Raises:
        UserError: something else than numbers, each once.
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text}: give numbers with commas between them, e.g. --seeds 0,1,2") from None
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: a seed stands twice")
    return seeds


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan_table(suite: Suite, runs: Sequence[Run], jobs: int) -> Table:
    """Returns what there is to run: for each environment and method the seeds, by what lies in their folders."""
    from agentrl.benchmark.run import State, state_of

    states = {run: state_of(run) for run in runs}
    left = [run for run, state in states.items() if state != State.COMPLETE]
    episodes = sum(r.config.iterations * r.config.rollout.groups * r.config.rollout.group_size for r in left)
    table = Table(
        title=f"{suite.name}: {len(left)} of {len(runs)} runs to do, {jobs} at once, {episodes:,} training episodes",
        title_justify="left",
        title_style="bold",
    )
    for column in ("environment", "method", "iterations", *State):
        names = column in ("environment", "method")
        table.add_column(str(column), justify="left" if names else "right", no_wrap=names)
    for environment, method in dict.fromkeys((run.environment, run.method) for run in runs):
        own = [run for run in runs if (run.environment, run.method) == (environment, method)]
        seeds = [", ".join(str(run.seed) for run in own if states[run] == state) for state in State]
        table.add_row(environment, method, str(own[0].config.iterations), *seeds)
    return table


def train(suite: Suite, runs: Sequence[Run], jobs: int) -> tuple[list[Failure], bool]:
    """Makes the base models that are missing and trains the runs; returns the failed ones, and whether it was told to
    stop.

    Raises:
        UserError: the folder cannot be used, or a base model cannot be made.
    """
    from agentrl.benchmark.run import Runner, State, locked, make_bases, state_of

    def say(text: str) -> None:
        errors.print(Text(text), soft_wrap=True)

    with locked(suite.out) as lock:
        make_bases(suite, [run for run in runs if state_of(run) != State.COMPLETE], say, ShownLessons())
        runner = Runner(runs, jobs, lock, say)
        if errors.is_terminal:
            with Live(console=errors, refresh_per_second=2, transient=True) as live:
                runner.run(lambda runner: live.update(progress(runner)))
        else:
            runner.run()
    return runner.failed, runner.stopping


def progress(runner: Runner) -> Group:
    """Returns the picture of a benchmark at work: the running runs, and how many are done."""
    from agentrl.benchmark.run import iterations_of

    table = Table("run", "iteration", "held-out success", box=None)
    for run in runner.running:
        done, success = iterations_of(run)
        table.add_row(str(run), f"{done}/{run.config.iterations}", "-" if success is None else f"{success:.1%}")
    failed = f", {len(runner.failed)} failed" if runner.failed else ""
    line = f"{len(runner.complete)} of {runner.total} runs complete, {len(runner.waiting)} waiting{failed}"
    return Group(table, Text(line, style="bold"))


def write_report(suite: Suite, runs: Sequence[Run], folder: Path) -> None:
    """Prints the tables, and writes them with the figures and the curves: ``benchmark.md``, ``benchmark.json``, PNGs.

    Raises:
        UserError: the folder cannot be written.
    """
    from agentrl.benchmark.run import State, state_of
    from agentrl.benchmark.table import cost_cells, markdown, notes, success_cells, summarise
    from agentrl.train.metrics import read_metrics

    complete = [run for run in runs if state_of(run) == State.COMPLETE]
    results = {(run.environment, run.method, run.seed): read_metrics(run.folder) for run in complete}
    summary = summarise(suite, results, runs)
    for name, text in (("benchmark.json", json.dumps(summary, indent=1) + "\n"), ("benchmark.md", markdown(summary))):
        with atomic_write(folder / name) as file:
            file.write(text.encode())
    for environment, found in summary["environments"].items():
        if found["methods"]:
            console.print(_table(f"{environment}: success", success_cells(summary, environment)))
            console.print(_table(f"{environment}: cost", cost_cells(summary, environment)))
    for note in notes(summary):
        console.print(Text(f"* {note}"), soft_wrap=True)
    plot(suite, results, folder)
    console.print(Text(f"Tables: {folder / 'benchmark.md'}  Figures: {folder / 'benchmark.json'}"), soft_wrap=True)


def plot(suite: Suite, results: Mapping[tuple[str, str, int], Any], folder: Path) -> None:
    """Draws the curves of each environment, against iterations and against wall time; says so where it cannot."""
    from agentrl.benchmark.table import held_out
    from agentrl.report.curves import plot_methods

    for environment in suite.environments:
        for x, label in (("iteration", "iteration"), ("elapsed", "wall seconds of the run")):
            curves: dict[str, list[list[tuple[float, float]]]] = {}
            for method in suite.methods:
                own = [records for (e, m, _), records in results.items() if (e, m) == (environment, method)]
                if own:
                    curves[method] = [held_out(records, x) for records in own]
            if not curves:
                continue
            title = f"{environment}: mean and range over seeds"
            try:
                plot_methods(curves, folder / f"{environment}_{x}.png", title, label, suite.baseline)
            except UserError as error:
                errors.print(Text(f"no curves: {error}"))
                return


def _table(title: str, cells: Sequence[Sequence[str]]) -> Table:
    head, *rows = cells
    table = Table(title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for number, name in enumerate(head):
        table.add_column(name, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    return table
