"""`VisualSokobanEnv`: Sokoban as a picture. Rules, levels, splits and agents are those of `SokobanEnv`.

A picture is two look-ups: cell -> tile of palette numbers, palette number -> colour. Nothing is drawn per cell.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np

from agentrl.envs import Tabular
from agentrl.envs.content import AnyContent
from agentrl.envs.core import Step
from agentrl.errors import ActionError, UserError
from agentrl.images import image_part
from agentrl.types import ImagePart, TextPart
from environments.sokoban.board import draw_board
from environments.sokoban.env import SokobanEnv

ALPHABET = "# .$*@+"
"""Order of the tiles."""

PALETTE = np.array(
    [
        (92, 74, 61),  # 0 brick
        (61, 48, 40),  # 1 mortar
        (238, 226, 200),  # 2 floor
        (214, 69, 65),  # 3 target
        (186, 124, 52),  # 4 box
        (122, 76, 28),  # 5 edge of a box
        (76, 153, 84),  # 6 box on target
        (44, 98, 52),  # 7 its edge
        (52, 104, 186),  # 8 player
        (22, 44, 92),  # 9 edge of the player
    ],
    dtype=np.uint8,
)

_RULES = """You are solving a Sokoban puzzle: push every box onto a target.
In the picture walls are dark bricks, targets red diamonds, boxes brown crates (green on a target), and you are the \
blue disc (over a red diamond where you stand on a target).
Walk into a box to push it one cell; you cannot pull, and cannot push two boxes or into a wall.
"""

_PICTURE = "The picture shows the same board as the text under it.\n"


@lru_cache(maxsize=8)
def tiles(cell: int) -> np.ndarray:
    """Returns (7, cell, cell) uint8 palette numbers: one tile for each character of `ALPHABET`."""
    y, x = np.mgrid[:cell, :cell]
    # Distances from the middle, in halves of a tile.
    down, right = (2 * y + 1) / cell - 1, (2 * x + 1) / cell - 1
    radius, diamond, square = np.hypot(down, right), abs(down) + abs(right), np.maximum(abs(down), abs(right))
    wall = (y * 4 % cell < 4) | ((x + (y * 4 // cell % 2) * cell // 4) * 2 % cell < 2)
    floor = np.full((cell, cell), 2)
    target = np.where(diamond < 0.72, 3, floor)

    def box(body: int) -> np.ndarray:
        edge = (square > 0.6) | (abs(abs(down) - abs(right)) < 0.12)
        return np.where(square < 0.8, np.where(edge, body + 1, body), floor)

    def player(ground: np.ndarray) -> np.ndarray:
        return np.where(radius < 0.42, np.where(radius > 0.3, 9, 8), ground)

    return np.stack([wall.astype(int), floor, target, box(4), box(6), player(floor), player(target)]).astype(np.uint8)


_CODE = np.zeros(128, dtype=np.uint8)
_CODE[[ord(char) for char in ALPHABET]] = np.arange(len(ALPHABET))


@lru_cache(maxsize=8)
def _coloured(cell: int) -> np.ndarray:
    coloured: np.ndarray = PALETTE[tiles(cell)]
    return coloured


def draw_pixels(board: str, cell: int = 28) -> np.ndarray:
    """Returns the picture of a board text: (rows * cell, columns * cell, 3) uint8, RGB."""
    columns = board.find("\n") if "\n" in board else len(board)
    text = np.frombuffer((board + "\n").encode(), dtype=np.uint8).reshape(-1, columns + 1)
    grid = _coloured(cell)[_CODE[text[:, :-1]]]  # (rows, columns, cell, cell, 3)
    return grid.swapaxes(1, 2).reshape(len(grid) * cell, columns * cell, 3)


@lru_cache(maxsize=4096)
def _picture(board: str, cell: int, alt: str) -> ImagePart:
    """Members of a group see the same boards: each is encoded once."""
    return image_part(draw_pixels(board, cell), alt=alt)


class VisualSokobanEnv(SokobanEnv):
    """Sokoban in pictures: an observation is a list of an image part and, with ``show="both"``, the text.

    Args:
        show: ``both``: picture and text. ``image``: the picture alone; its `alt` holds the text, for readers that take
            no pictures (a text-only PRM).
        cell: pixels on each side of a cell. 28 is what one token of Qwen2.5-VL covers (32: Qwen3-VL).
        observation: how the text is written, as in `SokobanEnv`.
        render_mode: ``rgb_array``: `render` returns the pixels. ``ansi``: the board text.
        **settings: all others of `SokobanEnv`.

    Raises:
        UserError: as `SokobanEnv`; a `cell` outside 12..64.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 4}

    def __init__(
        self,
        *,
        show: Literal["both", "image"] = "both",
        cell: int = 28,
        observation: Literal["board", "cells"] = "board",
        render_mode: Literal["rgb_array", "ansi"] | None = "rgb_array",
        **settings: Any,
    ) -> None:
        super().__init__(observation=observation, **settings)
        if show not in ("both", "image"):
            raise UserError(f"show={show!r}: 'both' or 'image'")
        if not 12 <= cell <= 64:
            raise UserError(f"cell={cell}: 12 to 64 pixels")
        self.show, self.cell = show, cell
        self.render_mode: str | None = render_mode
        self.observation_space = AnyContent()
        how = self.instructions.splitlines()[-1]
        self.instructions = (_RULES if show == "image" else f"{self.instructions[: -len(how)]}{_PICTURE}") + how

    def begin(self, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        text, info = super().begin(options)
        return self._content(text), info

    def play(self, action: list[str]) -> Step:
        text, reward, terminated, info = super().play(action)
        return self._content(str(text)), reward, terminated, info

    def on_invalid(self, error: ActionError) -> Step:
        _, reward, terminated, info = super().on_invalid(error)
        shown = self._content(self._show(self.board, self._player, self._boxes))
        return [TextPart(text=f"Invalid action: {error}\n"), *shown], reward, terminated, info

    def render(self) -> Any:
        """Returns the pixels (height, width, 3) uint8, or the board text with ``render_mode="ansi"``."""
        return draw_pixels(self.board, self.cell) if self.render_mode == "rgb_array" else self.board

    def tabular(self) -> Tabular:
        """Refused: a table holds observations in text; `SokobanEnv` has it, with the same `state_key`.

        Raises:
            UserError: always.
        """
        raise UserError("VisualSokoban-v0 has no table of text observations; Sokoban-v0 has it, for the same levels")

    @property
    def board(self) -> str:
        """The board text."""
        return draw_board(self._layout, self._player, self._boxes)

    def _content(self, text: str) -> list[TextPart | ImagePart]:
        if self.show == "image":
            return [_picture(self.board, self.cell, text)]
        return [_picture(self.board, self.cell, ""), TextPart(text=text)]
