"""Seeds of actions: a function of where an action stands, never of when it was sampled.

`hash()` differs between machines and versions, and consecutive seeds would make neighbouring streams alike: hence
splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators").
"""

from __future__ import annotations

_MASK = 2**64 - 1


def mix(state: int, value: int) -> int:
    """Returns a 64-bit hash of two integers (one round of splitmix64): the same on every machine and in every run."""
    z = ((state ^ (value & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def episode_seed(seed: int, iteration: int, task_seed: int, member: int) -> int:
    """Returns the 64-bit state from which the seeds of one episode's actions come."""
    return mix(mix(mix(mix(0, seed), iteration), task_seed), member)


def action_seed(episode: int, turn: int) -> int:
    """Returns the 63-bit seed of the action of `turn`, given `episode_seed`."""
    return mix(episode, turn) >> 1
