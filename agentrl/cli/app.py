"""The application: its commands, its version, and what an error looks like."""

from __future__ import annotations

import warnings
from typing import Annotated, Any

import typer

from agentrl import __version__
from agentrl.cli import (
    benchmark,
    collect,
    compare,
    credit_lab,
    demo,
    envs,
    evaluate,
    explain,
    export,
    listing,
    model,
    replay,
    report,
    serve,
    train,
)
from agentrl.cli.common import Commands, console

app = typer.Typer(
    name="agentrl",
    cls=Commands,
    help="Multi-turn reinforcement learning for language-model agents.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in (
    demo,
    envs,
    listing,
    collect,
    model,
    explain,
    train,
    evaluate,
    compare,
    replay,
    export,
    serve,
    benchmark,
    credit_lab,
    report,
):
    _module.add_commands(app)


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"agentrl {__version__}", highlight=False)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _format_warning(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """For the user's own matters the message is enough; where in the code it arose matters for all the others."""
    place = "" if category is UserWarning else f"{filename}:{lineno}: {category.__name__}: "
    return f"warning: {place}{message}\n"


def main() -> None:
    """Entry point of the ``agentrl`` command and of ``python -m agentrl``."""
    warnings.formatwarning = _format_warning
    app(prog_name="agentrl")
