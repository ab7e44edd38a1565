"""What every credit method takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from agentrl.batch.index import Index, count, rank, segment_mean, segment_std
from agentrl.errors import NonFiniteError, UserError, unknown_name

Tensor = torch.Tensor


class Options(BaseModel):
    """Base of a method's options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Need = Literal["prm", "reference", "entropy", "values", "turn_rewards", "state_keys", "turn_scores"]
"""What a method may ask for beyond outcomes and behaviour log-probs; each fills one field of `Signals`."""

FIELD_OF: dict[str, str] = {
    "prm": "token_reward",
    "reference": "reference_logprob",
    "entropy": "entropy",
    "values": "value",
    "turn_rewards": "turn_reward",
    "state_keys": "state_key",
    "turn_scores": "turn_score",
}
"""Need -> the field of `Signals` that it fills."""


@dataclass(frozen=True)
class Signals:
    """Everything a method may look at. Detached, on the CPU. A field that the method did not ask for may be None."""

    index: Index
    outcome: Tensor
    """(N,) outcome reward of each trajectory."""
    policy_logprob: Tensor | None = None
    """(K,) log-prob of each action token under the policy that played it, nats."""
    token_reward: Tensor | None = None
    """(K,) implicit process reward of each action token, in reward units (beta x nats). Need ``prm``."""
    prm_updates: int = 0
    """Optimiser steps that the PRM has had so far."""
    prm_skill: float | None = None
    """How well the PRM ordered this batch's pairs before it saw them, beyond what length alone predicts: 0..1."""
    reference_logprob: Tensor | None = None
    """(K,) log-prob of each action token under the frozen initial policy, nats. Need ``reference``."""
    entropy: Tensor | None = None
    """(K,) entropy of the policy's distribution at each action token, nats. Need ``entropy``."""
    value: Tensor | None = None
    """(K,) the critic's value of the state before each action token, in outcome units. Need ``values``."""
    turn_reward: Tensor | None = None
    """(M,) the environment's reward of each turn, in its own unit. Need ``turn_rewards``."""
    state_key: Sequence[str] | None = None
    """M strings, equal exactly where two turns acted in the same state. Need ``state_keys``."""
    turn_score: Tensor | None = None
    """(M,) an outside PRM's score of each turn, 0..1. Need ``turn_scores``."""
    names: Sequence[str] | None = None
    """N ids of the trajectories, for error messages."""

    def place(self, turn: int) -> str:
        """Names a turn in an error message: its trajectory and its number there."""
        traj = int(self.index.traj_of_turn[turn])
        number = int(self.index.turn_rank[turn])
        return f"trajectory {self.names[traj] if self.names is not None else traj}, turn {number}"


@dataclass(frozen=True)
class Advantage:
    """A method's answer. The two terms are kept apart for the report; `token` is what the policy trains on."""

    token: Tensor
    """(K,) float32 advantage of each action token."""
    episode: Tensor
    """(M,) float32 part of it that the whole episode shares."""
    step: Tensor
    """(M,) float32 part that is the turn's own, already weighted (its mean over the turn's tokens, where a method is
    finer than a turn)."""
    metrics: dict[str, float] = field(default_factory=dict)
    value_target: Tensor | None = None
    """(K,) float32 what the critic should have said before each action token; for methods that need ``values``."""


@dataclass(frozen=True)
class CreditMethod:
    """A method: its name, options, function and needs.

    Args:
        name: as in ``credit.method``.
        options_type: its options; unknown ones are refused.
        function: pure: signals and options in, advantage out.
        needs: what it needs, or a function of its options that says so.
        group_relative: compares with the other members of the group, so that groups of one have no baseline.
        check: refuses runs (a `RunConfig`) in which the method is not what it says, with a UserError.
    """

    name: str
    options_type: type[Options]
    function: Callable[[Signals, Any], Advantage]
    needs: frozenset[Need] | Callable[[Any], frozenset[Need]] = frozenset()
    group_relative: bool = True
    check: Callable[[Any], None] | None = None

    def needs_of(self, options: Options) -> frozenset[Need]:
        """What the method needs with these options.

        Raises:
            UserError: a need that does not exist.
        """
        needs = self.needs(options) if callable(self.needs) else self.needs
        for need in needs:
            if need not in FIELD_OF:
                raise UserError(f"credit method {self.name!r}: " + unknown_name("need", need, FIELD_OF))
        return needs

    def __call__(self, signals: Signals, options: Options) -> Advantage:
        """Assigns credit.

        Raises:
            UserError: a signal that the method needs is missing, or its answer has the wrong shape.
            NonFiniteError: a signal is NaN or infinite; names the trajectory and the turn.
        """
        needs = self.needs_of(options)
        for need in sorted(needs):
            if getattr(signals, FIELD_OF[need]) is None:
                raise UserError(f"credit method {self.name!r} needs {need!r}: give Signals.{FIELD_OF[need]}")
        _check_finite(signals)
        advantage = self.function(signals, options)
        K, M = signals.index.K, signals.index.M
        given = (("token", K), ("episode", M), ("step", M), *((("value_target", K),) if needs & {"values"} else ()))
        for name, size in given:
            values = getattr(advantage, name)
            if values is None or values.shape != (size,):
                found = None if values is None else tuple(values.shape)
                raise UserError(f"credit method {self.name!r}: Advantage.{name} must have shape ({size},), not {found}")
        return advantage


def _check_finite(signals: Signals) -> None:
    """Raises NonFiniteError where a signal is not finite."""
    if not torch.isfinite(signals.outcome).all():
        traj = int((~torch.isfinite(signals.outcome)).nonzero()[0])
        name = signals.names[traj] if signals.names is not None else traj
        raise NonFiniteError(f"trajectory {name}: its outcome is {float(signals.outcome[traj])}")
    for field_name in ("policy_logprob", "token_reward", "reference_logprob", "entropy", "value"):
        values = getattr(signals, field_name)
        if values is not None and not torch.isfinite(values).all():
            token = int((~torch.isfinite(values)).nonzero()[0])
            where = signals.place(int(signals.index.turn_of_token[token]))
            raise NonFiniteError(f"{where}: {field_name} is {float(values[token])}")
    for field_name in ("turn_reward", "turn_score"):
        values = getattr(signals, field_name)
        if values is not None and not torch.isfinite(values).all():
            turn = int((~torch.isfinite(values)).nonzero()[0])
            raise NonFiniteError(f"{signals.place(turn)}: {field_name} is {float(values[turn])}")


EpisodeEstimator = Literal["grpo", "rloo", "dr_grpo"]
Singleton = Literal["zero", "raw"]
"""What a group of one gets: 0, or its raw outcome (the form of verl, for comparison with runs made there)."""

EPS = 1e-6
"""Added to standard deviations (algorithms.md 0.4), in the unit of what is divided."""


def zscore(values: Tensor, owner: Tensor, size: int, *, ddof: int = 1, eps: float = EPS) -> Tensor:
    """Returns float64 (x - mean)/(std + eps) inside each segment.

    Segments of one, and segments without variance, give 0 (algorithms.md 0.4: a raw reward never leaks through).
    """
    mean = segment_mean(values, owner, size)[owner]
    return (values.double() - mean) / (segment_std(values, owner, size, ddof)[owner] + eps)


def leave_one_out(values: Tensor, owner: Tensor, size: int) -> Tensor:
    """Returns float64 x_i minus the mean of the *other* entries of its segment; 0 in segments of one."""
    n = count(owner, size)[owner]
    centred = values.double() - segment_mean(values, owner, size)[owner]
    return torch.where(n > 1, centred * n / (n - 1).clamp(min=1), 0.0)


def episode_advantage(
    index: Index,
    outcome: Tensor,
    estimator: EpisodeEstimator,
    *,
    ddof: int = 1,
    eps: float = EPS,
    singleton: Singleton = "zero",
) -> Tensor:
    """Returns (N,) float64: each trajectory's outcome against its group (algorithms.md 6).

    Trajectories without action tokens are left out of the group's statistics and get 0 (algorithms.md 1.7).
    """
    acting = index.tokens_per_traj > 0
    owner, size, values = index.group_of_traj[acting], index.G, outcome.double()[acting]
    if estimator == "grpo":
        advantage = zscore(values, owner, size, ddof=ddof, eps=eps)
    elif estimator == "rloo":
        advantage = leave_one_out(values, owner, size)
    else:
        # The mean of one is that one: a group of one gives 0 here as well.
        advantage = values - segment_mean(values, owner, size)[owner]
    if singleton == "raw":
        raw = values / (1 + eps) if estimator == "grpo" else values
        advantage = torch.where(count(owner, size)[owner] == 1, raw, advantage)
    return torch.zeros(index.N, dtype=torch.float64).masked_scatter(acting, advantage)


def broadcast(index: Index, episode: Tensor, step: Tensor, metrics: dict[str, float] | None = None) -> Advantage:
    """Spreads an episode term (N,) and a step term (M,) over turns and their action tokens."""
    per_turn = episode[index.traj_of_turn]
    token = (per_turn + step)[index.turn_of_token]
    return Advantage(token.float(), per_turn.float(), step.float(), metrics or {})


def broadcast_tokens(
    index: Index, episode: Tensor, token_step: Tensor, metrics: dict[str, float] | None = None, **fields: Any
) -> Advantage:
    """As `broadcast`, for a step term (K,) that differs inside a turn; `Advantage.step` is its mean over the turn."""
    token = episode[index.traj_of_token] + token_step
    step = segment_mean(token_step, index.turn_of_token, index.M)
    return Advantage(token.float(), episode[index.traj_of_turn].float(), step.float(), metrics or {}, **fields)


def whiten(values: Tensor) -> Tensor:
    """Returns float64 (x - m)/sqrt(v + 1e-8), v unbiased over all entries (algorithms.md 0.4); 0 for fewer than two."""
    if len(values) < 2:
        return torch.zeros(len(values), dtype=torch.float64)
    values = values.double()
    owner = torch.zeros(len(values), dtype=torch.int64)
    deviation = values - segment_mean(values, owner, 1)
    return deviation / (deviation.square().sum() / (len(values) - 1) + 1e-8).sqrt()


def acting_turns(index: Index) -> tuple[Tensor, Tensor]:
    """Returns the turns with action tokens, (M,) bool, and each one's rank among those of its trajectory, (A,)."""
    acting = index.tokens_per_turn > 0
    time = None if index.turn_time is None else index.turn_time[acting]
    return acting, rank(index.traj_of_turn[acting], index.N, time)


def step_share(step: Tensor, episode: Tensor) -> float:
    """Returns how much of the two terms' absolute size is the step term's, 0..1; both (M,), or both (K,)."""
    own = step.abs().sum()
    return float(own / (own + episode.abs().sum() + 1e-12))
