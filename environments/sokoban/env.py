"""`SokobanEnv`: push every box onto a target. The observation is the state of the board and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from agentrl.envs import Tabular, TextEnv
from agentrl.envs.core import Step
from agentrl.errors import ActionError, UserError
from environments.sokoban.board import MOVES, Boxes, draw_board, move, name_cells, read_board
from environments.sokoban.levels import LevelSettings, Split, check_feasible, check_split, generate, load_levels
from environments.sokoban.tabular import tabulate

_RULES = """You are solving a Sokoban puzzle: push every box onto a target.
# wall, (space) floor, . target, $ box, * box on target, @ you, + you on target.
Walk into a box to push it one cell; you cannot pull, and cannot push two boxes or into a wall.
"""

_RULES_IN_CELLS = """You are solving a Sokoban puzzle: push every box onto a target.
Cells are named by column letter and row number, from the top left. The board is walled all around.
Walk into a box to push it one cell; you cannot pull, and cannot push two boxes or into a wall.
"""


class SokobanEnv(TextEnv):
    """Sokoban in text.

    `info` holds `success`, `valid_action`, `admissible_actions` (always the four moves: one that walls or boxes forbid
    leaves the board as it is), `state_key` (the board) and `reward_parts`, whatever `reward` is:

        boxes    +1 for each box pushed onto a target, -1 for each pushed off one
        moves    -0.1 for each move made; text that is no action costs as much as one move
        solved   +10 when the last box comes to stand on a target

    ``reset(options={"board": text})`` starts from a given board instead of a drawn one.

    Args:
        size: side of generated boards, outer walls included (6..10).
        boxes: boxes of generated boards (1..4).
        min_solution: least solution length of generated levels, in moves (see `LevelSettings`).
        max_solution: largest solution length of generated levels, in moves; None: ``2 * size * boxes``.
        walls: least and largest number of interior walls; None: none to a quarter of the interior.
        split: ``train`` and ``test`` never share a level, nor a rotated or mirrored one.
        levels: file or folder in Boxoban's format; the seed then chooses one of its levels.
        actions_per_turn: most moves in one turn, played in order; the rest is dropped once the level is solved.
        reward: ``sparse``: 1 when solved, else 0. ``shaped``: the sum of `reward_parts`.
        observation: ``board``: the XSB text. ``cells``: what stands where, in words (``box d3 you c4``): half the
            tokens, and far easier for a tiny model that has to learn what a grid is from nothing.

    Raises:
        UserError: settings that no level meets, or a broken level file (`DataError`).
    """

    fast = True
    provides = {"state_keys": {}, "turn_rewards": {"reward": "shaped"}}

    local_arguments = frozenset({"levels"})

    def __init__(
        self,
        *,
        size: int = 6,
        boxes: int = 1,
        min_solution: int = 2,
        max_solution: int | None = None,
        walls: tuple[int, int] | None = None,
        split: Split = "all",
        levels: str | Path | None = None,
        actions_per_turn: int = 1,
        reward: Literal["sparse", "shaped"] = "sparse",
        observation: Literal["board", "cells"] = "board",
        render_mode: Literal["ansi"] | None = None,
    ) -> None:
        super().__init__()
        if actions_per_turn < 1:
            raise UserError(f"actions_per_turn={actions_per_turn}: at least one move a turn")
        if reward not in ("sparse", "shaped"):
            raise UserError(f"reward={reward!r}: 'sparse' or 'shaped'")
        if observation not in ("board", "cells"):
            raise UserError(f"observation={observation!r}: 'board' or 'cells'")
        check_split(split)
        self.settings = LevelSettings(
            size, boxes, min_solution, max_solution, None if walls is None else (walls[0], walls[1]), split
        )
        self.levels = None if levels is None else load_levels(str(levels), split)
        if self.levels is None:
            check_feasible(self.settings)
        self.actions_per_turn = actions_per_turn
        self.reward = reward
        # A move costs 0.1, puts one box on or off a target, and the last one solves the level.
        n = actions_per_turn
        self.reward_range = (0.0, 1.0) if reward == "sparse" else (-1.1 * n, 0.9 * n + 10.0)
        self.observation = observation
        self.render_mode = render_mode
        self.instructions = (_RULES if observation == "board" else _RULES_IN_CELLS) + (
            "Answer with one move: up, down, left or right."
            if actions_per_turn == 1
            else f"Answer with 1 to {actions_per_turn} moves among up, down, left, right, for example: up, up, left"
        )

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if (board := options.get("board")) is None:
            if self.levels is None:
                board = generate(self.settings, self.np_random)
            else:
                board = self.levels[int(self.np_random.integers(len(self.levels)))]
        self._start = self._layout, self._player, self._boxes = read_board(board)
        return self._show(board, self._player, self._boxes), self._info(board, 0, 0)

    def parse_action(self, text: str) -> list[str]:
        """Returns the moves in `text`: ``up``, ``up, up, left``, ``Action: up`` or ``<answer>up</answer>``.

        Raises:
            ActionError: anything else, or more than `actions_per_turn` moves.
        """
        if text in MOVES:
            return [text]
        answer = text.lower()
        if "<answer>" in answer:
            answer = answer.rpartition("<answer>")[2].partition("</answer>")[0]
        elif "action:" in answer:
            answer = answer.rpartition("action:")[2]
        moves = answer.replace(",", " ").split(None, self.actions_per_turn)
        if not moves or any(word not in MOVES for word in moves[: self.actions_per_turn]):
            raise ActionError("answer up, down, left or right")
        if len(moves) > self.actions_per_turn:
            raise ActionError(f"at most {self.actions_per_turn} move{'s' * (self.actions_per_turn > 1)} a turn")
        return moves

    def play(self, action: list[str]) -> Step:
        layout, player, boxes = self._layout, self._player, self._boxes
        made = 0
        for name in action:
            player, boxes = move(layout, player, boxes, layout.deltas[name])
            made += 1
            if boxes == layout.targets:
                break
        on_target = len(boxes & layout.targets) - len(self._boxes & layout.targets)
        self._player, self._boxes = player, boxes
        board = draw_board(layout, player, boxes)
        info = self._info(board, on_target, made)
        return self._show(board, player, boxes), self._reward(info), info["success"], info

    def on_invalid(self, error: ActionError) -> Step:
        observation, _, terminated, _ = super().on_invalid(error)
        info = self._info(draw_board(self._layout, self._player, self._boxes), 0, 1)
        return observation, self._reward(info), terminated, info

    def tabular(self) -> Tabular:
        """All states of the current level that play from its start can reach, solved ones left out (see `tabulate`).

        Raises:
            UserError: several moves a turn, or too many states.
        """
        if self.actions_per_turn != 1:
            raise UserError(f"actions_per_turn={self.actions_per_turn}: only levels of one move a turn have a table")
        return tabulate(self._start, self._show)

    def _show(self, board: str, player: int, boxes: Boxes) -> str:
        return board if self.observation == "board" else name_cells(self._layout, player, boxes)

    def _reward(self, info: dict[str, Any]) -> float:
        return sum(info["reward_parts"].values()) if self.reward == "shaped" else float(info["success"])

    def _info(self, board: str, on_target: int, moves: int) -> dict[str, Any]:
        solved = self._boxes == self._layout.targets
        bonus = 10.0 if solved and moves else 0.0
        return {
            "success": solved,
            "admissible_actions": list(MOVES),
            "state_key": board,
            "reward_parts": {"boxes": float(on_target), "moves": 0.0 - 0.1 * moves, "solved": bonus},
        }
