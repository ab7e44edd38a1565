"""``agentrl policies`` and ``credit``: what can be named, and what it takes."""

from __future__ import annotations

import inspect
import textwrap
import warnings
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from agentrl.cli.common import console, errors, table
from agentrl.errors import UnknownNameError
from agentrl.policy import AsyncFunctionPolicy, FunctionPolicy, as_policy, load_function


def add_commands(app: typer.Typer) -> None:
    """Adds `policies` and `credit`."""
    app.command("policies")(policies)
    app.command("credit")(credit)


def policies(
    policy: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="Show this one: its options and what it does. Or module:function, one of your own."
        ),
    ] = None,
) -> None:
    """List the policies, or show one.

    Example:  [b]agentrl policies transformers[/b]
    """
    points = {point.name: point for point in entry_points(group="agentrl.policies")}
    if policy is not None:
        if policy not in points and ":" in policy:
            _show_function(policy)
            return
        if policy not in points:
            raise UnknownNameError("policy", policy, points, "agentrl policies lists all")
        _show_policy(points[policy])
        return
    listing = Table(title="Policies", title_justify="left", title_style="bold")
    listing.add_column("name", style="cyan", no_wrap=True)
    listing.add_column("what acts")
    listing.add_column("from", overflow="fold", style="dim")
    for name in sorted(points):
        listing.add_row(name, Text(_summary(points[name])), points[name].value.partition(":")[0])
    console.print(listing)
    console.print(Text.assemble("Options of one: ", ("agentrl policies NAME", "bold")))


def credit(
    method: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this one: its formula and options.")
    ] = None,
) -> None:
    """List the credit methods, or show one.

    Example:  [b]agentrl credit oprl[/b]
    """
    with errors.status("loading"):
        from agentrl.credit import credit_methods
        from agentrl.credit.registry import load_plugins
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken plugins are listed below
        broken, methods = load_plugins(), credit_methods()
    if method is not None:
        if method not in methods:
            raise UnknownNameError("credit method", method, methods, "agentrl credit lists all")
        _show_credit(methods[method])
        return
    listing = Table(title="Credit methods", title_justify="left", title_style="bold")
    listing.add_column("name", style="cyan", no_wrap=True)
    listing.add_column("what it is")
    listing.add_column("needs")
    for name, found in methods.items():
        listing.add_row(name, Text(_headline(found)), Text(_needs(found)))
    console.print(listing)
    for name, reason in broken.items():
        errors.print(Text(f"plugin {name!r} could not be loaded: {reason}", style="yellow"), soft_wrap=True)
    console.print(Text.assemble("Formula and options of one: ", ("agentrl credit NAME", "bold")))


def _headline(method: Any) -> str:
    """First line of the file that a method is."""
    return (inspect.getdoc(inspect.getmodule(method.function)) or "").partition("\n")[0]


def _needs(method: Any) -> str:
    """What a method needs with its default options, or that it depends on them."""
    try:
        return ", ".join(sorted(method.needs_of(method.options_type()))) or "-"
    except ValueError:  # an option is required
        return "-" if callable(method.needs) else ", ".join(sorted(method.needs)) or "-"


def _show_credit(method: Any) -> None:
    from agentrl.cli.reference import docstrings

    # Formulas stand in columns: lines are not to be broken.
    console.print(Text(inspect.getdoc(inspect.getmodule(method.function)) or ""), soft_wrap=True)
    meanings = docstrings(method.options_type)
    options = Table(title="credit.options", title_justify="left", title_style="bold")
    for column in ("option", "default", "meaning"):
        options.add_column(column)
    for name, field in method.options_type.model_fields.items():
        default = "required" if field.is_required() else repr(field.get_default(call_default_factory=True))
        options.add_row(name, Text(default), Text(" ".join(meanings.get(name, "").split()).replace("``", "")))
    if method.options_type.model_fields:
        console.print(options)
    console.print(Text(f"needs: {_needs(method)}"))


def _show_policy(point: EntryPoint) -> None:
    factory = point.load()
    rows = [("options (--policy-arg)", signature(factory)), ("from", point.value)]
    console.print(table(point.name, rows))
    text = (inspect.getdoc(factory) or "").partition("\nRaises:")[0]
    console.print(Text(reflow(text, console.width)))


def _show_function(name: str) -> None:
    policy = as_policy(load_function(name))
    assert isinstance(policy, FunctionPolicy)
    waits = "each episode waits for it by itself (async)" if isinstance(policy, AsyncFunctionPolicy) else "plain"
    rows = [("reads", f"the {policy.reads}"), ("function", waits), ("options (--policy-arg)", "name=None")]
    console.print(table(policy.name, rows))
    console.print(Text(reflow(inspect.getdoc(policy.function) or "", console.width)))


def reflow(docstring: str, width: int) -> str:
    """Returns a Google-style docstring filled to `width`: paragraphs and the entries of ``Args:`` stay apart."""
    items: list[str] = []
    depth = -1  # indentation of the item that a following line may continue; -1: none
    for line in docstring.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip() and depth >= 0 and (indent > depth or indent == depth == 0):
            items[-1] += " " + line.strip()
        else:
            items.append(line)
            depth = indent if line.strip() and not line.rstrip().endswith(":") else -1
    return "\n".join(
        textwrap.fill(item, width, subsequent_indent=" " * (len(item) - len(item.lstrip())) + "    ")
        if item.startswith(" ")
        else textwrap.fill(item, width)
        for item in items
    )


def signature(function: Any, leave_out: tuple[str, ...] = ()) -> str:
    """Returns the named parameters of `function` with their defaults, one a line."""
    lines = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name in leave_out:
            continue
        required = parameter.default is parameter.empty
        lines.append(parameter.name + (" (required)" if required else f"={parameter.default!r}"))
    return "\n".join(lines) or "none"


def _summary(point: EntryPoint) -> str:
    """Returns the first line of the documentation of a policy without loading its engine.

    A package that loads its engine on first use documents itself; everything else is documented at the factory.
    """
    try:
        module = import_module(point.module)
    except ImportError as error:
        return f"not installed: {error}"
    documented = vars(module).get(point.attr.partition(".")[0], module)
    return (inspect.getdoc(documented) or "").partition("\n")[0]
