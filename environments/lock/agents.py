"""Scripted lock agents. They read the symbol in brackets and draw randomness from the request's seed alone."""

from __future__ import annotations

import random

from agentrl.errors import UserError
from agentrl.policy import FunctionPolicy, Policy, PolicyRequest
from agentrl.types import text_of


def noisy_solver_policy(skill: float = 0.5) -> Policy:
    """Returns a policy that enters the right symbol with probability `skill`, else one of all symbols, uniformly.

    It knows a hidden code too, from ``info["state_key"]``.

    Args:
        skill: 1 never errs, 0 is the random agent.

    Raises:
        UserError: `skill` outside [0, 1].
    """
    if not 0 <= skill <= 1:
        raise UserError(f"skill={skill}: a probability between 0 and 1")

    def act(request: PolicyRequest) -> str:
        rng = random.Random(request.seed)
        state = str(request.info.get("state_key") or text_of(request.observation))
        symbols = request.info.get("admissible_actions") or sorted({char for char in state if char.isalpha()})
        return state[state.index("[") + 1] if rng.random() < skill else rng.choice(symbols)

    return FunctionPolicy(act, name=f"lock-noisy-solver(skill={skill:g})")


def solver_policy() -> Policy:
    """Returns the policy that always enters the right symbol (`noisy_solver_policy` with skill 1)."""
    policy = noisy_solver_policy(1.0)
    policy.name = "lock-solver"
    return policy
