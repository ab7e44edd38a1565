"""Policies without weights: uniformly random, or any plain function.

``load_policy("random")`` plays every environment that lists its admissible actions. ``load_policy("my.module:play")``,
which is ``load_policy("scripted", function="my.module:play")``, plays with a function of your own, from an observation
or from the whole `PolicyRequest`, plain or async.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any

from agentrl.errors import PolicyFailure, UserError
from agentrl.policy import FunctionPolicy, Policy, PolicyAction, PolicyRequest, load_function


def _random_action(request: PolicyRequest) -> str:
    actions = request.info.get("admissible_actions")
    if not actions:
        raise UserError(
            "the random policy draws from info['admissible_actions'], and this environment "
            + ("does not list any" if actions is None else "listed no action")
            + f" at turn {request.turn}; use a policy of the environment's own, or policy 'scripted' with a function"
        )
    return str(actions[random.Random(request.seed).randrange(len(actions))])


def random_policy() -> Policy:
    """Returns the policy that draws uniformly among the environment's admissible actions, from the request's seed.

    Its `act` raises `UserError` where the environment lists none.
    """
    return FunctionPolicy(_random_action, name="random")


class ScriptedPolicy(Policy):
    """A function as a policy; each request is a call of its own, so that async functions wait side by side.

    Args:
        function: from the observation (or, if its first parameter is named ``request`` or annotated `PolicyRequest`,
            from the request) to the action's text; plain or async.
        name: shown in reports and trajectories.
    """

    batched = False

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self.takes_request = _takes_request(function)

    async def act(self, requests: Sequence[PolicyRequest]) -> list[PolicyAction]:
        """Returns one action per request.

        Raises:
            PolicyFailure: the function raised, or returned something else than text.
        """
        return list(await asyncio.gather(*map(self._one, requests)))

    async def _one(self, request: PolicyRequest) -> PolicyAction:
        try:
            answer = self.function(request if self.takes_request else request.observation)
            if inspect.isawaitable(answer):
                answer = await answer
        except Exception as error:
            raise PolicyFailure(f"scripted policy {self.name!r} raised {type(error).__name__}: {error}") from error
        if not isinstance(answer, str):
            raise PolicyFailure(
                f"scripted policy {self.name!r} returned {type(answer).__name__}, not the action's text"
            )
        return PolicyAction(text=answer)


def _takes_request(function: Callable[..., Any]) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False
    if not parameters:
        raise UserError(
            f"scripted policy: {function!r} takes no argument; it needs one, the observation or the request"
        )
    first = parameters[0]
    return first.name == "request" or first.annotation in (PolicyRequest, "PolicyRequest")


def scripted_policy(function: str | Callable[..., Any], name: str | None = None) -> Policy:
    """Returns the policy that `function` is.

    Args:
        function: ``"module:function"``, in the current folder too, or the function itself (see `ScriptedPolicy`).
        name: shown in reports and trajectories; by default the function's own.

    Raises:
        UserError: no such module or function, or it cannot be called.
    """
    if not isinstance(function, str):
        if not callable(function):
            raise UserError(f"scripted policy: {function!r} cannot be called")
        return ScriptedPolicy(function, name)
    try:
        found = load_function(function)
    except UserError as error:
        raise UserError(f"scripted policy: function={function!r}: {error}") from error
    return ScriptedPolicy(found, name)
