"""``agentrl report`` and ``agentrl view``: a run as a page, in one file or while it trains."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from agentrl.cli.common import check_output, console, errors, table
from agentrl.errors import UserError

Runs = Annotated[
    list[str],
    typer.Argument(metavar="RUN...", help="Folders of runs, folders with runs below, trajectory files (.jsonl)."),
]
Trajectories = Annotated[
    int, typer.Option(metavar="N", min=0, help="Trajectories shown, whole groups from every iteration; 0 = all.")
]
ImageMb = Annotated[float, typer.Option(metavar="MB", min=0, help="Megabytes of pictures, over all trajectories.")]


def add_commands(app: typer.Typer) -> None:
    """Adds `report` and `view`."""
    app.command("report")(report)
    app.command("view")(view)


def report(
    runs: Runs,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="HTML file; default: report.html in the run's folder.")
    ] = None,
    trajectories: Trajectories = 2000,
    image_mb: ImageMb = 16.0,
) -> None:
    """Write one HTML file that shows a run: curves, trajectories in the colours of credit, health, settings.

    The file needs no server and no network. Several runs lie over each other; those that differ in their seed alone
    become one line with a range.

    Example:  [b]agentrl report runs/demo/train --out demo.html[/b]

    Example:  [b]agentrl report runs/benchmark/sokoban --out sokoban.html[/b]
    """
    from agentrl.files import atomic_write
    from agentrl.report.data import make_report
    from agentrl.report.page import render

    if out is None:
        only = Path(runs[0])
        out = (only if len(runs) == 1 and only.is_dir() else Path()) / "report.html"
    _spare(runs, out)
    out = check_output(out)
    with _reading() as on_file:
        made = make_report(runs, trajectories=trajectories, image_mb=image_mb, on_file=on_file)
    page = render(made)
    with atomic_write(out) as file:
        file.write(page)
    shown, found = made.summary["trajectories"]["count"], made.summary["trajectories"]["found"]
    rows = [
        ("runs", len(made.summary["runs"])),
        ("trajectories", f"{shown:,} of {found:,}"),
        ("size", f"{len(page) / 1e6:.1f} MB"),
        ("file", out),
    ]
    console.print(table("Report", rows))
    for run in made.summary["runs"]:
        if run["alarm"] and run["alarm"]["ringing"]:
            alarm = (f"{run['label']}: step reward rises, success does not.", "bold yellow")
            errors.print(Text.assemble(alarm, " See Reward model."))


def view(
    runs: Runs,
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 = a free one.")] = 8765,
    trajectories: Trajectories = 2000,
    image_mb: ImageMb = 16.0,
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Show the report on this machine, and keep it up to date while the run trains. Ctrl-C ends it.

    Example:  [b]agentrl view runs/demo/train --open[/b]
    """
    from agentrl.report.live import HOST, LiveReport, make_server

    live = LiveReport(runs, trajectories=trajectories, image_mb=image_mb)
    server = make_server(live, port)
    with errors.status("reading"):
        live.current()
    address = f"http://{HOST}:{server.server_address[1]}/"
    line = Text.assemble((address, "bold"), f"  follows {', '.join(runs)}; Ctrl-C ends it.")
    console.print(line, soft_wrap=True)
    if open_browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        console.print("Ended.")
    finally:
        server.server_close()


def _spare(runs: Sequence[str], out: Path) -> None:
    """Refuses to write over what is read.

    Raises:
        UserError: `out` is one of `runs`, under whatever name, or lies in a folder of them and is no ``.html``.
    """
    from agentrl.train.metrics import FILE_NAME

    target = out.resolve()
    for run in map(Path, runs):
        folder = run.parent if run.name == FILE_NAME else run
        inside = folder.is_dir() and folder.resolve() in target.parents and target.suffix != ".html"
        if inside or (run.is_file() and target.is_file() and target.samefile(run)):
            raise UserError(f"--out {out} would write into {run}, which is read; choose a name that ends in .html")


@contextmanager
def _reading() -> Iterator[Callable[[int, int], None]]:
    bar = Progress(
        TextColumn("reading"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        console=errors,
        expand=True,
        transient=True,
    )
    task = bar.add_task("", total=None)
    with bar:
        yield lambda done, files: bar.update(task, completed=done, total=files)
