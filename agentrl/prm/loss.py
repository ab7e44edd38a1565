"""Losses over preference pairs of trajectory scores."""

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
