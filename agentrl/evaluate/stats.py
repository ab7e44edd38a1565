"""Intervals for evaluation: Wilson's for success rates, a bootstrap over tasks for means."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from pydantic import BaseModel

from agentrl.errors import UserError


class Proportion(BaseModel):
    """A success rate with its interval, each in [0, 1], out of `episodes`."""

    value: float
    low: float
    high: float
    episodes: int

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.episodes}"


class Interval(BaseModel):
    """A mean with its interval; `low` and `high` are None where fewer than two tasks say nothing about the spread."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        spread = "" if self.low is None else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{spread}"


def wilson(successes: int, episodes: int, level: float = 0.95) -> Proportion:
    """Returns the success rate with Wilson's score interval (Wilson 1927, without continuity correction).

    It stays inside [0, 1] and keeps its coverage near 0 and 1, where the normal interval has width zero.

    Raises:
        UserError: no episodes, or more successes than episodes.
    """
    if not 0 <= successes <= episodes or episodes == 0:
        raise UserError(f"{successes} successes of {episodes} episodes have no success rate")
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, z2n = successes / episodes, z * z / episodes
    centre = (p + z2n / 2) / (1 + z2n)
    half = z * math.sqrt(p * (1 - p) / episodes + z2n / (4 * episodes)) / (1 + z2n)
    # At 0 and 1 the bound equals the rate; rounding must not push it a hair past.
    return Proportion(
        value=p, low=min(max(centre - half, 0.0), p), high=max(min(centre + half, 1.0), p), episodes=episodes
    )


def bootstrap_mean(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Returns the mean of `values` with a percentile bootstrap interval that resamples whole clusters.

    Episodes of one task are alike; resampling single episodes would pretend to more evidence than there is.

    Args:
        values: (N,) one per episode.
        clusters: (N,) the task of each episode.
        level: coverage of the interval.
        resamples: bootstrap samples.
        seed: of the resampling: same values and seed, same interval.

    Raises:
        UserError: no values, or lengths that differ.
    """
    if not values or len(values) != len(clusters):
        raise UserError(
            f"bootstrap_mean needs one cluster per value, got {len(values)} values, {len(clusters)} clusters"
        )
    mean = float(np.mean(values))
    index = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    count = len(index)
    if count < 2:
        return Interval(value=mean)
    cluster_of_value = np.array([index[cluster] for cluster in clusters])
    sums = np.bincount(cluster_of_value, weights=np.asarray(values, dtype=float), minlength=count)
    sizes = np.bincount(cluster_of_value, minlength=count)
    draws = np.random.default_rng(seed).integers(0, count, (resamples, count))
    means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=mean, low=float(low), high=float(high))
