"""Which function a policy is: a hash of what it does, since a name does not tell two lambdas from each other.

Hashed are the compiled code, defaults, closure values, and the global names that the code uses as far as they are
functions of the same module or constants. Left out: what other modules hold, mutable globals (a log or a cache would
make a function another one by playing), and the inside of objects that show no more than their type.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

from agentrl.policy import Policy

_LONGEST = 10_000
"""Characters of one value's text, and items of one container, that are looked at."""
_DEEPEST = 12
_CONSTANTS = (str, bytes, int, float, complex, tuple, frozenset, type(None))


def function_of(policy: Policy) -> Callable[..., Any] | None:
    """Returns the function that `policy` is; None where it is more than one."""
    found = getattr(policy, "function", None)
    return found if callable(found) else None


def function_hash(function: Callable[..., Any]) -> str:
    """Returns 16 hex digits, the same in every process of one Python version for the same function."""
    return hashlib.sha256(_text(function, {}, 0).encode(errors="backslashreplace")).hexdigest()[:16]


def _text(value: Any, seen: dict[int, Any], depth: int) -> str:
    """Returns a text of `value` without addresses and without the order of sets. `seen` keeps alive what it lists."""

    def inner(*values: Any) -> str:
        return "(" + ",".join(_text(one, seen, depth + 1) for one in values[:_LONGEST]) + f"){len(values)}"

    kind = type(value).__qualname__
    if isinstance(value, CodeType):
        return f"code {value.co_code.hex()} {value.co_names} {inner(*value.co_consts)}"
    if isinstance(value, set | frozenset):
        return f"{kind}{sorted(_text(one, seen, depth + 1) for one in value)}"
    if isinstance(value, _CONSTANTS) and not isinstance(value, tuple):
        return f"{kind} {value!r:.{_LONGEST}}"
    if isinstance(value, tuple):
        return kind + inner(*value)
    if depth > _DEEPEST or id(value) in seen:
        return kind
    seen[id(value)] = value
    if isinstance(value, FunctionType):
        cells = [_cell(cell) for cell in value.__closure__ or ()]
        return f"function {inner(value.__code__, value.__defaults__, value.__kwdefaults__, *cells, *_globals(value))}"
    if isinstance(value, MethodType):
        return "method " + inner(value.__func__, _own(value.__self__))
    if isinstance(value, functools.partial):
        return "partial " + inner(value.func, value.args, value.keywords)
    if isinstance(value, type):
        return f"type {value.__module__}.{kind}.{value.__qualname__}"
    if hasattr(value, "__wrapped__"):  # functools.cache and the like
        return f"{kind} {inner(value.__wrapped__)}"
    if isinstance(value, Mapping):
        return kind + inner(*value.items())
    if isinstance(value, list):
        return kind + inner(*value)
    if callable(value) and isinstance(call := type(value).__call__, FunctionType):
        return f"{kind} {inner(call, _own(value))}"
    return f"{kind} " + re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))[:_LONGEST]


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _own(value: Any) -> Any:
    """Returns what makes an object that is called this one: its type and its settings."""
    if isinstance(value, type):
        return value
    return type(value), {key: held for key, held in getattr(value, "__dict__", {}).items() if _constant(held)}


def _globals(function: FunctionType) -> list[tuple[str, Any]]:
    """Returns the global names that the code uses, nested functions' too, with those values that are hashed."""
    names: set[str] = set()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names |= {*code.co_names}
        codes += [one for one in code.co_consts if isinstance(one, CodeType)]
    found = []
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        code_of = getattr(value, "__wrapped__", value)
        ours = isinstance(code_of, FunctionType) and code_of.__module__ == function.__module__
        if ours or _constant(value):
            found.append((name, value))
    return found


def _constant(value: Any) -> bool:
    return isinstance(value, _CONSTANTS) and (
        not isinstance(value, tuple | frozenset) or all(_constant(one) for one in value)
    )
