"""Boards of the XSB alphabet: text at the edges, integers inside.

    # wall    (space) floor    . target    $ box    * box on target    @ player    + player on target

A board is one string: rows of equal width joined by new lines. A cell is its position in that string, so that one row
down is ``+ (width + 1)`` and reading or drawing a board needs no coordinates. `Layout` is what never moves (walls and
targets); a state is a layout, the player's cell and the boxes' cells.
"""

from __future__ import annotations

from functools import lru_cache

from agentrl.errors import DataError

MOVES = ("up", "down", "left", "right")
_STATIC = str.maketrans({"$": " ", "@": " ", "*": ".", "+": "."})
_BOX = {" ": "$", ".": "*"}
_PLAYER = {" ": "@", ".": "+"}

Boxes = frozenset[int]
State = tuple["Layout", int, Boxes]
"""Layout, the player's cell, the boxes' cells."""


class Layout:
    """Walls and targets of a board, from its text without player and boxes.

    Raises:
        DataError: a foreign character, or rows of different widths.
    """

    __slots__ = ("deltas", "floor", "static", "stride", "targets")

    def __init__(self, static: str) -> None:
        rows = static.split("\n")
        if any(len(row) != len(rows[0]) for row in rows):
            raise DataError(f"rows of a board have one width, not {sorted({len(row) for row in rows})}")
        if foreign := set(static) - set("# .\n"):
            raise DataError(f"{min(foreign)!r} is no cell of a board; its alphabet is '#', ' ' and '.$*@+'")
        self.static = static
        self.stride = len(rows[0]) + 1
        self.deltas = dict(zip(MOVES, (-self.stride, self.stride, -1, 1), strict=True))
        self.floor: frozenset[int] = frozenset(self._enclosed())
        """Cells inside the outer walls: nothing that starts here can leave the text."""
        self.targets: Boxes = frozenset(cell for cell in self.floor if static[cell] == ".")

    def _enclosed(self) -> set[int]:
        floor = {cell for cell, char in enumerate(self.static) if char in " ."}
        last_row = len(self.static) - self.stride
        edge = [c for c in floor if c < self.stride or c > last_row or c % self.stride in (0, self.stride - 2)]
        while edge:
            cell = edge.pop()
            if cell in floor:
                floor.remove(cell)
                edge += [cell + delta for delta in self.deltas.values()]
        return floor


@lru_cache(maxsize=4096)
def layout_of(static: str) -> Layout:
    """Returns the (shared) layout of a board text without player and boxes."""
    return Layout(static)


def read_board(board: str) -> State:
    """Returns the state that a board text shows.

    Raises:
        DataError: not a board: a foreign character, ragged rows, no or several players, boxes and targets that differ
            in number, or something outside the walls.
    """
    layout = layout_of(board.translate(_STATIC))
    players = board.count("@") + board.count("+")
    if players != 1:
        raise DataError(f"a board has one player ('@' or '+'), not {players}")
    player = max(board.find("@"), board.find("+"))
    boxes = frozenset([cell for cell, char in enumerate(board) if char in "$*"])
    if len(boxes) != len(layout.targets) or not boxes:
        counts = f"{len(boxes)} boxes and {len(layout.targets)} targets"
        raise DataError(f"a board has as many boxes as targets (inside its walls) and at least one, not {counts}")
    if player not in layout.floor or not boxes <= layout.floor:
        raise DataError("the player and all boxes stand inside closed walls")
    return layout, player, boxes


def draw_board(layout: Layout, player: int, boxes: Boxes) -> str:
    """Returns the board text of a state."""
    cells = list(layout.static)
    for box in boxes:
        cells[box] = _BOX[cells[box]]
    cells[player] = _PLAYER[cells[player]]
    return "".join(cells)


@lru_cache(maxsize=4096)
def _names(layout: Layout) -> dict[int, str]:
    """Cell -> column letter and row digit, from the top left, as on a chess board: ``a0``, ``b0``, ..."""
    return {cell: f"{chr(97 + cell % layout.stride)}{cell // layout.stride}" for cell in range(len(layout.static))}


@lru_cache(maxsize=4096)
def _static_names(layout: Layout) -> str:
    rows = layout.static.split("\n")
    inner = [
        row * layout.stride + column
        for row in range(1, len(rows) - 1)
        for column in range(1, layout.stride - 2)
        if rows[row][column] == "#"
    ]
    walls, targets = (" ".join(_names(layout)[cell] for cell in cells) for cells in (inner, sorted(layout.targets)))
    return f"walls {walls or 'none'} target {targets}"


def name_cells(layout: Layout, player: int, boxes: Boxes) -> str:
    """Returns the state in words, walls of the outer edge left out: ``walls b3 target c1 box d3 you c4``."""
    names = _names(layout)
    return f"{_static_names(layout)} box {' '.join(names[box] for box in sorted(boxes))} you {names[player]}"


def move(layout: Layout, player: int, boxes: Boxes, delta: int) -> tuple[int, Boxes]:
    """Returns player and boxes after one move; a move that walls or boxes forbid changes nothing."""
    cell = player + delta
    if cell not in layout.floor:
        return player, boxes
    if cell in boxes:
        beyond = cell + delta
        if beyond not in layout.floor or beyond in boxes:
            return player, boxes
        boxes = boxes - {cell} | {beyond}
    return cell, boxes


def apply_move(board: str, action: str) -> str:
    """Returns the board text after ``up``, ``down``, ``left`` or ``right``."""
    layout, player, boxes = read_board(board)
    return draw_board(layout, *move(layout, player, boxes, layout.deltas[action]))
