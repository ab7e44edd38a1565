"""Writes docs/configuration.md from the configuration itself: every key, its default, its values and its meaning.

python -m agentrl.cli.reference > docs/configuration.md
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from agentrl.config import RunConfig

_YAML = {"None": "null", "True": "true", "False": "false"}

_HEAD = """\
# Configuration

<!-- Written by `python -m agentrl.cli.reference > docs/configuration.md`; a test compares. Do not edit by hand. -->

A run is one YAML file, and `KEY=VALUE` settings on the command line that override it:

```yaml
name: sokoban-oprl
iterations: 80
model: {path: models/base}
prm: {centred: true, lr: 3e-4}
credit:
  method: oprl
  options: {alpha: 0.5}
```

```console
agentrl train run.yaml prm.beta=0.1 rollout.groups=16
```

From Python: `agentrl.load_config("run.yaml", ["prm.beta=0.1"])`, or `agentrl.RunConfig` itself. Values on the command
line are YAML, in which `1e-4` is a number here. What is not given has the default below. In containers every key is an
environment variable too: `AGENTRL__PRM__BETA=0.1` is `prm.beta=0.1`; it goes over the file and under the command line.

Refused before any work, with file and line: an unknown key (the nearest one is named), a value out of range, a key that
stands twice in a file, settings that cannot work together. A run writes all its settings, defaults included, to
`config.yaml` in its folder; that file is a configuration like any other.

Numbers such as 1.3 are sections of [algorithms.md](algorithms.md).
"""


def reference() -> str:
    """Returns the page: the sections of `RunConfig`, then the options of every registered credit method."""
    from agentrl.credit.registry import OURS

    parts = [_HEAD, "## Run\n", _table(RunConfig, "")]
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            parts += [f"## `{name}`\n\n{_text(section.__doc__)}\n", _table(section, f"{name}.")]
    for method in sorted(OURS, key=lambda method: method.name):
        # One file per method: what it is stands at the head of the file.
        parts.append(
            f"## `credit.options` of `{method.name}`\n\n{_text(inspect.getdoc(inspect.getmodule(method.function)))}\n"
        )
        options = method.options_type
        parts.append(_table(options, "credit.options.") if options.model_fields else "It has no options.\n")
    return "\n".join(parts)


def _table(model: type[BaseModel], prefix: str) -> str:
    """Returns a Markdown table of the settings of `model`; sections inside it have tables of their own."""
    meanings = docstrings(model)
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        default = "`(required)`" if field.is_required() else f"`{_value(field.get_default(call_default_factory=True))}`"
        row = (f"`{prefix}{name}`", default, _values(field))
        cells = [*row, _text(meanings.get(name, ""))]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Returns what stands under each attribute of `model` in its source, or in a base's: attribute -> docstring."""
    found: dict[str, str] = {}
    for base in model.__bases__:
        if issubclass(base, BaseModel) and base is not BaseModel:
            found |= docstrings(base)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(tree, ast.ClassDef)
    for node, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(below, ast.Expr):
            found[node.target.id] = str(ast.literal_eval(below.value))
    return found


def _text(docstring: str | None) -> str:
    """Returns the first paragraph of a docstring on one line, as Markdown."""
    first = inspect.cleandoc(docstring or "").partition("\n\n")[0]
    text = re.sub(r"``(.+?)``", r"`\1`", " ".join(first.split()))
    return re.sub(r"\b(None|True|False)\b", lambda word: f"`{_YAML[word[0]]}`", text)


def _value(value: Any) -> str:
    """Returns a default as YAML writes it."""
    return value if value and isinstance(value, str) else json.dumps(value).replace("e-0", "e-")


def _values(field: FieldInfo) -> str:
    """Returns what a setting may be: its choices, or its type and bounds."""
    bounds = []
    for constraint in field.metadata:
        for attribute, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            if (bound := getattr(constraint, attribute, None)) is not None:
                bounds.append(f"{sign} {bound:g}")
    return ", ".join([" or ".join(_kinds(field.annotation)), *bounds])


def _kinds(annotation: Any) -> Iterator[str]:
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    if get_origin(annotation) is Literal:
        yield ", ".join(f"`{choice}`" for choice in get_args(annotation))
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _kinds(part)
    elif get_origin(annotation) in (list, tuple):
        yield "list of " + ", ".join(kind for part in get_args(annotation) for kind in _kinds(part))
    else:
        yield names.get(annotation, "mapping")


if __name__ == "__main__":
    print(reference(), end="")
