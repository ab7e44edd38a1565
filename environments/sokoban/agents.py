"""Scripted Sokoban agents. They read the board of the observation and draw randomness from the request's seed alone.

Levels with one box are played from the exact distance table: a move is a look-up. With several boxes the agents follow
plans of `solve` (fewest pushes), and play a random move where it finds none within its limit.
"""

from __future__ import annotations

import random
from functools import lru_cache

from agentrl.errors import UserError
from agentrl.policy import FunctionPolicy, Policy, PolicyRequest
from agentrl.types import text_of
from environments.sokoban.board import MOVES, apply_move, read_board
from environments.sokoban.solver import SearchLimitError, move_values, solve


def board_of(request: PolicyRequest) -> str:
    """Returns the board: from the info, else the one the request shows, without an error line above it."""
    if (key := request.info.get("state_key")) is not None:
        return str(key)
    text = text_of(request.observation)
    return text.partition("\n")[2] if text.startswith("Invalid action:") else text


def best_moves(board: str, limit: int = 20_000) -> list[str]:
    """Returns the moves that begin a best solution: all of them for one box, one for several; none where it is lost.

    Best means fewest moves for one box, fewest pushes for several.
    """
    if len(read_board(board)[2]) > 1:
        return [name for name in [_first_move(board, limit)] if name]
    values = move_values(board)
    least = min(values.values())
    return [name for name in MOVES if values[name] == least < float("inf")]


@lru_cache(maxsize=20_000)
def _first_move(board: str, limit: int) -> str:
    """Returns the first move of `solve`'s plan, "" where it finds none: a function of the board alone.

    Plans are made anew at each board. They still lead on: the search sees the player's region and not the cell, so that
    walking never changes the plan, and each push leaves one push fewer.
    """
    try:
        return (solve(board, limit=limit) or [""])[0]
    except SearchLimitError:
        return ""


def noisy_solver_policy(skill: float = 0.5, moves_per_turn: int = 1, limit: int = 20_000) -> Policy:
    """Returns a policy that plays well with probability `skill` and at random otherwise, anew at each move.

    A good move is drawn uniformly among all that begin a best solution; a random one uniformly among all four.

    Args:
        skill: probability of a good move. 1 always solves what can be solved, 0 is the random agent.
        moves_per_turn: moves in one answer (environments with ``actions_per_turn`` of at least as many).
        limit: nodes that the search may visit for one board with several boxes.

    Raises:
        UserError: `skill` outside [0, 1] or `moves_per_turn` below 1.
    """
    if not 0 <= skill <= 1:
        raise UserError(f"skill={skill}: a probability between 0 and 1")
    if moves_per_turn < 1:
        raise UserError(f"moves_per_turn={moves_per_turn}: at least one move a turn")

    def act(request: PolicyRequest) -> str:
        rng, board, answer = random.Random(request.seed), board_of(request), []
        for _ in range(moves_per_turn):
            good = best_moves(board, limit) if rng.random() < skill else []
            answer.append(rng.choice(good or MOVES))
            if moves_per_turn > 1:
                board = apply_move(board, answer[-1])
        return ", ".join(answer)

    return FunctionPolicy(act, name=f"sokoban-noisy-solver(skill={skill:g})")


def solver_policy(moves_per_turn: int = 1, limit: int = 20_000) -> Policy:
    """Returns the policy that always plays a move of a best solution (`noisy_solver_policy` with skill 1)."""
    policy = noisy_solver_policy(1.0, moves_per_turn, limit)
    policy.name = "sokoban-solver"
    return policy


def random_policy(moves_per_turn: int = 1) -> Policy:
    """Returns the policy that draws uniformly among the four moves."""
    policy = noisy_solver_policy(0.0, moves_per_turn)
    policy.name = "sokoban-random"
    return policy
