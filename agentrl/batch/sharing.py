"""What rows begin with alike, laid out once: rows as a forest of stretches of tokens.

The members of a group have their prompt in common, the turns of an episode with a windowed history their instructions,
episodes that went the same way their first turns. A model that reads each such stretch once computes the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray

DEEPEST = 64
"""Shared stretches above each other: each takes a call of its own in every layer."""


class Stretch(NamedTuple):
    """Tokens `start` to `stop` of row `row`, and of every row whose path leads through here."""

    row: int
    start: int
    stop: int
    below: int
    """Tokens of all stretches that continue it; they follow it directly (depth-first order)."""


class Forest(NamedTuple):
    """A layout of rows."""

    stretches: list[Stretch]
    """In depth-first order, without empty ones."""
    paths: list[list[int]]
    """Per row: positions in `stretches` that make it up, in order."""


def apart(rows: Sequence[Sequence[int]]) -> Forest:
    """Returns the layout of rows that share nothing."""
    return Forest([Stretch(i, 0, len(row), 0) for i, row in enumerate(rows)], [[i] for i in range(len(rows))])


def share(rows: Sequence[Sequence[int]], worth: int) -> Forest:
    """Returns the layout in which stretches that several rows begin with stand once.

    Args:
        rows: token ids; at least one each.
        worth: a stretch is shared where that saves reading at least so many tokens: its length times one less than the
            number of its rows.
    """
    arrays = [np.asarray(row, dtype=">u4") for row in rows]  # big-endian bytes sort as the numbers do
    keys = [array.tobytes() for array in arrays]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    common = [0, *(_common(arrays[a], arrays[b]) for a, b in itertools.pairwise(order))]
    forest = Forest([], [[] for _ in rows])
    _grow(forest, arrays, order, common, worth, (0, len(order), 0, 0), ())
    return forest


def _grow(
    forest: Forest,
    arrays: Sequence[Array],
    order: Sequence[int],
    common: Sequence[int],
    worth: int,
    branch: tuple[int, int, int, int],
    path: tuple[int, ...],
) -> int:
    """Lays out the rows `order[first:last]`, whose first `start` tokens stand already. Returns the tokens added.

    `common[i]`: tokens that row `order[i]` and the one before it begin with alike.
    """
    first, last, start, depth = branch
    if last - first == 1 or depth == DEEPEST:
        return sum(_leaf(forest, row, start, len(arrays[row]), path) for row in order[first:last])
    alike = min(common[first + 1 : last])
    bounds = [first, *(i for i in range(first + 1, last) if common[i] == alike), last]
    shared = (alike - start) * (last - first - 1) >= worth
    place = len(forest.stretches)
    if shared:
        forest.stretches.append(Stretch(order[first], start, alike, 0))
        path, start = (*path, place), alike
    branches = sorted(itertools.pairwise(bounds), key=lambda b: (b[1] - b[0], len(arrays[order[b[0]]])))
    below = sum(_grow(forest, arrays, order, common, worth, (*b, start, depth + 1), path) for b in branches)
    if not shared:
        return below
    own = forest.stretches[place] = forest.stretches[place]._replace(below=below)
    return own.stop - own.start + below


def _leaf(forest: Forest, row: int, start: int, stop: int, path: tuple[int, ...]) -> int:
    forest.paths[row].extend(path)
    if stop > start:
        forest.paths[row].append(len(forest.stretches))
        forest.stretches.append(Stretch(row, start, stop, 0))
    return stop - start


def _common(a: Array, b: Array) -> int:
    """Number of tokens that both begin with."""
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differ[0]) if len(differ) else shorter
