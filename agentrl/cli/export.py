"""``agentrl export``: a model out of a run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agentrl.cli.common import console, errors, table


def add_commands(app: typer.Typer) -> None:
    """Adds `export`."""
    app.command("export")(export)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")],
    part: Annotated[str, typer.Option(metavar="NAME", help="policy, prm, prm_reference or critic.")] = "policy",
    iteration: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Checkpoint of this iteration, instead of the newest.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where the base model lies now, if it was moved (LoRA runs).")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the adapter alone, as peft reads it, instead of a merged model.")
    ] = False,
) -> None:
    """Write a model of a run as a directory that transformers loads; adapters are merged into their base.

    Example:  [b]agentrl export runs/lora models/agent[/b]
    Example:  [b]agentrl export runs/lora adapters/prm --part prm --adapter[/b]
    """
    with errors.status("exporting"):
        from agentrl.train.export import export_model

        facts = export_model(run, out, part=part, iteration=iteration, base=base, adapter=adapter)
    console.print(table("Exported", facts.items()))
