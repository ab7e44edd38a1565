"""Deals: what they are worth to each side, how the scripted partner concedes, and the score of a deal by rule.

Every issue has options in an order that runs from what one side wants to what the other wants; both sides' points fall
along it in opposite directions, but not alike: what is dear to one may be cheap to the other, so that trading issues
off against each other (logrolling; Pruitt 1981, Raiffa 1982) leaves both with more than splitting each issue would.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np

Split = Literal["all", "train", "test"]
TEST_ONE_IN = 10
Deal = tuple[int, ...]
"""One option (by number) for each issue."""
Points = tuple[tuple[int, ...], ...]
"""For each issue, the points of its options."""


@dataclass(frozen=True)
class Stakes:
    """What a bargain is about: both sides' private points, and what each has without a deal."""

    own: Points
    theirs: Points
    floor: int
    """Points that the agent has without a deal: deals below it score 0."""
    their_floor: int
    """Least points that the partner ever agrees to."""

    @cached_property
    def deals(self) -> list[Deal]:
        """Every deal there is."""
        return list(_deals(tuple(map(len, self.own))))

    @cached_property
    def their_dream(self) -> Deal:
        """The deal with most points for the partner."""
        return self.deals[int(_sums(self.theirs).argmax())]

    @cached_property
    def own_worth(self) -> dict[Deal, int]:
        """Own points of every deal."""
        return dict(zip(self.deals, _sums(self.own).tolist(), strict=True))

    @cached_property
    def their_worth(self) -> dict[Deal, int]:
        """The partner's points of every deal."""
        return dict(zip(self.deals, _sums(self.theirs).tolist(), strict=True))

    @cached_property
    def best(self) -> int:
        """Own points of the best deal that the partner could agree to."""
        return int(_sums(self.own)[_sums(self.theirs) >= self.their_floor].max())

    def score(self, deal: Deal | None) -> float:
        """Goal score of a deal, 0 to 10: the share of the attainable gain over `floor` that it brings.

        10 is the best deal that the partner could ever agree to; no deal, and one at or below `floor`, is 0.
        """
        if deal is None:
            return 0.0
        return max(0.0, 10.0 * (worth(self.own, deal) - self.floor) / (self.best - self.floor))

    def efficient(self, deal: Deal) -> bool:
        """Whether no other deal is better for one side and not worse for the other (Pareto)."""
        mine, yours = self.own_worth[deal], self.their_worth[deal]
        pairs = zip(self.own_worth.values(), self.their_worth.values(), strict=True)
        return not any(a >= mine and b >= yours and (a, b) != (mine, yours) for a, b in pairs)


@cache
def _deals(options: tuple[int, ...]) -> tuple[Deal, ...]:
    """Every choice among so many options of each issue."""
    return tuple(itertools.product(*map(range, options)))


def _sums(points: Points) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Points of every deal, in the order of `_deals`."""
    total = np.zeros(1, dtype=np.int64)
    for options in points:
        total = np.add.outer(total, options).ravel()
    return total


def worth(points: Points, deal: Deal) -> int:
    """Returns the points of a deal: the sum over its issues."""
    return sum(options[choice] for options, choice in zip(points, deal, strict=True))


def total_points(issues: int) -> int:
    """Points of a side's dream deal: 8, 14, 20, 26, ... for 1, 2, 3, 4, ... issues."""
    return 6 * issues + 2


def draw_stakes(rng: np.random.Generator, issues: int, options: int, split: Split) -> Stakes:
    """Draws stakes of `split`, in which the agent can gain at least three tenths of all points over its floor."""
    total = total_points(issues)
    while True:  # at worst one in ten is a test task, and most draws leave enough to gain
        first_wins = bool(rng.integers(2))  # which end of the options is the agent's
        own, theirs = (_draw_points(rng, issues, options, down) for down in (first_wins, not first_wins))
        floor, their_floor = (int(rng.integers(total // 5, 3 * total // 10 + 1)) for _ in range(2))
        stakes = Stakes(own, theirs, floor, their_floor)
        if in_split(stakes, split) and stakes.best - floor >= 0.3 * total:
            return stakes


def _draw_points(rng: np.random.Generator, issues: int, options: int, down: bool) -> Points:
    """Points of one side: the issues' best options make up `total_points`; along an issue they fall to 0."""
    every = _tops(issues)
    lines = []
    for top in every[int(rng.integers(len(every)))]:
        even = (rank * top / (options - 1) for rank in range(options - 2, 0, -1))
        moved = (round(mean + by) for mean, by in zip(even, rng.uniform(-1, 1, options - 2).tolist(), strict=True))
        line = (top, *sorted((min(max(points, 0), top) for points in moved), reverse=True), 0)
        lines.append(line if down else line[::-1])
    return tuple(lines)


@cache
def _tops(issues: int) -> list[tuple[int, ...]]:
    """Every way to share out `total_points` over issues of 2 to 9 points."""
    return [tops for tops in itertools.product(range(2, 10), repeat=issues) if sum(tops) == total_points(issues)]


def in_split(stakes: Stakes, split: Split) -> bool:
    """Whether stakes belong to `split`: one in `TEST_ONE_IN` is for tests, by a hash of both sides' points."""
    if split == "all":
        return True
    digest = hashlib.sha256(json.dumps([stakes.own, stakes.theirs]).encode()).digest()
    return (int.from_bytes(digest[:8], "big") % TEST_ONE_IN == 0) == (split == "test")


CONCESSION: dict[str, Callable[[float, int], float]] = {
    "reciprocal": lambda time, moves: min(1.0, time / 2 + moves / 4),
    "steady": lambda time, moves: time,
    "hard": lambda time, moves: time**2,
}
"""Scripted partners: share of the way from their dream deal to their floor that they have conceded, from the share of
the rounds that is over and the number of times that the agent has offered them more than ever before. `reciprocal`
answers movement with movement, and stays put before one who does not move; `steady` and `hard` concede with time
(Faratin, Sierra and Jennings 1998: linear, and Boulware with exponent 2)."""


def demand(stakes: Stakes, strategy: str, time: float, moves: int) -> float:
    """Returns the least points that the partner agrees to now (see `CONCESSION`)."""
    dream = total_points(len(stakes.own))
    return dream - (dream - stakes.their_floor) * CONCESSION[strategy](time, moves)


def counter_offer(stakes: Stakes, least: float, near: Deal) -> Deal:
    """Returns the partner's offer: of the deals worth at least `least` to it, one nearest to the agent's last offer.

    Near means fewest steps along the options; among those, most points for the partner.
    """

    steps = np.zeros(1, dtype=np.int64)
    for options, at in zip(stakes.theirs, near, strict=True):
        steps = np.add.outer(steps, np.abs(np.arange(len(options)) - at)).ravel()
    theirs = _sums(stakes.theirs)
    # Steps first, then points: no deal has `total_points` + 1 of them.
    badness = steps * (total_points(len(near)) + 1) - theirs
    badness[theirs < least] = np.iinfo(np.int64).max
    return stakes.deals[int(badness.argmin())]
