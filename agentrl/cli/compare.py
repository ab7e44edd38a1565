"""``agentrl compare`` and ``leaderboard``: is B better than A, and who is best."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from agentrl.cli.common import check_output, console, errors, success_bar
from agentrl.cli.evaluate import Running, check_reached, short

if TYPE_CHECKING:
    from pydantic import BaseModel

    from agentrl.evaluate.compare import Comparison, Difference
    from agentrl.evaluate.suite import Leaderboard, Suite
    from agentrl.rollout import Summary


def add_commands(app: typer.Typer) -> None:
    """Adds `compare` and `leaderboard`."""
    app.command("compare")(compare)
    app.command("leaderboard")(leaderboard)


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of an evaluation, or a trajectory file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Likewise: is this one better?")],
    env: Annotated[str | None, typer.Option(metavar="ID", help="Compare in this environment alone.")] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Also under other turn limits, instructions or outcome rules.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the comparison to this file.")
    ] = None,
) -> None:
    """Tell whether B is better than A, task by task.

    Both must have played the same environments with the same arguments and under the same rules; tasks are paired by
    seed.

    Example:  [b]agentrl compare runs/eval-base runs/eval-trained[/b]
    """
    from agentrl.evaluate.compare import compare as measure

    if json is not None:
        check_output(json)
    found = measure(a, b, env=env, anyway=anyway)
    if json is not None:
        _write(found, json)
    console.print(_compared(found))
    for line in verdict(found):
        console.print(Text(line))


def _compared(found: Comparison) -> Table:
    result = Table(title=f"B - A on {found.tasks:,} tasks", title_justify="left", title_style="bold")
    result.add_column("")
    for column in ("A", "B", "difference (95 %)", "p"):
        result.add_column(column, justify="right", no_wrap=True)
    for name, one, percent in (("success", found.success, True), ("outcome", found.outcome, False)):
        result.add_row(name, *_cells(one, percent), f"{one.p:.4f}" if one.p >= 1e-4 else "< 0.0001")
    return result


def _cells(one: Difference, percent: bool) -> tuple[str, str, str]:
    def number(value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.1f}" if percent else f"{value:{sign}.3g}"

    unit, spread = "%" if percent else "", ""
    if one.difference.low is not None and one.difference.high is not None:
        spread = f" [{number(one.difference.low, '+')}, {number(one.difference.high, '+')}]"
    return number(one.a) + unit, number(one.b) + unit, number(one.difference.value, "+") + spread


def verdict(found: Comparison) -> list[str]:
    """Returns what the numbers say, and what is not in them, one sentence a line."""
    one = found.success
    if one.p <= 0.05:
        better = "B succeeds more often" if one.difference.value > 0 else "A succeeds more often"
        lines = [f"{better} (p = {one.p:.3g})."]
    else:
        lines = [f"No difference in success could be shown (p = {one.p:.3g})."]
    lines.append(f"A: {found.a}, {found.episodes_a:,} episodes. B: {found.b}, {found.episodes_b:,} episodes.")
    if found.differences:
        lines.append(f"Not only the policies differ: {'; '.join(found.differences)}.")
    if found.only_a or found.only_b:
        lines.append(f"Left out, as only one side played them: {found.only_a:,} tasks of A, {found.only_b:,} of B.")
    if found.failures_a or found.failures_b:
        lines.append(f"Infrastructure failures, in no figure: {found.failures_a:,} of A, {found.failures_b:,} of B.")
    return lines


def leaderboard(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="YAML file: environments and policies.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the suite; the same command plays the rest.")],
    max_failures: Annotated[
        int,
        typer.Option(
            "--max-failures",
            metavar="N",
            min=0,
            help="Exit with 4 where infrastructure ended more episodes of a policy in an environment.",
        ),
    ] = 0,
) -> None:
    """Play several policies in several environments and rank them.

    Writes [b]leaderboard.md[/b] and [b]leaderboard.json[/b], and every episode, to the folder. A policy that fails
    in an environment stops no other; the exit code is then 1, and the same command plays it again. Single episodes
    that infrastructure ended are in no figure; the exit code is then 4 (see [b]--max-failures[/b]).

    Example:  [b]agentrl leaderboard benchmarks/leaderboard.yaml --out runs/leaderboard[/b]
    """
    from agentrl.evaluate.suite import load_suite, play_suite

    loaded = load_suite(suite)
    try:
        with _SuiteProgress(loaded) as progress:
            board = play_suite(loaded, out, on_summary=progress)
    except KeyboardInterrupt:
        errors.print(f"{out} holds what was played; the same command plays the rest", soft_wrap=True)
        raise
    console.print(ranking(board))
    console.print(f"written to {out / 'leaderboard.md'} and {out / 'leaderboard.json'}", soft_wrap=True)
    for line in board.failed:
        errors.print(Text(f"failed: {line}", style="bold red"), soft_wrap=True)
    results = [
        one.model_copy(update={"policy": row.policy, "env": env})  # as the suite calls them
        for row in board.rows
        for env, one in row.results.items()
    ]
    if board.failed or any(one.infrastructure_failures for one in results):
        errors.print("the same command plays again what failed", soft_wrap=True)
    check_reached(results, None, max_failures)
    if board.failed:
        raise typer.Exit(1)


class _SuiteProgress:
    """A bar over all episodes of a suite."""

    def __init__(self, suite: Suite) -> None:
        self._bar = success_bar()
        self._cell, self._done = ("", ""), 0
        self._running = Running(suite.per_task)
        total = suite.episodes * len(suite.cells())
        self._task = self._bar.add_task(suite.name, total=total, success=self._running)

    def __call__(self, policy: str, env: str, one: Summary) -> None:
        if self._cell != (policy, env):
            self._cell = (policy, env)
            self._running.reset()
        self._done += 1
        self._running.add(one)
        self._bar.update(self._task, completed=self._done, description=f"{policy} {env}")

    def __enter__(self) -> _SuiteProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._running.settle()
        self._bar.live.transient = kind is not None and not self._done
        self._bar.stop()


def ranking(board: Leaderboard) -> Table:
    """Returns the leaderboard, best first; environments become rows where they would not fit beside each other."""
    result = Table(title=board.name, title_justify="left", title_style="bold")
    result.add_column("policy", style="cyan", overflow="fold")
    wide = len(board.environments) <= 2
    for column in board.environments if wide else ("environment", "success"):
        result.add_column(column, justify="right" if wide or column == "success" else "left")
    result.add_column("mean", justify="right")
    for row in board.rows:
        mean = "-" if row.mean_success is None else f"{row.mean_success:.1%}"
        cells = [row.cell(env, short) for env in board.environments]
        if wide:
            result.add_row(row.policy, *cells, mean)
            continue
        for number, (env, cell) in enumerate(zip(board.environments, cells, strict=True)):
            result.add_row(*(("", env, cell, "") if number else (row.policy, env, cell, mean)))
        result.add_section()
    return result


def _write(found: BaseModel, path: Path) -> None:
    from agentrl.files import atomic_write

    with atomic_write(path) as file:
        file.write(found.model_dump_json(indent=2).encode() + b"\n")
