"""An environment's table against its play."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np

from agentrl.envs import TextEnv


def assert_table_agrees(env: TextEnv, seeds: Iterable[int], turns: int = 30) -> int:
    """Plays random episodes and compares every turn with `env.tabular()`. Returns the number of turns compared."""
    compared = 0
    for seed in seeds:
        observation, info = env.reset(seed=seed)
        table, rng, where = env.tabular(), random.Random(seed), f"seed {seed}"
        number = {key: i for i, key in enumerate(table.keys)}
        size = len(table.keys), len(table.actions)
        assert len(number) == len(set(table.keys)) == len(table.observations) == size[0], where
        assert table.next_state.shape == table.solved.shape == table.ended.shape == size, where
        assert table.next_state.dtype == np.int64, where
        assert ((table.next_state >= 0) & (table.next_state < size[0])).all(), where
        assert not (table.solved & ~table.ended).any(), where
        assert number[info["state_key"]] == table.start, where
        assert table.actions == info["admissible_actions"], where
        for _ in range(turns):
            state, action = number[info["state_key"]], rng.randrange(size[1])
            assert table.observations[state] == observation, where
            observation, _, terminated, _, info = env.step(table.actions[action])
            compared += 1
            assert (terminated, info["success"]) == (table.ended[state, action], table.solved[state, action]), where
            if terminated:
                break
            assert number[info["state_key"]] == table.next_state[state, action], where
        again = env.tabular()
        assert (again.keys, again.start) == (table.keys, table.start), (
            f"{where}: the table is the level's, not the turn's"
        )
    return compared
