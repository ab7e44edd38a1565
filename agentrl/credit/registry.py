"""Names of credit methods: ours, those of installed packages, and those registered by hand."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from agentrl.credit.base import CreditMethod, Options
from agentrl.credit.gigpo import GIGPO
from agentrl.credit.ground_truth import GROUND_TRUTH
from agentrl.credit.grpo import DR_GRPO, GRPO
from agentrl.credit.oprl import OPRL
from agentrl.credit.ppo import PPO
from agentrl.credit.prime import PRIME
from agentrl.credit.prpo import PRPO
from agentrl.credit.reinforce_pp import REINFORCE_PP, REINFORCE_PP_BASELINE
from agentrl.credit.rloo import RLOO
from agentrl.credit.spro import SPRO
from agentrl.errors import ConfigError, UnknownNameError, unknown_name

OURS = (
    GRPO,
    RLOO,
    OPRL,
    GROUND_TRUTH,
    SPRO,
    GIGPO,
    DR_GRPO,
    PRIME,
    PRPO,
    REINFORCE_PP,
    REINFORCE_PP_BASELINE,
    PPO,
)

_METHODS: dict[str, CreditMethod] = {}


def register_credit(method: CreditMethod) -> CreditMethod:
    """Adds a method under its own name."""
    _METHODS[method.name] = method
    return method


for _method in OURS:
    register_credit(_method)


@cache
def load_plugins() -> dict[str, str]:
    """Registers the methods of installed packages once. Returns the broken ones: name -> why.

    An entry point of the group ``agentrl.credit`` names a `CreditMethod`. One that bears the name of a method we have
    already is refused: a run's configuration must not change its meaning with what else is installed.
    """
    broken = {}
    for point in entry_points(group="agentrl.credit"):
        try:
            method = point.load()
            if not isinstance(method, CreditMethod):
                raise TypeError(f"{point.value} is no CreditMethod but {type(method).__name__}")
            if method.name in _METHODS:
                raise ValueError(f"the name {method.name!r} is taken")
            register_credit(method)
        except Exception as error:
            broken[point.name] = f"{type(error).__name__}: {error}"
            warnings.warn(f"credit plugin {point.name!r} could not be loaded: {broken[point.name]}", stacklevel=2)
    return broken


def credit_methods() -> dict[str, CreditMethod]:
    """All known methods by name, sorted."""
    load_plugins()
    return dict(sorted(_METHODS.items()))


def credit_names() -> list[str]:
    """Names of all known methods, sorted."""
    return list(credit_methods())


def load_credit(name: str, options: dict[str, Any]) -> tuple[CreditMethod, Options]:
    """Returns the method and its checked options.

    Raises:
        UnknownNameError: no such method.
        ConfigError: an option that the method does not have, or with a bad value.
    """
    methods = credit_methods()
    if name not in methods:
        raise UnknownNameError("credit method", name, methods, "agentrl credit lists all")
    method = methods[name]
    try:
        return method, method.options_type(**options)
    except ValidationError as error:
        known = method.options_type.model_fields
        lines = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                lines.append(unknown_name(f"option of credit method {name!r} called", key, known))
            elif problem["type"] == "missing":
                hint = known[key].description
                lines.append(f"credit method {name!r} needs credit.options.{key}" + (f": {hint}" if hint else ""))
            elif not key:
                lines.append(f"credit.options of {name!r}: {problem['msg']}")
            else:
                lines.append(f"credit.options.{key}={problem['input']!r}: {problem['msg']}")
        raise ConfigError("; ".join(lines)) from None
