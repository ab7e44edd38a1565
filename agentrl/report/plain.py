"""Values from files that anybody may have written or damaged, in the types that JSON has and of a bounded size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEPTH = 32
"""Levels of nesting: more than any configuration has, and far below where recursion ends."""

VALUES = 100_000
"""Values of one document; YAML's aliases make many out of few lines."""

INTEGERS = 2**63


def plain(value: Any) -> Any:
    """Returns a copy of `value` whose keys are text and whose leaves are text, numbers, booleans or None.

    Raises:
        ValueError: nested deeper than `DEPTH` (an alias of YAML may even name itself), or more than `VALUES` values.
    """
    seen = 0

    def copy(value: Any, depth: int) -> Any:
        nonlocal seen
        seen += 1
        if depth > DEPTH or seen > VALUES:
            raise ValueError(f"nested deeper than {DEPTH} levels" if depth > DEPTH else f"more than {VALUES:,} values")
        if isinstance(value, Mapping):
            return {str(key): copy(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item, depth + 1) for item in value]
        if isinstance(value, int) and abs(value) >= INTEGERS:
            return f"an integer of {value.bit_length()} bits"
        return value if value is None or isinstance(value, str | int | float) else str(value)

    return copy(value, 0)


def reason(error: BaseException) -> str:
    """Returns what `error` says, in one line that is not empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def is_count(value: Any) -> bool:
    """Whether `value` is a number that something can have been counted to."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**53
