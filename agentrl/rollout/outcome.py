"""Outcome: one scalar per episode, and what counts as success.

A pure function of a finished trajectory, so that stored trajectories can be scored again under another rule.
"""

from __future__ import annotations

from agentrl.config.schema import OutcomeConfig
from agentrl.types import Trajectory


def score(trajectory: Trajectory, config: OutcomeConfig) -> tuple[float, bool]:
    """Returns the outcome reward of `trajectory` and whether it is a success.

    The environment's word is ``info["success"]`` of the last turn; an episode that a limit cut off is therefore a
    success only where the environment said so. ``rule="success"`` pays 1 for it. ``rule="return"`` pays the sum of the
    environment's rewards; with `success_above` set, a success is an outcome strictly above it, whatever ended the
    episode (a dialogue that runs to its turn limit may well have reached its goal). ``truncated="failure"`` makes every
    episode that a limit cut off a failure with an outcome of at most 0.

    Args:
        trajectory: any trajectory; those that infrastructure ended score (0.0, False) and must not be averaged.
        config: the rule.

    Returns:
        (outcome in the rule's unit, success).
    """
    if not trajectory.scorable:
        return 0.0, False
    solved = bool(trajectory.turns and trajectory.turns[-1].info.get("success", False))
    return judged(solved, trajectory.total_reward, trajectory.truncated, config)


def judged(solved: bool, total: float, truncated: bool, config: OutcomeConfig) -> tuple[float, bool]:
    """`score` of a scorable episode, from the numbers alone.

    Args:
        solved: the environment's word.
        total: sum of the environment's rewards.
        truncated: a limit cut it off.
        config: the rule.
    """
    if config.rule == "success":
        outcome, success = float(solved), solved
    else:
        outcome = float(total)
        success = solved if config.success_above is None else outcome > config.success_above
    if config.truncated == "failure" and truncated:
        return min(outcome, 0.0), False
    return outcome, success
