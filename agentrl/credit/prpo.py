"""PRPO (arXiv 2601.07182): segment scores against a fixed prior, moved to where the outcome says.

    z_s = (p_s - mu0) / sigma0      p_s in [0, 1]: process score of segment s; prior U(0, 1): mu0 1/2, sigma0 sqrt(1/12)
    A_k = z_{s(k)} + (R_i - mean_g R) / (std_g R + 1e-6)

The fixed prior keeps a group of uniformly good steps good, where group statistics would make half of them bad. Scores
come from the implicit PRM (squashed: p = sigmoid(sum of the segment's token rewards / temperature), so that a log-ratio
of 0 is the prior's mean), from the environment's turn rewards, or from a served PRM.

Paper and code differ in sigma0 (code: sqrt(1/24)) and in the shift (code: not divided by the std, `scale: false`).
The paper has one turn and cuts it at entropy spikes; segments are turns by default here [our extension].
Edge cases: in groups of one and groups without variance the shift is 0 and z stays.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator

from agentrl.batch.index import segment_mean, segment_sum
from agentrl.credit.base import (
    Advantage,
    CreditMethod,
    Need,
    Options,
    Signals,
    broadcast,
    broadcast_tokens,
    episode_advantage,
    zscore,
)
from agentrl.credit.segments import Placement, Segments, entropy_segments, turn_segments
from agentrl.errors import UserError

Tensor = torch.Tensor
Scores = Literal["prm", "environment", "served"]


class PRPOOptions(Options):
    segmenter: Literal["turn", "entropy"] = "turn"
    """What a process score is about: a turn, or a stretch between entropy spikes."""
    spikes: int = Field(default=5, ge=1)
    """Entropy segmenter: most spikes per trajectory."""
    min_gap: int = Field(default=10, ge=1)
    """Entropy segmenter: least number of action tokens between cuts."""
    placement: Placement = "positional"
    """Entropy segmenter: which spikes give way where two are too close: the later (``positional``) or the lower
    (``nms``)."""
    threshold: float = Field(default=0.0, ge=0)
    """Entropy segmenter: nats above which a token can be a spike."""
    mu0: float = 0.5
    """Mean of the prior."""
    sigma0: float = Field(default=math.sqrt(1 / 12), gt=0)
    """Standard deviation of the prior."""
    prior: Literal["uniform", "empirical"] = "uniform"
    """``empirical``: mean and standard deviation of the group's segments instead (an ablation)."""
    scale: bool = True
    """Divide the outcome shift by the group's standard deviation."""
    combine: Literal["shift", "average"] = "shift"
    """z + outcome shift, or the baseline PRM-Avg: one advantage per episode, the z-score of R_i + mean_s p_s."""
    scores: Scores = "prm"
    """The implicit PRM, the environment's turn rewards, or a served PRM's turn scores."""
    temperature: float = Field(default=1.0, gt=0)
    """Reward units: what a segment's implicit reward is divided by before the sigmoid."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> PRPOOptions:
        """Refuses options that would have no effect."""
        idle = {
            "segmenter=turn": ("spikes", "min_gap", "placement", "threshold") if self.segmenter == "turn" else (),
            "prior=empirical": ("mu0", "sigma0") if self.prior == "empirical" else (),
            f"scores={self.scores}": ("temperature",) if self.scores != "prm" else (),
            "combine=average": ("mu0", "sigma0", "prior", "scale") if self.combine == "average" else (),
        }
        for cause, names in idle.items():
            if given := sorted(self.model_fields_set & set(names)):
                raise ValueError(f"{', '.join(given)} has no effect with {cause}")
        return self

    @field_validator("scores")
    @classmethod
    def _per_turn(cls, scores: Scores, info: ValidationInfo) -> Scores:
        if scores != "prm" and info.data.get("segmenter") == "entropy":
            raise ValueError("scores whole turns only; take segmenter=turn, or scores=prm with segmenter=entropy")
        return scores


def prpo(signals: Signals, options: PRPOOptions) -> Advantage:
    """Returns z + outcome shift per action token (K,).

    Raises:
        UserError: a turn score or turn reward outside [0, 1]; names the trajectory and the turn.
    """
    index = signals.index
    if options.segmenter == "turn":
        segments = turn_segments(index)
    else:
        assert signals.entropy is not None
        segments = entropy_segments(
            index,
            signals.entropy,
            spikes=options.spikes,
            min_gap=options.min_gap,
            threshold=options.threshold,
            placement=options.placement,
        )
    score = segment_scores(signals, segments, options)
    metrics = {
        "score_mean": float(score.mean()) if len(score) else 0.0,
        "segments": len(segments) / max(1, len(segments.traj.unique())),
    }
    if options.combine == "average":
        merged = signals.outcome.double() + segment_mean(score, segments.traj, index.N)
        episode = episode_advantage(index, merged, "grpo")
        return broadcast(index, episode, torch.zeros(index.M, dtype=torch.float64), metrics)
    if options.prior == "uniform":
        z = (score - options.mu0) / options.sigma0
    else:
        z = zscore(score, index.group_of_traj[segments.traj], index.G)
    episode = episode_advantage(index, signals.outcome, "grpo" if options.scale else "dr_grpo")
    return broadcast_tokens(index, episode, z[segments.of_token], metrics)


def segment_scores(signals: Signals, segments: Segments, options: PRPOOptions) -> Tensor:
    """Returns p (S,) float64, each in [0, 1]."""
    index = signals.index
    if options.scores == "prm":
        assert signals.token_reward is not None
        reward = segment_sum(signals.token_reward, segments.of_token, len(segments))
        return torch.sigmoid(reward / options.temperature)
    name = "turn_reward" if options.scores == "environment" else "turn_score"
    score: Tensor = getattr(signals, name).double()
    acting = index.tokens_per_turn > 0
    bad = acting & ~((score >= 0) & (score <= 1))
    if bad.any():
        turn = int(bad.nonzero()[0])
        raise UserError(
            f"{signals.place(turn)}: {name} is {float(score[turn]):g}, but PRPO's prior is on [0, 1]; "
            f"rescale it there, or take credit.options.scores=prm (squashed by a sigmoid)"
        )
    return score[acting]


def _needs(options: PRPOOptions) -> frozenset[Need]:
    score: dict[Scores, Need] = {"prm": "prm", "environment": "turn_rewards", "served": "turn_scores"}
    needs = {score[options.scores]}
    if options.segmenter == "entropy":
        needs.add("entropy")
    return frozenset(needs)


# Its scores are compared with a prior: a group of one has them.
PRPO = CreditMethod("prpo", PRPOOptions, prpo, needs=_needs, group_relative=False)
