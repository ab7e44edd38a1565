"""A task instance as a finite Markov decision process, whose values can be computed exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tabular:
    """All S states that can be reached, and what each of A actions does there. Text that is no action stays put."""

    keys: list[str]
    """S: ``info["state_key"]`` of each state."""
    observations: list[str]
    """S: what the agent sees there."""
    actions: list[str]
    """A: canonical text of each action."""
    next_state: np.ndarray
    """(S, A) int64: the state after the action."""
    solved: np.ndarray
    """(S, A) bool: the action ends the episode with success."""
    ended: np.ndarray
    """(S, A) bool: the action ends the episode, solved or not."""
    start: int
    """The state after `reset`."""
