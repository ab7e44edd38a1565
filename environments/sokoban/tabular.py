"""A level as a finite Markov decision process: every state that play can reach, each found once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from agentrl.envs import Tabular
from agentrl.errors import UserError
from environments.sokoban.board import MOVES, Boxes, State, draw_board, move

MAX_STATES = 20_000


def tabulate(start: State, show: Callable[[str, int, Boxes], str]) -> Tabular:
    """Returns the level that begins in `start`, for one move a turn, by breadth-first search.

    Solved states are left out, as play never goes on from one: transitions into them are `solved` and `ended`, and
    their `next_state` is the state itself.

    Args:
        start: layout, player and boxes after `reset`; state 0 of the table.
        show: (board text, player, boxes) -> observation.

    Raises:
        UserError: more than `MAX_STATES` states.
    """
    layout, *_ = start
    deltas, targets = [layout.deltas[name] for name in MOVES], layout.targets
    states = [start[1:]]
    number = {states[0]: 0}
    after: list[int] = []
    solved: list[bool] = []
    for here, (player, boxes) in enumerate(states):  # grows while it is read
        for delta in deltas:
            state = move(layout, player, boxes, delta)
            solved.append(state[1] == targets)
            if solved[-1]:
                after.append(here)
                continue
            there = number.setdefault(state, len(states))
            if there == len(states):
                states.append(state)
            after.append(there)
        if len(states) > MAX_STATES:
            raise UserError(f"a level with more than {MAX_STATES:,} states has no table; take fewer boxes or cells")
    keys = [draw_board(layout, player, boxes) for player, boxes in states]
    ends = np.array(solved).reshape(-1, len(MOVES))
    return Tabular(
        keys=keys,
        observations=[show(key, *state) for key, state in zip(keys, states, strict=True)],
        actions=list(MOVES),
        next_state=np.array(after, dtype=np.int64).reshape(-1, len(MOVES)),
        solved=ends,
        ended=ends,
        start=0,
    )
