"""Where levels come from: a seeded generator that plays in reverse from solved boards, and files in Boxoban's format.

Held-out levels: a level belongs to the test split exactly when a hash of its canonical form (the least of its eight
rotations and mirror images) is 0 modulo `TEST_ONE_IN`. The split is a property of the level itself, so no training
level, nor a turned or mirrored copy of one, can ever be a test level, whatever the seeds and settings.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from agentrl.errors import DataError, UserError
from environments.sokoban.board import Layout, State, draw_board, read_board
from environments.sokoban.solver import backward_layers

Split = Literal["all", "train", "test"]
TEST_ONE_IN = 10
_LAYOUTS_PER_LENGTH = 20
_MAX_DRAWS = 20_000


@dataclass(frozen=True)
class LevelSettings:
    """What the generator draws.

    Attributes:
        size: side of the square board, outer walls included (6..10).
        boxes: number of boxes (1..4).
        min_solution: least solution length, in moves.
        max_solution: largest solution length, in moves; None: ``2 * size * boxes``. With one box both bounds hold for
            the optimal solution. With several they hold for the reverse play that made the level: it can be solved
            within `max_solution` moves, and its optimum may be shorter than `min_solution`.
        walls: least and largest number of interior walls; None: none to a quarter of the interior.
        split: ``train`` and ``test`` levels are disjoint up to rotation and reflection; ``all`` is both.
    """

    size: int = 6
    boxes: int = 1
    min_solution: int = 2
    max_solution: int | None = None
    walls: tuple[int, int] | None = None
    split: Split = "all"

    def __post_init__(self) -> None:
        interior = (self.size - 2) ** 2
        if not 6 <= self.size <= 10:
            raise UserError(f"size={self.size}: boards have a side of 6 to 10 cells, outer walls included")
        if not 1 <= self.boxes <= 4:
            raise UserError(f"boxes={self.boxes}: levels have 1 to 4 boxes")
        if not 1 <= self.min_solution <= self.longest:
            raise UserError(f"min_solution={self.min_solution}: between 1 and max_solution={self.longest} moves")
        low, high = self.wall_range
        if not 0 <= low <= high <= interior - 2 * self.boxes - 1:
            raise UserError(
                f"walls={low, high}: two numbers, least and largest, between 0 and {interior - 2 * self.boxes - 1} "
                f"for size={self.size} and boxes={self.boxes}"
            )
        check_split(self.split)

    @property
    def longest(self) -> int:
        """Largest solution length in moves, default filled in."""
        return 2 * self.size * self.boxes if self.max_solution is None else self.max_solution

    @property
    def wall_range(self) -> tuple[int, int]:
        """Least and largest number of interior walls, default filled in."""
        return (0, (self.size - 2) ** 2 // 4) if self.walls is None else self.walls


def check_split(split: str) -> None:
    """Raises UserError unless `split` is one of all, train, test."""
    if split not in ("all", "train", "test"):
        raise UserError(f"split={split!r}: one of 'all', 'train', 'test'")


def canonical(board: str) -> str:
    """Returns the least board text among the eight rotations and mirror images of `board`."""
    rows, images = board.split("\n"), []
    for _ in range(4):
        images += [rows, [row[::-1] for row in rows]]
        rows = ["".join(column) for column in zip(*rows[::-1], strict=True)]
    return "\n".join(min(images))


def in_split(board: str, split: Split) -> bool:
    """Whether a level belongs to `split`; the same for all its rotations and mirror images."""
    if split == "all":
        return True
    digest = hashlib.sha256(canonical(board).encode()).digest()
    return (int.from_bytes(digest[:8], "big") % TEST_ONE_IN == 0) == (split == "test")


def generate(settings: LevelSettings, rng: np.random.Generator) -> str:
    """Draws a level. Solution lengths are uniform between the bounds as far as layouts of such length are common.

    Levels of ``train`` and ``test`` follow the same distribution: each is a draw of ``all``, kept if in the split.

    Raises:
        UserError: no level was found; the bounds cannot be met together.
    """
    low, high = settings.min_solution, settings.longest
    length, misses = int(rng.integers(low, high + 1)), 0
    for _ in range(_MAX_DRAWS):
        layout = _draw_layout(settings, rng)
        state = _one_box(layout, length, rng) if settings.boxes == 1 else _several(layout, length, high, rng)
        if state is not None and in_split(board := draw_board(*state), settings.split):
            return board
        misses += 1
        if state is not None or misses == _LAYOUTS_PER_LENGTH:
            length, misses = int(rng.integers(low, high + 1)), 0
    raise UserError(f"no level with {settings} in {_MAX_DRAWS} draws; widen min_solution, max_solution or walls")


@lru_cache(maxsize=256)
def check_feasible(settings: LevelSettings) -> None:
    """Raises UserError if the generator cannot meet `settings`: said before the first episode, not inside one."""
    generate(settings, np.random.default_rng(0))


def _draw_layout(settings: LevelSettings, rng: np.random.Generator) -> Layout:
    """Draws interior walls and targets."""
    size, stride = settings.size, settings.size + 1
    low, high = settings.wall_range
    cells = list("#" * size + "\n" + ("#" + " " * (size - 2) + "#\n") * (size - 2) + "#" * size)
    walls = int(rng.integers(low, high + 1))
    inner = size - 2
    for rank, place in enumerate(rng.permutation(inner * inner)[: walls + settings.boxes].tolist()):
        cells[(place // inner + 1) * stride + place % inner + 1] = "#" if rank < walls else "."
    return Layout("".join(cells))


def _one_box(layout: Layout, length: int, rng: np.random.Generator) -> State | None:
    """Draws one of the states from which the best solution takes exactly `length` moves."""
    layer = next(islice(backward_layers(layout), length, None), None)
    if layer is None:
        return None
    player, box = divmod(layer[int(rng.integers(len(layer)))], len(layout.static))
    return layout, player, frozenset([box])


def _walks(layout: Layout, player: int, boxes: frozenset[int]) -> dict[int, int]:
    """Returns the number of moves to each cell that the player reaches without touching a box."""
    moves, queue = {player: 0}, [player]
    for cell in queue:
        for step in layout.deltas.values():
            beyond = cell + step
            if beyond in layout.floor and beyond not in boxes and beyond not in moves:
                moves[beyond] = moves[cell] + 1
                queue.append(beyond)
    return moves


def _several(layout: Layout, length: int, longest: int, rng: np.random.Generator) -> State | None:
    """Pulls boxes off the targets at random until `length` moves are spent and no box stands on a target.

    No arrangement of boxes is entered twice, so that pulls do not undo one another.
    """
    boxes, moves = layout.targets, 0
    free = sorted(layout.floor - boxes)
    player = free[int(rng.integers(len(free)))]
    seen = {boxes}
    while moves < length or boxes & layout.targets:
        walks = _walks(layout, player, boxes)
        pulls = []
        for cell, walked in walks.items():
            for step in layout.deltas.values():
                if cell + step in boxes and cell - step in walks and moves + walked < longest:
                    pulled = boxes - {cell + step} | {cell}
                    if pulled not in seen:
                        pulls.append((walked + 1, cell - step, pulled))
        if not pulls:
            return None
        spent, player, boxes = pulls[int(rng.integers(len(pulls)))]
        moves += spent
        seen.add(boxes)
    starts = [cell for cell, walked in _walks(layout, player, boxes).items() if moves + walked <= longest]
    return layout, starts[int(rng.integers(len(starts)))], boxes


@lru_cache(maxsize=16)
def load_levels(path: str, split: Split = "all") -> tuple[str, ...]:
    """Reads levels in Boxoban's format: blocks of ``; N`` followed by the rows of one board.

    Args:
        path: a file, or a folder whose ``*.txt`` files are read in the order of their names.
        split: keep only the levels of this split.

    Raises:
        DataError: nothing to read, or a block that is no board (names the file and the line).
    """
    root = Path(path)
    files = sorted(root.glob("*.txt")) if root.is_dir() else [root]
    levels = [board for file in files for board in _read_file(file) if in_split(board, split)]
    if not levels:
        raise DataError(f"{path}: no level of split {split!r} in {len(files)} file(s)")
    return tuple(levels)


def _read_file(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as levels: {error}") from error
    levels: list[str] = []
    rows: list[str] = []
    header = 0
    for number, line in enumerate([*lines, "; end"], start=1):
        if line.startswith(";"):
            if header:
                levels.append(_block(file, header, rows))
            header, rows = number, []
        elif line.strip():
            if not header:
                raise DataError(f"{file}:{number}: a level begins with '; N', not {line[:40]!r}")
            rows.append(line.rstrip())
    return levels


def _block(file: Path, header: int, rows: list[str]) -> str:
    width = max(map(len, rows), default=0)
    board = "\n".join(row.ljust(width) for row in rows)
    try:
        if not rows:
            raise DataError("no rows")
        read_board(board)
    except DataError as error:
        raise DataError(f"{file}:{header}: broken level: {error}") from error
    return board
