"""Credit methods: which turn earned the outcome?

One file, one pure function per method: signals in, one advantage per action token out. A method declares what it needs
(`needs_prm`, ...), so that the trainer computes just that and knows no method by name.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from agentrl.credit.base import Advantage, CreditMethod, Options, Signals
from agentrl.credit.grpo import GRPO
from agentrl.credit.oprl import OPRL
from agentrl.credit.rloo import RLOO
from agentrl.errors import ConfigError, UnknownNameError, unknown_name

_METHODS: dict[str, CreditMethod] = {}


def register_credit(method: CreditMethod) -> CreditMethod:
    """Adds a method under its own name."""
    _METHODS[method.name] = method
    return method


def credit_names() -> list[str]:
    """Names of all known methods, sorted."""
    return sorted(_METHODS)


def load_credit(name: str, options: dict[str, Any]) -> tuple[CreditMethod, Options]:
    """Returns the method and its checked options.

    Raises:
        UnknownNameError: no such method.
        ConfigError: an option that the method does not have, or with a bad value.
    """
    if name not in _METHODS:
        raise UnknownNameError("credit method", name, _METHODS)
    method = _METHODS[name]
    try:
        return method, method.options_type(**options)
    except ValidationError as error:
        known = method.options_type.model_fields
        lines = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                lines.append(unknown_name(f"option of credit method {name!r} called", key, known))
            else:
                lines.append(f"credit.options.{key}={problem['input']!r}: {problem['msg']}")
        raise ConfigError("; ".join(lines)) from None


for _method in (GRPO, RLOO, OPRL):
    register_credit(_method)

__all__ = [
    "Advantage",
    "CreditMethod",
    "Options",
    "Signals",
    "credit_names",
    "load_credit",
    "register_credit",
]
