"""How well advantages agree with the truth."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

DECISIVE = 0.1
"""Turns whose true advantage is beyond this (in success probability) are decisive: to misjudge their sign costs."""


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation with mid-ranks for ties; 0 where a side does not vary."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    if len(x) < 2 or min(r.std() for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def sign_accuracy(signal: np.ndarray, truth: np.ndarray) -> float:
    """Share of decisive turns whose sign `signal` gets right; a signal of 0 counts one half, nan without such turns."""
    decisive = np.abs(truth) > DECISIVE
    if not decisive.any():
        return float("nan")
    agree = np.sign(signal[decisive]) * np.sign(truth[decisive])
    return float(((agree > 0) + 0.5 * (agree == 0)).mean())


def explained(truth: np.ndarray, *signals: np.ndarray) -> float:
    """Share of the truth's variance that the best linear combination of `signals` explains."""
    if truth.var() == 0:
        return 0.0
    design = np.stack([*signals, np.ones(len(truth))], axis=1)
    residual = truth - design @ np.linalg.lstsq(design, truth, rcond=None)[0]
    return float(1 - residual.var() / truth.var())


def luck(signal: np.ndarray, keys: Sequence[Hashable]) -> float:
    """Share of a signal's variance that is luck: what differs between turns that were the same move.

    Turns of equal key (task, state, action, turn number) have one true advantage. Their pooled variance (n - 1 each)
    over the variance of all that have company is 0 for a signal that depends on the move alone, and about 1 for noise.

    Returns:
        nan where no key occurs twice or the signal does not vary.
    """
    _, owner, counts = np.unique(np.array([hash(key) for key in keys]), return_inverse=True, return_counts=True)
    company = counts[owner] > 1
    if not company.any() or signal[company].var() == 0:
        return float("nan")
    mean = np.bincount(owner, weights=signal) / counts
    within = ((signal - mean[owner])[company] ** 2).sum() / (company.sum() - (counts > 1).sum())
    return float(within / signal[company].var(ddof=1))
