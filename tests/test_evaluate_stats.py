"""The statistics of evaluation: against references, closed forms, and their own promises by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from agentrl.errors import UserError
from agentrl.evaluate import bootstrap_mean, cluster_proportion, pass_at_k, pass_hat_k, sign_flip_p, wilson
from agentrl.evaluate.compare import paired
from agentrl.evaluate.stats import expanded_tail


def test_wilson_is_that_of_statsmodels() -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for successes, episodes in ((0, 7), (1, 1), (3, 40), (128, 256), (255, 256)):
        found = wilson(successes, episodes)
        low, high = proportion.proportion_confint(successes, episodes, method="wilson")
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_bootstrap_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(3).gamma(2.0, size=60)
    level = 1 - 2 * expanded_tail(60)
    found = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", confidence_level=level, rng=0)
    theirs = found.confidence_interval
    ours = bootstrap_mean(values.tolist(), range(60), resamples=20_000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_percentiles_are_expanded_to_where_student_s_t_has_them() -> None:
    stats = pytest.importorskip("scipy.stats")
    for count, within in ((3, 0.05), (4, 0.01), (8, 1e-3), (20, 1e-6), (256, 1e-9)):
        for level in (0.9, 0.95):
            t = stats.t.ppf((1 + level) / 2, count - 1)
            z = -stats.norm.ppf(expanded_tail(count, level))
            assert z == pytest.approx(t * math.sqrt(count / (count - 1)), rel=within)
    assert expanded_tail(10**6) == pytest.approx(0.025, abs=1e-6)


@pytest.mark.parametrize("tasks", [10, 20])
def test_intervals_over_few_tasks_cover_95_percent_too(tasks: int) -> None:
    """Plain percentiles hold the truth in 89.3 % (10 tasks) and 92.8 % of these trials."""
    rng = np.random.default_rng(11)
    held = 0
    for trial in range(2000):
        found = bootstrap_mean(rng.normal(size=tasks).tolist(), range(tasks), resamples=1000, seed=trial)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0 <= found.high
    assert 0.93 <= held / 2000 <= 0.97


def test_bootstrap_of_tasks_that_are_alike_is_that_of_all_tasks_one_by_one() -> None:
    """Alike tasks are drawn together (multinomial); adding a hair to each makes them all different."""
    rng = np.random.default_rng(4)
    won = (rng.random(400) < 0.3).astype(float)
    tasks = np.repeat(np.arange(200), 2).tolist()
    together = bootstrap_mean(won.tolist(), tasks, resamples=20_000)
    apart = bootstrap_mean((won + rng.random(400) * 1e-9).tolist(), tasks, resamples=20_000, seed=1)
    assert (together.low, together.high) == pytest.approx((apart.low, apart.high), abs=0.004)


@pytest.mark.parametrize(("episodes", "successes"), [(5, 2), (8, 0), (6, 6), (1, 1)])
def test_pass_at_k_and_pass_hat_k_count_all_subsets(episodes: int, successes: int) -> None:
    results = [True] * successes + [False] * (episodes - successes)
    for k in range(1, episodes + 1):
        subsets = list(itertools.combinations(results, k))
        assert pass_at_k(episodes, successes, k) == pytest.approx(np.mean([any(s) for s in subsets]))
        assert pass_hat_k(episodes, successes, k) == pytest.approx(np.mean([all(s) for s in subsets]))


def test_pass_at_k_is_unbiased() -> None:
    rate, n = 0.3, 6
    weights = [math.comb(n, c) * rate**c * (1 - rate) ** (n - c) for c in range(n + 1)]
    for k in range(1, n + 1):
        assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(1 - (1 - rate) ** k)
        assert sum(w * pass_hat_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(rate**k)


def test_pass_at_k_refuses_what_says_nothing() -> None:
    with pytest.raises(UserError, match="k=4"):
        pass_at_k(3, 1, 4)
    with pytest.raises(UserError):
        pass_hat_k(3, 5, 1)


def test_intervals_over_tasks_cover_95_percent() -> None:
    """100 tasks of different difficulty, 4 episodes each; the truth is the mean over all tasks there could be."""
    rng = np.random.default_rng(5)
    trials, tasks, k = 800, 100, 4
    covered = {"success": 0, "outcome": 0}
    owner = np.repeat(np.arange(tasks), k).tolist()
    for trial in range(trials):
        difficulty = rng.beta(2, 3, tasks)
        won = rng.random((tasks, k)) < difficulty[:, None]
        found = cluster_proportion(won.ravel().tolist(), owner, resamples=400, seed=trial)
        covered["success"] += found.low <= 0.4 <= found.high
        outcome = rng.normal(size=(tasks, 1)) + rng.normal(size=(tasks, k))
        mean = bootstrap_mean(outcome.ravel().tolist(), owner, resamples=400, seed=trial)
        assert mean.low is not None
        assert mean.high is not None
        covered["outcome"] += mean.low <= 0 <= mean.high
    assert all(0.93 <= count / trials <= 0.97 for count in covered.values()), covered


def test_wilson_covers_95_percent_of_rates() -> None:
    """At one rate coverage jumps with it (successes are whole); over rates it is 95 %."""
    rng = np.random.default_rng(6)
    rates = rng.uniform(0.02, 0.98, 6000)
    found = [wilson(int(count), 128) for count in rng.binomial(128, rates)]
    assert 0.93 <= np.mean([one.low <= rate <= one.high for one, rate in zip(found, rates, strict=True)]) <= 0.97


def test_clusters_without_spread_fall_back_to_wilson_over_tasks() -> None:
    found = cluster_proportion([True] * 40, [i // 4 for i in range(40)])
    assert (found.value, found.low, found.high) == (1.0, wilson(10, 10).low, 1.0)
    one_task = cluster_proportion([True, False], ["a", "a"])
    assert (one_task.low, one_task.high) == pytest.approx((wilson(1, 2).value - 0.5 + 0.0546, 0.9454), abs=1e-3)


def test_sign_flips_are_counted_exactly_for_few_tasks() -> None:
    assert sign_flip_p([1.0, 1.0, 1.0, 1.0]) == pytest.approx(2 / 16)
    assert sign_flip_p([1.0, -1.0]) == 1.0
    assert sign_flip_p([0.0, 0.0]) == 1.0
    assert sign_flip_p([3.0, 1.0, -1.0]) == pytest.approx(6 / 8)


def test_sign_flips_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(7).normal(0.3, 1, 40)
    theirs = stats.permutation_test(
        (values, np.zeros(40)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=20_000, rng=0
    )
    assert sign_flip_p(values.tolist()) == pytest.approx(theirs.pvalue, abs=0.01)


def test_few_sizes_of_differences_are_drawn_together_with_the_same_answer() -> None:
    rng = np.random.default_rng(8)
    values = rng.choice([-0.5, 0.5, 1.0], 120, p=[0.4, 0.5, 0.1])
    flipped = (rng.choice([-1, 1], (20_000, 120)) * values).sum(axis=1)
    one_by_one = np.mean(np.abs(flipped) >= abs(values.sum()) - 1e-9)
    assert 0.02 < one_by_one < 0.5
    assert sign_flip_p(values.tolist()) == pytest.approx(one_by_one, abs=0.01)


def test_compare_finds_a_difference_in_5_percent_of_equal_policies() -> None:
    rng = np.random.default_rng(9)
    trials, tasks, k = 1000, 80, 4
    found = covered = 0
    for trial in range(trials):
        difficulty = rng.beta(1, 1, tasks)[:, None]
        a, b = ((rng.random((tasks, k)) < difficulty).mean(axis=1) for _ in range(2))
        p = sign_flip_p((b - a).tolist(), draws=1000, seed=trial)
        interval = bootstrap_mean((b - a).tolist(), range(tasks), resamples=400, seed=trial)
        assert interval.low is not None
        assert interval.high is not None
        found += p <= 0.05
        covered += interval.low <= 0 <= interval.high
    assert 0.035 <= found / trials <= 0.065
    assert 0.93 <= covered / trials <= 0.97


def test_compare_finds_a_difference_that_is_there() -> None:
    rng = np.random.default_rng(10)
    a, b = rng.random(200), rng.random(200)
    found = paired(a.tolist(), (b + 0.3).tolist())
    assert found.p < 1e-3
    assert found.difference.low is not None
    assert 0 < found.difference.low < found.difference.value == pytest.approx(found.b - found.a)
