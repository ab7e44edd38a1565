"""What credit sees beside the raw outcome: penalties for length and for invalid actions (algorithms.md 7.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from agentrl.config.schema import ShapingConfig
from agentrl.types import StopReason, Trajectory

Tensor = torch.Tensor


def invalid_turns(trajectories: Sequence[Trajectory]) -> Tensor:
    """Returns (M,) float64: 1 where the turn's text was no action."""
    return torch.tensor(
        [turn.info.get("valid_action") is False for t in trajectories for turn in t.turns], dtype=torch.float64
    )


def overlong_penalty(tokens: Tensor, config: ShapingConfig) -> Tensor:
    """Returns (N,) float64 what episodes of `tokens` (N,) action tokens lose: DAPO's soft overlong punishment.

    0                                       L <= L_max - L_cache
    (L - (L_max - L_cache)) / L_cache       in between
    1                                       L >= L_max                   times `overlong_penalty`
    """
    if config.overlong_tokens is None:
        return torch.zeros(len(tokens), dtype=torch.float64)
    over = tokens.double() - (config.overlong_tokens - config.overlong_cache)
    most = None if config.overlong_unbounded else 1
    if config.overlong_cache == 0:
        return config.overlong_penalty * (over > 0).double()
    return config.overlong_penalty * (over / config.overlong_cache).clamp(0, most)


def shaped_outcome(trajectories: Sequence[Trajectory], config: ShapingConfig) -> Tensor:
    """Returns (N,) float64 outcomes as credit sees them: raw, less the penalties."""
    raw = torch.tensor([t.outcome for t in trajectories], dtype=torch.float64)
    tokens = torch.tensor([t.action_tokens for t in trajectories], dtype=torch.float64)
    invalid = torch.tensor(
        [sum(turn.info.get("valid_action") is False for turn in t.turns) for t in trajectories], dtype=torch.float64
    )
    return raw - overlong_penalty(tokens, config) - config.invalid_action_penalty * invalid


def shaped_turn_rewards(trajectories: Sequence[Trajectory], config: ShapingConfig) -> Tensor:
    """Returns (M,) float64 rewards of the turns as credit sees them: the environment's, less what invalid ones cost."""
    raw = torch.tensor([turn.reward for t in trajectories for turn in t.turns], dtype=torch.float64)
    return raw - config.invalid_action_penalty * invalid_turns(trajectories)


def trainable(trajectories: Sequence[Trajectory], overlong_filter: str) -> list[int]:
    """Returns the positions of the trajectories that carry policy loss."""
    if overlong_filter == "none":
        return list(range(len(trajectories)))
    cut = {StopReason.TOKEN_LIMIT} | ({StopReason.TURN_LIMIT} if overlong_filter == "any_limit" else set())
    return [n for n, t in enumerate(trajectories) if t.stop_reason not in cut]
