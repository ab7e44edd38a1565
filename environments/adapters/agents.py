"""Scripted agents of the adapters. They know what the package itself gives away in `info`."""

from __future__ import annotations

import random

from agentrl.errors import PolicyFailure
from agentrl.policy import FunctionPolicy, Policy, PolicyRequest


def expert_policy(skill: float = 1.0) -> Policy:
    """Returns the policy that plays ``info["expert_action"]``: the package's own solution, where it has one.

    Off that path, or with probability ``1 - skill``, it plays any admissible action.

    Args:
        skill: probability of the expert's action, anew at each turn.
    """

    def act(request: PolicyRequest) -> str:
        rng = random.Random(request.seed)
        wanted, admissible = request.info.get("expert_action"), request.info.get("admissible_actions")
        if wanted is not None and (rng.random() < skill or not admissible):
            return str(wanted)
        if not admissible:
            raise PolicyFailure("the expert has no solution here: info has no 'expert_action'")
        return str(rng.choice(list(admissible)))

    return FunctionPolicy(act, name="adapter-expert" if skill == 1 else f"adapter-expert(skill={skill:g})")
