"""What an evaluation found, from the summaries of its episodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import attrgetter
from statistics import fmean
from typing import Any, Literal

from pydantic import BaseModel, Field

from agentrl.errors import InfrastructureError
from agentrl.evaluate.stats import (
    Interval,
    Proportion,
    bootstrap_mean,
    cluster_proportion,
    pass_at_k,
    pass_hat_k,
    wilson,
)
from agentrl.rollout import Summary
from agentrl.types import StopReason


class StopStats(BaseModel):
    """The episodes that one reason stopped."""

    episodes: int
    success: float | None = None
    """Share of successes; None for infrastructure failures, which are not scored."""
    outcome: float | None = None
    """Mean outcome; None likewise."""


class UsageStats(BaseModel):
    """What the calls of a served policy have cost, for what was played now."""

    calls: int
    attempts: int
    """Requests, those that were tried again included."""
    prompt_tokens: int
    completion_tokens: int
    usd: float


class EvalResult(BaseModel):
    """What an evaluation found. Means and intervals are over the episodes that can be scored."""

    env: str
    env_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the environment, those for evaluation included."""
    policy: str
    episodes: int
    """Episodes asked for: scored ones and infrastructure failures."""
    per_task: int = 1
    """Episodes of each task."""
    success: Proportion
    """Success rate with its 95 % interval: Wilson's, or with several episodes a task a bootstrap over tasks."""
    success_interval: Literal["wilson", "bootstrap"] = "wilson"
    """`wilson` too where all tasks have the same rate: see `cluster_proportion`."""
    outcome: Interval
    """Mean outcome reward with its 95 % bootstrap interval over tasks."""
    pass_at_k: dict[int, Interval] = Field(default_factory=dict)
    """With several episodes a task: probability that one of k succeeds, for k up to `per_task` (unbiased; mean over
    tasks with its bootstrap interval). Tasks with fewer than k scored episodes are left out of it."""
    pass_hat_k: dict[int, Interval] = Field(default_factory=dict)
    """pass^k: probability that all of k succeed."""
    turns: float
    """Mean turns per episode."""
    action_tokens: float
    """Mean sampled tokens per episode; 0 for policies without tokens."""
    invalid_action_rate: float
    """Share of turns whose text was no action."""
    stop_reasons: dict[str, int]
    """Every episode by the reason why it stopped, infrastructure failures included."""
    by_stop_reason: dict[str, StopStats] = Field(default_factory=dict)
    infrastructure_failures: int
    """Episodes that no retry could finish; in no mean above."""
    first_failure: str | None = None
    """What the first of them says."""
    episode_seconds: float = 0.0
    """Mean time per episode of policy calls (each shared by its whole batch) and environment steps."""
    seconds: float
    """Wall time of what was played now; episodes that an interrupted evaluation had played already are not in it."""
    seed: int
    temperature: float | None
    """Of the sampling; None for policies that do not sample tokens."""
    usage: UsageStats | None = None
    """What the calls of a served policy have cost; None for others."""

    @property
    def tasks(self) -> int:
        """Tasks asked for: seeds `seed`, `seed` + 1, ..."""
        return self.episodes // self.per_task


class EvalReport(BaseModel):
    """An evaluation in several environments."""

    policy: str
    results: list[EvalResult]

    @property
    def success(self) -> float:
        """Mean success rate of the environments, each weighing the same."""
        return fmean(result.success.value for result in self.results)

    @property
    def infrastructure_failures(self) -> int:
        """Of all environments."""
        return sum(result.infrastructure_failures for result in self.results)


class EvaluationFailed(InfrastructureError):
    """No episode of some environment could be scored; `finished` holds what was found in the others."""

    def __init__(self, message: str, finished: EvalReport) -> None:
        super().__init__(message)
        self.finished = finished


def result_of(
    summaries: Sequence[Summary],
    *,
    env: str,
    env_kwargs: dict[str, Any],
    policy: str,
    per_task: int,
    seed: int,
    seconds: float,
    temperature: float | None,
    usage: UsageStats | None = None,
) -> EvalResult:
    """Returns the result of the episodes `summaries`, in whatever order; at least one must be scorable."""
    ordered = sorted(summaries, key=attrgetter("task", "member"))
    failed = [one for one in ordered if not one.scorable]
    scored = [one for one in ordered if one.scorable] if failed else ordered
    tasks = [one.seed for one in scored]
    successes = [one.success for one in scored]
    turns = sum(one.turns for one in scored)
    tokens = fmean(one.action_tokens for one in scored)
    stopped = _by_stop_reason(ordered)
    clustered = per_task > 1
    by_task: dict[int, list[bool]] = defaultdict(list)
    for one in scored:
        by_task[one.seed].append(one.success)
    at_k, hat_k = _pass_k(by_task, per_task, seed) if clustered else ({}, {})
    spread = clustered and len({fmean(won) for won in by_task.values()}) > 1
    return EvalResult(
        env=env,
        env_kwargs=env_kwargs,
        policy=policy,
        episodes=len(ordered),
        per_task=per_task,
        success=cluster_proportion(successes, tasks, seed=seed) if clustered else wilson(sum(successes), len(scored)),
        success_interval="bootstrap" if spread else "wilson",
        outcome=bootstrap_mean([one.outcome for one in scored], tasks, seed=seed),
        pass_at_k=at_k,
        pass_hat_k=hat_k,
        turns=turns / len(scored),
        action_tokens=tokens,
        invalid_action_rate=sum(one.invalid for one in scored) / turns if turns else 0.0,
        stop_reasons={reason: one.episodes for reason, one in stopped.items()},
        by_stop_reason=stopped,
        infrastructure_failures=len(failed),
        first_failure=failed[0].error if failed else None,
        episode_seconds=fmean(one.seconds for one in scored),
        seconds=seconds,
        seed=seed,
        temperature=temperature if tokens or usage is not None else None,
        usage=usage,
    )


def _pass_k(
    by_task: Mapping[int, Sequence[bool]], per_task: int, seed: int
) -> tuple[dict[int, Interval], dict[int, Interval]]:
    at_k: dict[int, Interval] = {}
    hat_k: dict[int, Interval] = {}
    for k in range(1, per_task + 1):
        tasks = {task: (len(won), sum(won)) for task, won in by_task.items() if len(won) >= k}
        if not tasks:
            break
        for found, estimate in ((at_k, pass_at_k), (hat_k, pass_hat_k)):
            found[k] = bootstrap_mean([estimate(n, c, k) for n, c in tasks.values()], list(tasks), seed=seed)
    return at_k, hat_k


def _by_stop_reason(ordered: Sequence[Summary]) -> dict[str, StopStats]:
    members: dict[StopReason, list[Summary]] = {}
    for one in ordered:
        members.setdefault(one.stop_reason, []).append(one)
    found = {}
    for reason in sorted(members, key=list(StopReason).index):
        found[reason.value] = StopStats(episodes=len(members[reason]))
        if reason.scorable:
            found[reason.value].success = fmean([one.success for one in members[reason]])
            found[reason.value].outcome = fmean([one.outcome for one in members[reason]])
    return found
