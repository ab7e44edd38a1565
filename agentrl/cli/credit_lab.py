"""``agentrl credit-lab``: every credit method against the exact advantage of every turn."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from agentrl import __version__
from agentrl.cli.benchmark import cores, parse_seeds
from agentrl.cli.common import ShownLessons, console, errors
from agentrl.errors import UnknownNameError, UserError
from agentrl.files import atomic_write, check_writable

if TYPE_CHECKING:
    from agentrl.benchmark.suite import Suite


def add_commands(app: typer.Typer) -> None:
    """Adds `credit-lab`."""
    app.command("credit-lab")(credit_lab)


def credit_lab(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="YAML file, as for a benchmark.")] = (
        "configs/credit_lab.yaml"
    ),
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME", help="Only this environment of the file; repeatable.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", metavar="NAME", help="Only this method of the file; repeatable.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(metavar="N,N", help="Seeds, instead of the file's.")] = None,
    resamples: Annotated[
        int, typer.Option(metavar="N", min=2, help="Plays of the same tasks that tell luck from merit.")
    ] = 4,
    jobs: Annotated[int | None, typer.Option(metavar="N", min=1, help="Seeds at once; default: the cores.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder, instead of the file's.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure to this file too.")
    ] = None,
) -> None:
    """Score credit methods against the true advantage of every turn, known exactly on Sokoban and Lock.

    Stopped, the same command goes on; what was scored with the same settings is not played again.

    Example:  [b]agentrl credit-lab --env lock --seeds 0 --json lab.json[/b]
    """
    from agentrl.benchmark.run import locked, make_bases
    from agentrl.benchmark.suite import check_runs, load_suite, plan_runs
    from agentrl.report.lab import plot_lab

    settings = load_suite(suite)
    settings.out = str(out or settings.out)
    if seeds is not None:
        settings.seeds = parse_seeds(seeds)
    settings.environments = _chosen("environment", settings.environments, env)
    settings.methods = _chosen("method", settings.methods, method, keep=settings.baseline)
    runs = plan_runs(settings)
    with errors.status("checking"):
        check_runs(settings, runs)
    folder = check_writable(Path(settings.out))
    if json_file is not None:
        check_writable(json_file.resolve().parent)
    with locked(settings.out):
        make_bases(settings, runs, lambda text: errors.print(Text(text), soft_wrap=True), ShownLessons())
        cells = score(settings, resamples, jobs or cores())
    environments = summarise(settings, cells)
    figures = {"suite": suite, "resamples": resamples, "environments": environments}
    for target in filter(None, (folder / "credit_lab.json", json_file)):
        with atomic_write(target) as file:
            file.write(json.dumps(figures, indent=1).encode() + b"\n")
    tables = {}
    for name, found in environments.items():
        tables[f"{name}: advantages against the exact ones, {len(settings.seeds)} seeds"] = rows_of(found, ADVANTAGES)
        judged = {
            m: values for m, values in found.items() if values["rank_reward_before"] != [None] * len(settings.seeds)
        }
        if judged:
            tables[f"{name}: turn rewards of the implicit PRM"] = rows_of(judged, REWARDS)
    with atomic_write(folder / "credit_lab.md") as file:
        file.write("\n".join(markdown(name, rows) for name, rows in tables.items()).encode())
    for name, rows in tables.items():
        console.print(_table(name, rows))
    for note in NOTES:
        console.print(Text(f"* {note}"), soft_wrap=True)
    for name, found in environments.items():
        plot_lab(found, folder / f"credit_lab_{name}.png", f"{name}: credit against the exact advantage of every turn")
    written = ", ".join(str(folder / name) for name in ("credit_lab.md", "credit_lab.json", "credit_lab_*.png"))
    console.print(Text(f"Written: {written}"), soft_wrap=True)


NOTES = (
    "fresh: Spearman correlation of the turn's advantage with the exact one, on batches after training that no PRM or "
    "critic learned from (sd over seeds); rank: the same in training, where a PRM may have learned from the very batch "
    "(prm.order), mean over iterations; step: of its turn-level term alone.",
    "sign: share of decisive turns (true advantage beyond 0.1) with the right sign; a signal of 0 counts one half.",
    "explained: share of the truth's variance that episode and step term explain linearly, at their best weights.",
    "luck: share of the advantage's variance between plays of the same move in the same state and turn, with PRM and "
    "critic learning from each play as in training; 0 is best.",
    "PRM: rank correlation of its turn rewards with the truth: untrained, first and second half of training, on fresh "
    "batches at the end; pairs: new pairs it orders right.",
)

ADVANTAGES = (
    ("fresh_rank", "fresh"),
    ("rank", "rank"),
    ("rank_first", "1st half"),
    ("rank_second", "2nd half"),
    ("rank_step", "step"),
    ("sign", "sign"),
    ("explained", "expl."),
    ("luck", "luck"),
)
"""Figures of the table of advantages and their headings."""

REWARDS = (
    ("rank_reward_before", "untrained"),
    ("rank_reward_first", "1st half"),
    ("rank_reward_second", "2nd half"),
    ("fresh_rank_reward", "fresh"),
    ("pair_accuracy", "pairs"),
)
"""Figures of the table of PRM rewards and their headings."""


def score(suite: Suite, resamples: int, jobs: int) -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    """Runs every (environment, seed) in a process of its own; returns each one's scores by method."""
    from agentrl.benchmark.suite import run_config

    work = [(environment, seed) for seed in suite.seeds for environment in suite.environments]
    configs = {(e, s): {m: run_config(suite, e, m, s).model_dump(mode="json") for m in suite.methods} for e, s in work}
    stored = {cell: _Stored(suite, cell, configs[cell], resamples) for cell in work}
    found = {cell: scores for cell in work if (scores := stored[cell].read()) is not None}
    work = [cell for cell in work if cell not in found]
    if found:
        errors.print(Text(f"{len(found)} of {len(found) + len(work)} environments x seeds were scored before"))
    if not work:
        return found
    iterations = sum(configs[cell][suite.baseline]["iterations"] for cell in work)
    context = multiprocessing.get_context("spawn")
    bar = Progress(
        TextColumn("[bold]scoring"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("iterations"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
    )
    with context.Manager() as manager, bar, ProcessPoolExecutor(min(jobs, len(work)), context) as pool:
        ticks = manager.Queue()
        task = bar.add_task("", total=iterations)
        futures = {pool.submit(_cell, configs[cell], suite.baseline, resamples, ticks): cell for cell in work}
        try:
            for future in _ticking(futures, lambda: bar.advance(task, _drain(ticks))):
                found[futures[future]] = future.result()
                stored[futures[future]].write(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return found


class _Stored:
    """The scores of one environment and seed on disk: a lab that was stopped goes on where it was."""

    def __init__(self, suite: Suite, cell: tuple[str, int], configs: Mapping[str, Any], resamples: int) -> None:
        from agentrl.benchmark.suite import base_sha256

        environment, seed = cell
        self.path = Path(suite.out, environment, f"scores-{seed}.json")
        made_of = [__version__, base_sha256(suite, environment), suite.baseline, resamples, configs]
        self.sha256 = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def read(self) -> dict[str, Any] | None:
        """The scores, or None where there are none of the very same lab."""
        try:
            data = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        return data["scores"] if data.get("sha256") == self.sha256 else None

    def write(self, scores: Mapping[str, Any]) -> None:
        with atomic_write(self.path) as file:
            file.write(json.dumps({"sha256": self.sha256, "scores": scores}).encode() + b"\n")


def _ticking(futures: Mapping[Any, Any], tick: Callable[[], None]) -> Any:
    """Yields futures as they complete, calling `tick` at least once a second."""
    left = set(futures)
    while left:
        try:
            for future in as_completed(left, timeout=1):
                left.discard(future)
                yield future
                break
        except TimeoutError:
            pass
        tick()


def _drain(queue: Any) -> int:
    count = 0
    while not queue.empty():
        queue.get()
        count += 1
    return count


def _cell(configs: Mapping[str, Mapping[str, Any]], baseline: str, resamples: int, ticks: Any) -> dict[str, Any]:
    """One environment and seed, in a process of its own."""
    from dataclasses import asdict

    from agentrl.config import RunConfig
    from agentrl.lab import run_lab

    scores = run_lab(
        {name: RunConfig(**config) for name, config in configs.items()},
        baseline,
        resamples=resamples,
        on_iteration=lambda _: ticks.put(1),
    )
    return {name: asdict(score) for name, score in scores.items()}


def summarise(suite: Suite, cells: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    """Returns environment -> method -> figure -> one value per seed."""
    return {
        environment: {
            method: _figures([cells[environment, seed][method] for seed in suite.seeds]) for method in suite.methods
        }
        for environment in suite.environments
    }


def _figures(scores: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """One method's figures, seed by seed; None where there is none."""

    def mean(values: Sequence[float]) -> float | None:
        kept = [v for v in values if v == v]  # nan: an iteration without decisive turns
        return sum(kept) / len(kept) if kept else None

    def halves(values: Sequence[float]) -> tuple[float | None, float | None]:
        middle = len(values) // 2
        return mean(values[:middle]), mean(values[middle:])

    found: dict[str, list[float | None]] = {}
    for score in scores:
        one = {name: mean(score[name]) for name in ("rank", "rank_step", "sign", "explained", "pair_accuracy")}
        one["rank_first"], one["rank_second"] = halves(score["rank"])
        one["rank_reward_first"], one["rank_reward_second"] = halves(score["rank_reward"])
        one |= {name: score[name] for name in ("fresh_rank", "fresh_rank_reward", "rank_reward_before")}
        one["luck"] = mean([score["luck"]])
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    return found


def rows_of(
    methods: Mapping[str, Mapping[str, Sequence[float | None]]], columns: Sequence[tuple[str, str]]
) -> list[list[str]]:
    """Returns the cells of a table, the head first: means over seeds, and the sd of the first figure."""
    from statistics import fmean, stdev

    rows = [["method", *(title for _, title in columns)]]
    for method, figures in methods.items():
        row = [method]
        for name, _ in columns:
            values = [v for v in figures[name] if v is not None]
            text = f"{fmean(values):.2f}" if values else "-"
            if name == columns[0][0] and len(values) > 1:
                text += f" ({stdev(values):.2f})"
            row.append(text)
        rows.append(row)
    return rows


def markdown(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as Markdown."""
    head, *body = rows
    lines = [f"**{title}**", "", f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in body)]) + "\n"


def _table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    head, *body = rows
    table = Table(title=title, title_justify="left", title_style="bold", padding=(0, 0))
    for column in head:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    return table


def _chosen(kind: str, known: dict[str, Any], names: Sequence[str] | None, keep: str | None = None) -> dict[str, Any]:
    for name in names or ():
        if name not in known:
            raise UnknownNameError(kind, name, known)
    if not known:
        raise UserError(f"no {kind} is left")
    return {name: value for name, value in known.items() if not names or name in names or name == keep}
