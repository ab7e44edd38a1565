"""Losses and accuracies of trajectory scores: over preference pairs, and over single labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from agentrl.types import PreferencePair

Tensor = torch.Tensor


class PairTensors(NamedTuple):
    """P preference pairs as positions of trajectories."""

    winner: Tensor
    """(P,) int64"""
    loser: Tensor
    """(P,) int64"""
    weight: Tensor
    """(P,) float64"""

    @classmethod
    def of(cls, pairs: Sequence[PreferencePair]) -> PairTensors:
        return cls(
            torch.tensor([p.winner for p in pairs], dtype=torch.int64),
            torch.tensor([p.loser for p in pairs], dtype=torch.int64),
            torch.tensor([p.weight for p in pairs], dtype=torch.float64),
        )


def pair_loss(
    scores: Tensor, pairs: PairTensors, kind: Literal["dpo", "ipo"] = "dpo", outcome: Tensor | None = None
) -> Tensor:
    """Weighted mean loss over all pairs.

        dpo   -log sigmoid(Q_w - Q_l)                       OPRL Eq. 2 (arXiv 2509.19199)
        ipo   ((Q_w - Q_l) - (R_w - R_l))^2                 squared loss on the gap (IPO, arXiv 2310.12036)

    Args:
        scores: (N,) trajectory scores Q.
        pairs: P pairs; must not be empty.
        kind: which loss.
        outcome: (N,) outcomes R, for ``ipo``.
    """
    gap = scores[pairs.winner] - scores[pairs.loser]
    if kind == "dpo":
        loss = -F.logsigmoid(gap)
    else:
        assert outcome is not None, "ipo needs outcomes"
        loss = (gap - (outcome[pairs.winner] - outcome[pairs.loser])).square()
    return (pairs.weight * loss).sum() / pairs.weight.sum()


def pair_accuracy(scores: Tensor, pairs: PairTensors) -> float:
    """Share of pairs whose winner has the higher score; ties count one half."""
    gap = scores[pairs.winner] - scores[pairs.loser]
    return float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean())


def ce_loss(scores: Tensor, success: Tensor) -> Tensor:
    """Mean cross-entropy -log sigmoid(+-Q) of single outcomes (PRIME, arXiv 2502.01456; algorithms.md 4.1).

    Args:
        scores: (N,) trajectory scores Q; must not be empty.
        success: (N,) 1 or True where the trajectory succeeded.
    """
    return F.binary_cross_entropy_with_logits(scores, success.to(scores))


def label_accuracy(scores: Tensor, success: Tensor) -> float:
    """Share of trajectories whose sigmoid(Q) > 0.5 says just what their label (N,) says."""
    return float(((scores > 0) == success.bool()).double().mean())
