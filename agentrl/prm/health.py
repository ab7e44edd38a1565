"""Is the PRM to be believed? Measures of its scores on episodes that it has not learned from."""

from __future__ import annotations

import torch

from agentrl.batch.index import Index, segment_mean

Tensor = torch.Tensor

BINS = 5
"""Of equal width, over confidences from 1/2 to 1."""


def calibration_error(gap: Tensor, bins: int = BINS) -> float:
    """Expected calibration error (arXiv 1706.04599, Eq. 3) of the pairs' Bradley-Terry probabilities.

    The PRM says with confidence c = sigmoid(abs(gap)) which trajectory of a pair is the better one. Over bins of c: how
    far the mean confidence lies from the share that was right, weighted by the bin's pairs. Ties count one half.

    Args:
        gap: (P,) score of each pair's winner minus its loser's; P > 0.
        bins: of equal width, over [1/2, 1].
    """
    confidence = torch.sigmoid(gap.double().abs())
    right = (gap > 0).double() + 0.5 * (gap == 0).double()
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    error = segment_mean(confidence, place, bins) - segment_mean(right, place, bins)
    return float((torch.bincount(place, minlength=bins).double() * error.abs()).sum() / len(gap))


def group_correlation(index: Index, scores: Tensor, outcome: Tensor) -> float:
    """Pearson correlation of trajectory scores with outcomes, both (N,), after each group's mean is taken off.

    What a group has in common (an easy task) is no merit of a score; 0 where a side does not vary.
    """
    owner, size = index.group_of_traj, index.G
    a = scores.double() - segment_mean(scores, owner, size)[owner]
    b = outcome.double() - segment_mean(outcome, owner, size)[owner]
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else 0.0
