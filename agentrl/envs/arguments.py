"""The arguments of a tool call: bound to parameters by name, and checked against their schemas.

Schemas are the part of JSON Schema that type hints of tools need: string, integer, number, boolean, null, enum, const,
array, anyOf, and bounds of numbers. Anything else in a schema is not looked at.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from agentrl.errors import ActionError, unknown_name

Schema = Mapping[str, Any]
"""A tool in OpenAI's function format, or the inner ``{"name", "description", "parameters"}`` alone."""


class ToolError(ActionError):
    """An answer that is no call of a known tool with fitting arguments; the message is for the agent."""


class CallSyntaxError(ToolError):
    """No call found in the text, or one that is cut off or broken."""


class SeveralCallsError(ToolError):
    """More than one call in one answer."""


class UnknownToolError(ToolError):
    """A call of a tool that does not exist; the message names the nearest."""


class ArgumentError(ToolError):
    """A missing, unknown or ill-typed argument; the message says which, what was expected and what came."""


@dataclass(frozen=True, slots=True)
class Written:
    """A call as it stands in the text, its arguments unchecked: named, in order, or as one text."""

    name: str
    named: dict[str, Any] = field(default_factory=dict)
    ordered: tuple[Any, ...] = ()
    text: str | None = None


def usage(name: str, parameters: Schema) -> str:
    """Returns how a call is written in plain text, e.g. ``search(query="...", top=5)``."""
    examples = {"integer": "1", "number": "1.5", "boolean": "true", "array": "[...]"}

    def example(schema: Schema) -> str:
        if "default" in schema:
            return dumps(schema["default"])
        if "enum" in schema or "const" in schema:
            return dumps(schema.get("const", (schema.get("enum") or [None])[0]))
        return examples.get(str(schema.get("type")), '"..."')

    parts = [f"{key}={example(schema)}" for key, schema in parameters.get("properties", {}).items()]
    return f"{name}({', '.join(parts)})"


def decode(text: str, start: int) -> tuple[dict[str, Any], int]:
    """Returns the JSON object at `start` and where it ends.

    Raises:
        ValueError: it is none, or too deep.
    """
    try:
        value, end = DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos - start + 1}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value, end


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse_constant)  # new lines inside strings: models write them


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_INTEGER = re.compile(r"[+-]?[0-9]{1,400}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,400}\.?[0-9]{0,400}|\.[0-9]{1,400})(?:[eE][+-]?[0-9]{1,9})?")


def bind(written: Written, parameters: Schema, way: str) -> dict[str, Any]:
    """Returns the arguments by name: ordered ones in the order of the parameters, one text to the only that it can be.

    Raises:
        ArgumentError: more values than parameters, or one text for a tool that needs several arguments.
    """
    names, required = list(parameters.get("properties", {})), parameters.get("required", [])
    if written.text is None:
        if len(written.ordered) > len(names):
            raise ArgumentError(f"{written.name} takes {len(names)} arguments, got {len(written.ordered)}: {way}")
        named = dict(zip(names, written.ordered, strict=False))
        if twice := named.keys() & written.named.keys():
            raise ArgumentError(f"{written.name}: argument {min(twice)!r} is given twice")
        return named | written.named
    if written.text.startswith("{"):
        try:
            value, _ = decode(written.text, 0)
        except ValueError:
            value = {"": None}
        if value.keys() <= set(names):
            return value
    if not written.text:
        return {}
    if not names:
        raise ArgumentError(f"{written.name} takes no argument, got {shown(written.text)}")
    if len(required) > 1:
        raise ArgumentError(f"{written.name} needs {_listed(required)}: write {way}")
    return {(required or names)[0]: written.text}


def check(tool: str, given: Mapping[str, Any], parameters: Schema) -> dict[str, Any]:
    """Returns the arguments in the order of the parameters, converted to their types.

    Raises:
        ArgumentError: one is unknown, missing, or of another type.
    """
    known = parameters.get("properties", {})
    for key in given:
        if key not in known:
            wrong = unknown_name("argument", key[:40], known) if known else f"no argument {key[:40]!r}; it takes none"
            raise ArgumentError(f"{tool}: {wrong}")
    for key in parameters.get("required", []):
        if key not in given:
            raise ArgumentError(f"{tool}: argument {key!r} is missing; expected {expected(known.get(key, {}))}")
    fitted = {}
    for key, schema in known.items():
        if key in given:
            try:
                fitted[key] = _fit(given[key], schema)
            except _MisfitError:
                raise ArgumentError(
                    f"{tool}: argument {key!r} must be {expected(schema)}, got {shown(given[key])}"
                ) from None
    return fitted


class _MisfitError(Exception):
    """A value is not of its schema's type."""


def _fit(value: Any, schema: Schema, convert: bool = True) -> Any:
    """Returns `value` as the schema's type; text that reads as that type is converted.

    Raises:
        _MisfitError: it is of another type, or outside the schema's bounds.
    """
    if "anyOf" in schema:
        for attempt in (False, True) if convert else (False,):
            for option in schema["anyOf"]:
                try:
                    return _fit(value, option, attempt)
                except _MisfitError:
                    continue
        raise _MisfitError
    if "const" in schema or "enum" in schema:
        for choice in schema.get("enum", [schema.get("const")]):
            written = choice if isinstance(choice, str) else dumps(choice)
            same = type(choice) is type(value) and choice == value
            if same or (convert and isinstance(value, str) and value.strip() == written):
                return choice
        raise _MisfitError
    kind = schema.get("type")
    if kind == "array":
        if isinstance(value, str) and convert:
            value = _read_list(value)
        if not isinstance(value, list):
            raise _MisfitError
        return [_fit(each, schema.get("items", {}), convert) for each in value]
    if kind in ("integer", "number", "boolean", "null") and isinstance(value, str) and convert:
        value = _read_scalar(value.strip(), kind)
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if kind == "number" and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**300:
        value = float(value)
    types = {"string": str, "integer": int, "number": float, "boolean": bool, "null": type(None)}
    if kind in types and type(value) is not types[kind]:
        raise _MisfitError
    if kind == "number" and not math.isfinite(value):
        raise _MisfitError
    if any(not holds(value, schema[key]) for key, (holds, _) in BOUNDS.items() if key in schema):
        raise _MisfitError
    return value


BOUNDS = {
    "minimum": (lambda value, bound: value >= bound, "at least"),
    "maximum": (lambda value, bound: value <= bound, "at most"),
    "exclusiveMinimum": (lambda value, bound: value > bound, "above"),
    "exclusiveMaximum": (lambda value, bound: value < bound, "below"),
}
"""Bounds that a number's schema may set: keyword -> (test, words)."""


def _read_scalar(text: str, kind: str) -> Any:
    lowered = text.lower()
    if kind == "integer" and _INTEGER.fullmatch(text):
        return int(text)
    if kind in ("integer", "number") and _NUMBER.fullmatch(text):
        return float(text)
    if kind == "boolean" and lowered in ("true", "false"):
        return lowered == "true"
    if kind == "null" and lowered in ("null", "none"):
        return None
    raise _MisfitError


def _read_list(text: str) -> Any:
    try:
        return DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        raise _MisfitError from None


def expected(schema: Schema) -> str:
    """Returns in words what a schema wants, e.g. ``an integer at least 1`` or ``one of 'new', 'used'``."""
    if "anyOf" in schema:
        return " or ".join(expected(option) for option in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        choices = schema.get("enum", [schema.get("const")])
        return ("one of " if len(choices) > 1 else "") + ", ".join(repr(choice) for choice in choices)
    if schema.get("type") == "array":
        return f"a list, each {expected(schema['items'])}" if schema.get("items") else "a list"
    kinds = {
        "string": "text",
        "integer": "an integer",
        "number": "a number",
        "boolean": "true or false",
        "null": "null",
    }
    words = kinds.get(str(schema.get("type")), "a value")
    return words + " and".join(f" {name} {schema[key]}" for key, (_, name) in BOUNDS.items() if key in schema)


def shown(value: Any) -> str:
    """Returns a value for an error message, short whatever it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:37] + "...")
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return dumps(value)[:40]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:-1])) + f" and {names[-1]!r}"
