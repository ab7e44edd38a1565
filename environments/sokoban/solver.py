"""Exact play: distances to the solution for one box, and an A* search over box pushes for any number.

* One box: `distance` and `move_values` give the number of moves to the solution from every state. A breadth-first
  search backwards from the solved states fills a table once per layout; a query is then a look-up. This is the ground
  truth of turn-level credit: the exact value of each of the four moves.
* Any number of boxes: `solve` searches over pushes, with the cheapest box-to-target assignment as its lower bound and
  dead squares and frozen boxes as its deadlock tests. States are bit masks over the cells of the board text, so that
  flooding the player's region is a handful of shifts and ors of one integer.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Iterator
from functools import lru_cache
from time import process_time

from agentrl.errors import AgentRLError, UserError
from environments.sokoban.board import Layout, read_board

Node = tuple[int, int]
"""The boxes and the player's region, as sets of cells (bit masks)."""


class SearchLimitError(AgentRLError):
    """`solve` gave up at its limit: the board may or may not have a solution."""


def backward_layers(layout: Layout) -> Iterator[list[int]]:
    """Yields the states of a one-box layout by their distance: solved (0 moves), then 1 move away, and so on.

    A state is the key ``player * len(layout.static) + box``. States that cannot reach the solution never appear.
    """
    area, floor, steps = len(layout.static), layout.floor, tuple(layout.deltas.values())
    (target,) = layout.targets
    layer = [player * area + target for player in floor if player != target]
    seen = set(layer)
    while layer:
        yield layer
        following = []
        for key in layer:
            player, box = divmod(key, area)
            for step in steps:
                origin = player - step
                if origin not in floor or origin == box:
                    continue
                walked = origin * area + box
                if walked not in seen:
                    seen.add(walked)
                    following.append(walked)
                if player + step == box:
                    pushed = origin * area + player
                    if pushed not in seen:
                        seen.add(pushed)
                        following.append(pushed)
        layer = following


@lru_cache(maxsize=1024)
def _table(layout: Layout) -> array[int]:
    if len(layout.targets) != 1:
        raise UserError(f"exact distances are for boards with one box, not {len(layout.targets)}; use solve()")
    table = array("h", [-1]) * len(layout.static) ** 2
    for moves, layer in enumerate(backward_layers(layout)):
        for key in layer:
            table[key] = moves
    return table


def distance_table(board: str) -> dict[tuple[int, int], int]:
    """Returns the moves to the solution of every (player's cell, box's cell) that can reach it, for one box.

    Cells are positions in the board text.

    Raises:
        UserError: `board` has several boxes, or is no board (`DataError`).
    """
    layout = read_board(board)[0]
    area = len(layout.static)
    return {divmod(key, area): moves for key, moves in enumerate(_table(layout)) if moves >= 0}


def distance(board: str) -> float:
    """Returns the fewest moves that solve a one-box `board`; infinity where nothing does.

    Raises:
        UserError: `board` has several boxes, or is no board (`DataError`).
    """
    layout, player, boxes = read_board(board)
    moves = _table(layout)[player * len(layout.static) + min(boxes)]
    return moves if moves >= 0 else math.inf


def move_values(board: str) -> dict[str, float]:
    """Returns for each of the four moves the distance to the solution after it (infinity: it loses the level).

    Raises:
        UserError: `board` has several boxes, or is no board (`DataError`).
    """
    layout, player, boxes = read_board(board)
    table, area, floor = _table(layout), len(layout.static), layout.floor
    (box,) = boxes
    values: dict[str, float] = {}
    for name, step in layout.deltas.items():
        cell, pushed = player + step, box
        if cell == box:
            pushed = cell + step
        if cell not in floor or pushed not in floor:
            cell, pushed = player, box
        moves = table[cell * area + pushed]
        values[name] = moves if moves >= 0 else math.inf
    return values


def solve(board: str, limit: int = 200_000, limit_s: float = math.inf) -> list[str] | None:
    """Returns moves that solve `board` with the fewest pushes, or None where there is no solution.

    A* over pushes (Hart, Nilsson & Raphael 1968). Moves between two pushes are the shortest; their total is not
    minimised (see `distance` for the fewest moves with one box).

    Args:
        board: any board with as many boxes as targets.
        limit: boards that may be expanded (a few ten thousand a second).
        limit_s: processor seconds that the search may take; what it finds then depends on the machine.

    Raises:
        SearchLimitError: a limit was reached and neither a solution nor its absence was shown.
        DataError: `board` is no board.
    """
    layout, player, boxes = read_board(board)
    pushes = _PushSearch(layout).run(player, sum(1 << box for box in boxes), limit, limit_s)
    return None if pushes is None else _walk(layout, player, boxes, pushes)


def _walk(layout: Layout, player: int, boxes: frozenset[int], pushes: list[tuple[int, int]]) -> list[str]:
    """Returns the moves of a list of pushes (box's cell, step), with the shortest walk to each."""
    moves: list[str] = []
    for box, step in pushes:
        came: dict[int, tuple[int, str]] = {player: (player, "")}
        queue = [player]
        for cell in queue:
            for name, delta in layout.deltas.items():
                beyond = cell + delta
                if beyond in layout.floor and beyond not in boxes and beyond not in came:
                    came[beyond] = cell, name
                    queue.append(beyond)
        walk = []
        cell = box - step
        while cell != player:
            cell, name = came[cell]
            walk.append(name)
        moves += [*reversed(walk), next(name for name, delta in layout.deltas.items() if delta == step)]
        player, boxes = box, boxes - {box} | {box + step}
    return moves


class _PushSearch:
    """A* over pushes. A set of cells is an integer whose bit c is cell c of the board text."""

    def __init__(self, layout: Layout) -> None:
        self.steps = tuple(layout.deltas.values())
        self.stride = layout.stride
        self.floor = sum(1 << cell for cell in layout.floor)
        self.targets = sum(1 << cell for cell in layout.targets)
        self.pushes_to = [_pushes_to(layout, target) for target in layout.targets]
        alive = set().union(*self.pushes_to)
        self.alive = sum(1 << cell for cell in alive)
        self.bounds: dict[int, float] = {}

    def reach(self, player: int, boxes: int) -> int:
        """Returns the cells that the player can walk to."""
        free, stride = self.floor & ~boxes, self.stride
        region, grown = 0, 1 << player
        while grown != region:
            region = grown
            grown = (region | region << 1 | region >> 1 | region << stride | region >> stride) & free
        return region

    def bound(self, boxes: int) -> float:
        """Returns a lower bound on the pushes: the cheapest assignment of boxes to targets, or its relaxation."""
        known = self.bounds.get(boxes)
        if known is None:
            cells = _cells(boxes)
            rows = [[table.get(cell, math.inf) for table in self.pushes_to] for cell in cells]
            known = self.bounds[boxes] = _assignment(rows) if len(rows) <= 6 else sum(map(min, rows))
        return known

    def frozen(self, box: int, boxes: int) -> bool:
        """Whether the box just pushed to `box` can never move again, and it or a box that holds it is off target."""
        return self._freeze(box, boxes, 0) & ~self.targets != 0

    def _freeze(self, box: int, boxes: int, walls: int) -> int:
        """Returns the boxes that hold `box` for ever, itself included; 0 if it may move. `walls`: boxes in question."""
        held = 1 << box
        walls |= held
        for step in (1, self.stride):
            sides = 1 << (box + step) | 1 << (box - step)
            if sides & ~self.floor or sides & walls or not sides & self.alive:
                continue
            for side in (box + step, box - step):
                if boxes >> side & 1 and (others := self._freeze(side, boxes, walls)):
                    held |= others
                    break
            else:
                return 0
        return held

    def run(self, player: int, boxes: int, limit: int, limit_s: float) -> list[tuple[int, int]] | None:
        """Returns the pushes (box's cell, step) of a solution; None if there is none."""
        over = process_time() + limit_s
        start = boxes, self.reach(player, boxes)
        cost: dict[Node, float] = {start: 0}
        parent: dict[Node, tuple[Node, tuple[int, int]]] = {}
        bound = self.bound(boxes)
        queue = [(bound, bound, start)] if bound < math.inf else []
        expanded = 0
        while queue:
            total, bound, node = heapq.heappop(queue)
            boxes, region = node
            if total - bound > cost[node]:
                continue
            if boxes == self.targets:
                return _trace(node, parent)
            if expanded == limit:
                raise SearchLimitError(f"no solution within limit={limit} expanded boards")
            if process_time() > over:
                raise SearchLimitError(f"no solution within limit_s={limit_s:g} seconds ({expanded} expanded boards)")
            expanded += 1
            pushes = cost[node] + 1
            for box, step in self._pushes(boxes, region):
                pushed = boxes ^ 1 << box ^ 1 << box + step
                if (bound := self.bound(pushed)) == math.inf or self.frozen(box + step, pushed):
                    continue
                child = pushed, self.reach(box, pushed)
                if pushes < cost.get(child, math.inf):
                    cost[child] = pushes
                    parent[child] = node, (box, step)
                    heapq.heappush(queue, (pushes + bound, bound, child))
        return None

    def _pushes(self, boxes: int, region: int) -> Iterator[tuple[int, int]]:
        """Yields the boxes that the player can push, with the step, onto a free cell that is no dead square."""
        free = self.alive & ~boxes
        for step in self.steps:
            ready = boxes & (region << step & free >> step if step > 0 else region >> -step & free << -step)
            for box in _cells(ready):
                yield box, step


def _cells(mask: int) -> list[int]:
    cells = []
    while mask:
        low = mask & -mask
        cells.append(low.bit_length() - 1)
        mask ^= low
    return cells


def _assignment(rows: list[list[float]]) -> float:
    """Returns the least total of one entry per row, each in a column of its own (dynamic programme over columns)."""
    best: dict[int, float] = {0: 0.0}
    for row in rows:
        following: dict[int, float] = {}
        for used, total in best.items():
            for column, entry in enumerate(row):
                if not used >> column & 1 and total + entry < following.get(used | 1 << column, math.inf):
                    following[used | 1 << column] = total + entry
        best = following
    return min(best.values(), default=math.inf)


def _pushes_to(layout: Layout, target: int) -> dict[int, int]:
    """Returns the fewest pushes that bring a lone box from each cell to `target`, wherever the player stands."""
    pushes, queue = {target: 0}, [target]
    for cell in queue:
        for step in layout.deltas.values():
            origin = cell - step
            if origin in layout.floor and origin - step in layout.floor and origin not in pushes:
                pushes[origin] = pushes[cell] + 1
                queue.append(origin)
    return pushes


def _trace(node: Node, parent: dict[Node, tuple[Node, tuple[int, int]]]) -> list[tuple[int, int]]:
    pushes = []
    while node in parent:
        node, push = parent[node]
        pushes.append(push)
    return pushes[::-1]
