"""``agentrl explain``: what a configuration means, what it will take, and what looks wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from agentrl.cli.common import console, errors, table
from agentrl.errors import UserError


def add_commands(app: typer.Typer) -> None:
    """Adds `explain`."""
    app.command("explain")(explain)


def explain(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of a run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Dotted settings.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every setting, defaults too.")] = False,
    episodes: Annotated[
        int, typer.Option(metavar="N", min=0, help="Random episodes to learn lengths from; 0 takes the limits.")
    ] = 16,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write it all to this file.")] = None,
) -> None:
    """Explain a run before it starts: settings, batch plan, memory, cost of an iteration, warnings.

    Nothing is trained. Without a model directory (model.path) memory and cost are left out.

    Example:  [b]agentrl explain configs/sokoban_oprl.yaml rollout.group_size=16[/b]
    """
    from agentrl.config import RunConfig, load_config

    settings = load_config(config, overrides or ())
    with errors.status("loading"):
        from agentrl.train import estimate, footprint
        from agentrl.train.plan import batch_plan

        plan = [line.partition(" ") for line in batch_plan(settings).splitlines()]
        warnings = estimate.warnings_of(settings)
        lengths = estimate.measure_lengths(settings, episodes)
        work = estimate.work_of(settings, lengths)
        shape, missing = None, "model.path is not set"
        if settings.model.path:
            try:
                shape = estimate.read_shape(settings.model.path)
            except UserError as error:
                missing = str(error)
    defaults = {} if everything else dict(_leaves(RunConfig().model_dump(mode="json")))
    given = dict(_leaves(settings.model_dump(mode="json")))
    chosen = {key: value for key, value in given.items() if key not in defaults or defaults[key] != value}
    found: dict[str, Any] = {
        "settings": chosen,
        "plan": {name: text.strip() for name, _, text in plan},
        "lengths": vars(lengths),
        "work": vars(work),
        "warnings": warnings,
    }
    title = "All settings" if everything else "Settings that differ from the defaults"
    console.print(table(title, [(key, str(value)) for key, value in chosen.items()]))
    console.print(table("Plan of an iteration", list(found["plan"].items())))
    source = (
        "lengths of the random agent's episodes" if lengths.measured else "limits of the configuration: upper bounds"
    )
    if not lengths.tokenizer:
        source += ", 3 characters a token"
    console.print(
        table(
            f"An iteration ({source})",
            [
                ("episode", f"{lengths.turns:.1f} turns of {lengths.prompt:.0f} + {lengths.action:.1f} tokens"),
                ("sampled", f"{work.sampled:,.0f} tokens"),
                ("rows", f"{work.rows:,.0f} tokens, {work.row:,.0f} a row"),
                ("read", f"{work.read:,.0f} of them in each pass: what rows begin with alike once"),
            ],
        )
    )
    if shape is None:
        console.print(Text(f"No estimate of memory and cost: {missing}"), soft_wrap=True)
    else:
        items, costs = footprint.memory(settings, shape, work), estimate.cost(settings, shape, work)
        found["memory_bytes"] = {item.name: item.value for item in items} | {"peak": footprint.peak(items)}
        found["flops"] = {item.name: item.value for item in costs}
        _print_estimate("Memory beside Python and torch", items, _size, ("at once", footprint.peak(items)))
        _print_estimate("Floating-point operations", costs, _flops, ("all", sum(item.value for item in costs)))
    for warning in warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    if not warnings:
        console.print("no warnings")
    if json is not None:
        _write(found, json)


def _print_estimate(title: str, items: list[Any], show: Any, total: tuple[str, float]) -> None:
    result = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    result.add_column(style="cyan", no_wrap=True)
    result.add_column(justify="right", no_wrap=True)
    result.add_column(overflow="fold", style="dim")
    for item in items:
        result.add_row(item.name, show(item.value), item.how)
    result.add_section()
    result.add_row(total[0], show(total[1]), "")
    console.print(result)


def _size(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value / 1e3:,.0f} kB"


def _flops(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:,.1f} {unit}FLOP"
    return f"{value / 1e6:,.1f} MFLOP"


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted keys of a configuration; free mappings (kwargs, options) are one value."""
    from agentrl.config import RunConfig

    for key, item in value.items():
        section = getattr(RunConfig.model_fields.get(key), "annotation", None) if not prefix else None
        if isinstance(item, Mapping) and hasattr(section, "model_fields"):
            yield from _leaves(item, f"{key}.")
        else:
            yield f"{prefix}{key}", item


def _write(found: Mapping[str, Any], path: Path) -> None:
    from json import dumps

    from agentrl.files import atomic_write

    with atomic_write(path) as file:
        file.write(dumps(found, indent=2).encode() + b"\n")
