"""The statistics of evaluation: intervals, pass@k and pass^k, and a paired test.

Wilson's interval for success rates of independent episodes, a bootstrap over whole tasks for everything else. All are
checked against references and for their coverage in `tests/test_evaluate_stats.py`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from pydantic import BaseModel

from agentrl.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK = 4_000_000
"""Numbers that are drawn at once."""
_EXACT = 14
"""Differences up to which all sign patterns are counted."""


class Proportion(BaseModel):
    """A success rate with its interval, each in [0, 1], out of `episodes`."""

    value: float
    low: float
    high: float
    episodes: int

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}] of {self.episodes}"


class Interval(BaseModel):
    """A mean with its interval; `low` and `high` are None where the tasks say nothing about the spread: there are fewer
    than two, or all have the same value."""

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
    low, high = _wilson_bounds(successes / episodes, episodes, level)
    return Proportion(value=successes / episodes, low=low, high=high, episodes=episodes)


def _wilson_bounds(p: float, count: int, level: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf((1 + level) / 2)
    z2n = z * z / count
    centre = (p + z2n / 2) / (1 + z2n)
    half = z * math.sqrt(p * (1 - p) / count + z2n / (4 * count)) / (1 + z2n)
    # At 0 and 1 the bound equals the rate; rounding must not push it a hair past.
    return min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p)


def bootstrap_mean(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Returns the mean of `values` with a bootstrap interval that resamples whole clusters (expanded percentiles).

    Episodes of one task are alike; resampling single episodes would pretend to more evidence than there is. Percentiles
    of few clusters are too narrow, as a normal interval with the plug-in deviation would be; they are taken further out
    by what Student's t asks in their place (Hesterberg 2014, arXiv 1411.5279).

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
    if np.ptp(sums / sizes) == 0:  # an interval without width would promise what was not seen
        return Interval(value=mean)
    means = _resampled(sums, sizes, resamples, np.random.default_rng(seed))
    tail = expanded_tail(count, level)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(value=mean, low=float(low), high=float(high))


def expanded_tail(count: int, level: float = 0.95) -> float:
    """Returns which percentile of the bootstrap bounds an interval over `count` >= 2 clusters, (1 - level) / 2 at most.

    Phi(-sqrt(n / (n - 1)) t), t being the quantile of Student's distribution with n - 1 degrees of freedom: the
    bootstrap distribution of a mean is normal with the variance that divides by n in the place of n - 1.
    """
    t = _student_quantile((1 + level) / 2, count - 1)
    return NormalDist().cdf(-math.sqrt(count / (count - 1)) * t)


def _student_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t by its expansion around the normal one (Abramowitz and Stegun 26.7.5).

    Within 1 % from 2 degrees of freedom on, 0.01 % from 6 on; with 1 it is too small, of no matter to a bootstrap.
    """
    z = NormalDist().inv_cdf(p)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * freedom**4)
    )


def _resampled(sums: Array, sizes: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Returns (resamples,) means of clusters drawn with replacement.

    Clusters that are alike are drawn together: how often each kind occurs among `count` draws is multinomial. Successes
    of many tasks have few kinds, so that this takes no time; otherwise clusters are drawn one by one, in blocks.
    """
    count = len(sums)
    kinds, kind_counts = np.unique(sums + 1j * sizes, return_counts=True)  # pairs as one number each sort fast
    if 8 * len(kind_counts) <= count:
        drawn = rng.multinomial(count, kind_counts / count, size=resamples)
        return np.asarray((drawn @ kinds.real) / (drawn @ kinds.imag))
    means = np.empty(resamples)
    block = max(1, _BLOCK // count)
    for start in range(0, resamples, block):
        draws = rng.integers(0, count, (min(block, resamples - start), count))
        means[start : start + block] = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    return means


def cluster_proportion(
    successes: Sequence[bool], tasks: Sequence[Hashable], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Proportion:
    """Returns the success rate with an interval over tasks, for several episodes of each task.

    The interval is the bootstrap's. Where all tasks have the same rate there is none; the interval is then
    Wilson's with each task counted once, as if its episodes were copies of one another.

    Args:
        successes: (N,) one per episode.
        tasks: (N,) the task of each episode.
        level: coverage of the interval.
        resamples: bootstrap samples.
        seed: of the resampling.

    Raises:
        UserError: no episodes, or lengths that differ.
    """
    found = bootstrap_mean([float(s) for s in successes], tasks, level=level, resamples=resamples, seed=seed)
    if found.low is None or found.high is None:
        low, high = _wilson_bounds(found.value, len(set(tasks)), level)
    else:
        low, high = found.low, found.high
    return Proportion(value=found.value, low=low, high=high, episodes=len(successes))


def pass_at_k(episodes: int, successes: int, k: int) -> float:
    """Returns the probability that at least one of `k` episodes of a task succeeds, estimated without bias.

    1 - C(n - c, k) / C(n, k) for c successes in n episodes (arXiv 2107.03374, Eq. 1).

    Raises:
        UserError: k outside 1..n, or c outside 0..n.
    """
    _check_counts(episodes, successes, k)
    return 1.0 - math.comb(episodes - successes, k) / math.comb(episodes, k)


def pass_hat_k(episodes: int, successes: int, k: int) -> float:
    """Returns the probability that all of `k` episodes of a task succeed, estimated without bias.

    C(c, k) / C(n, k) for c successes in n episodes (pass^k of arXiv 2406.12045).

    Raises:
        UserError: k outside 1..n, or c outside 0..n.
    """
    _check_counts(episodes, successes, k)
    return math.comb(successes, k) / math.comb(episodes, k)


def _check_counts(episodes: int, successes: int, k: int) -> None:
    if not (1 <= k <= episodes and 0 <= successes <= episodes):
        raise UserError(f"{successes} successes of {episodes} episodes say nothing about k={k}")


def sign_flip_p(differences: Sequence[float], *, draws: int = 20_000, seed: int = 0) -> float:
    """Returns the two-sided p-value of a paired permutation test: is the mean difference zero?

    Under the null hypothesis each task's difference could as well have had the other sign. The share of sign patterns
    with a mean at least as far from zero as the one found is exact for up to 14 tasks that differ; beyond that it is
    estimated from `draws` random patterns, (1 + hits) / (1 + draws), which keeps the level (Phipson and Smyth 2010).

    Args:
        differences: one per task; zeros change nothing.
        draws: random sign patterns.
        seed: of the patterns.
    """
    sizes, counts = np.unique(np.abs(np.asarray(differences, dtype=float)), return_counts=True)
    sizes, counts = sizes[sizes > 0], counts[sizes > 0]
    count = int(counts.sum())
    if count == 0:
        return 1.0
    # A hair of slack: sums of the same numbers in another order may differ in the last bit.
    least = abs(float(np.sum(differences))) * (1 - 1e-9)
    if count <= _EXACT:
        patterns = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        sums = (2.0 * patterns - 1.0) @ np.repeat(sizes, counts)
        return float(np.mean(np.abs(sums) >= least))
    rng = np.random.default_rng(seed)
    hits, block = 0, max(1, _BLOCK // count)
    if 8 * len(sizes) <= count:  # differences of one size: only how many of them are positive matters
        sums = (2.0 * rng.binomial(counts, 0.5, size=(draws, len(counts))) - counts) @ sizes
        hits = int(np.count_nonzero(np.abs(sums) >= least))
    else:
        values = np.repeat(sizes, counts)
        for start in range(0, draws, block):
            signs = rng.integers(0, 2, (min(block, draws - start), count), dtype=np.int8)
            hits += int(np.count_nonzero(np.abs((2.0 * signs - 1.0) @ values) >= least))
    return (1 + hits) / (1 + draws)
