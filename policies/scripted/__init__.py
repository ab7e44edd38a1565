"""Policies without weights: uniformly random, or any plain function.

``load_policy("random")`` plays every environment that lists its admissible actions. ``load_policy("my.module:play")``,
which is ``load_policy("scripted", function="my.module:play")``, plays with a function of your own, from an observation
or from the whole `PolicyRequest`, plain or async.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from agentrl.errors import UserError
from agentrl.policy import FunctionPolicy, Policy, PolicyRequest, as_policy, load_function


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


def scripted_policy(function: str | Callable[..., Any], name: str | None = None) -> Policy:
    """Returns the policy that `function` is.

    Args:
        function: ``"module:function"``, in the current folder too, or the function itself; of the observation or of the
            request (see `agentrl.policy.as_policy`).
        name: shown in reports and trajectories; by default the function's own.

    Raises:
        UserError: no such module or function, or it cannot be called.
    """
    try:
        return as_policy(load_function(function) if isinstance(function, str) else function, name)
    except UserError as error:
        raise UserError(f"scripted policy: function={function!r}: {error}") from error
