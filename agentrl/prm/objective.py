"""What the PRM learns from a batch: one scalar loss of the trajectories' scores Q, whichever it is.

    over pairs     dpo   mean_P -log sigmoid(Q_w - Q_l)                 OPRL Eq. 2 (arXiv 2509.19199)
                   ipo   mean_P ((Q_w - Q_l) - (R_w - R_l))^2           IPO (arXiv 2310.12036)
    over labels    ce    mean_i -log sigmoid(+Q_i | -Q_i)               PRIME (arXiv 2502.01456)

The two-pass update asks an objective for its loss and for nothing else. Pairs exist in groups of mixed outcomes only;
labels in every group, so that ``ce`` learns from all-success and all-failure groups as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from agentrl.prm.loss import PairTensors, ce_loss, label_accuracy, pair_loss
from agentrl.types import Trajectory

Tensor = torch.Tensor


class Objective(Protocol):
    """A loss over the scores of one batch of N trajectories."""

    @property
    def members(self) -> list[int]:
        """Positions of the trajectories whose score enters the loss, ascending; empty: there is nothing to learn."""

    def loss(self, scores: Tensor) -> Tensor:
        """Returns the scalar loss of the scores Q (N,), differentiable; needs at least one member."""

    def restrict(self, kept: Sequence[int]) -> Objective:
        """Returns the same objective on the batch of the trajectories at the positions `kept` alone."""

    def size(self) -> dict[str, float]:
        """Returns how much there is to learn from, for the log."""

    def health(self, scores: Tensor) -> dict[str, float]:
        """Returns what this objective measures of scores (N,) beyond the accuracy on pairs, for the log."""


@dataclass(frozen=True)
class PairObjective:
    """``dpo`` and ``ipo``: the scores of a group are to be ordered, or spaced, as its outcomes are."""

    pairs: PairTensors
    outcome: Tensor
    """(N,) float64"""
    kind: Literal["dpo", "ipo"] = "dpo"

    @property
    def members(self) -> list[int]:
        return sorted({*self.pairs.winner.tolist(), *self.pairs.loser.tolist()})

    def loss(self, scores: Tensor) -> Tensor:
        return pair_loss(scores, self.pairs, self.kind, self.outcome)

    def restrict(self, kept: Sequence[int]) -> PairObjective:
        place = torch.full((len(self.outcome),), -1)
        place[list(kept)] = torch.arange(len(kept))
        winner, loser = place[self.pairs.winner], place[self.pairs.loser]
        inside = (winner >= 0) & (loser >= 0)
        pairs = PairTensors(winner[inside], loser[inside], self.pairs.weight[inside])
        return PairObjective(pairs, self.outcome[list(kept)], self.kind)

    def size(self) -> dict[str, float]:
        return {"pairs": float(len(self.pairs.winner))}

    def health(self, scores: Tensor) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class LabelObjective:
    """``ce``: sigmoid(Q) is to be the probability that the trajectory succeeded."""

    success: Tensor
    """(N,) bool"""
    usable: Tensor
    """(N,) bool: scorable, and with action tokens to be judged by"""

    @property
    def members(self) -> list[int]:
        found: list[int] = self.usable.nonzero()[:, 0].tolist()
        return found

    def loss(self, scores: Tensor) -> Tensor:
        return ce_loss(scores[self.usable], self.success[self.usable])

    def restrict(self, kept: Sequence[int]) -> LabelObjective:
        return LabelObjective(self.success[list(kept)], self.usable[list(kept)])

    def size(self) -> dict[str, float]:
        return {"prm_labels": float(self.usable.sum())}

    def health(self, scores: Tensor) -> dict[str, float]:
        if not self.usable.any():
            return {}
        return {"prm_label_accuracy": label_accuracy(scores[self.usable], self.success[self.usable])}


def make_objective(
    kind: Literal["dpo", "ipo", "ce"], trajectories: Sequence[Trajectory], outcome: Tensor, pairs: PairTensors
) -> Objective:
    """Returns the objective `kind` (`prm.loss`) of a batch.

    Args:
        kind: ``dpo`` and ``ipo`` look at `pairs`, ``ipo`` at `outcome` too, ``ce`` at `Trajectory.success` alone.
        trajectories: N.
        outcome: (N,).
        pairs: positions in `trajectories`.
    """
    if kind != "ce":
        return PairObjective(pairs, outcome.double(), kind)
    return LabelObjective(
        torch.tensor([t.success for t in trajectories], dtype=torch.bool),
        torch.tensor([t.scorable and t.action_tokens > 0 for t in trajectories], dtype=torch.bool),
    )
