"""`evaluate`: a policy plays held-out tasks, in one environment or several."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, overload

from agentrl.config.schema import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.envs import make
from agentrl.errors import InfrastructureError, UserError
from agentrl.evaluate.result import EvalReport, EvalResult, EvaluationFailed, UsageStats, result_of
from agentrl.evaluate.store import EvalStore, identity
from agentrl.policy import Policy, Sampling, as_policy
from agentrl.remote.address import is_remote
from agentrl.rollout import Collector, Summary, Task
from agentrl.types import Content, StopReason, Trajectory

Player = Policy | Callable[[Content], str | Awaitable[str]]
"""A policy, or what `agentrl.policy.as_policy` makes one of: a function ``observation -> action``, plain or async."""


@overload
def evaluate(  # type: ignore[overload-overlap]  # a str is a sequence of str
    policy: Player,
    env: EnvConfig | str,
    *,
    episodes: int = ...,
    per_task: int = ...,
    seed: int = ...,
    rollout: RolloutConfig | None = ...,
    sampling: Sampling | None = ...,
    outcome: OutcomeConfig | None = ...,
    out: str | os.PathLike[str] | None = ...,
    policy_options: Mapping[str, Any] | None = ...,
    on_episode: Callable[[Trajectory], None] | None = ...,
    on_summary: Callable[[Summary], None] | None = ...,
) -> EvalResult: ...
@overload
def evaluate(
    policy: Player,
    env: Sequence[EnvConfig | str],
    *,
    episodes: int = ...,
    per_task: int = ...,
    seed: int = ...,
    rollout: RolloutConfig | None = ...,
    sampling: Sampling | None = ...,
    outcome: OutcomeConfig | None = ...,
    out: str | os.PathLike[str] | None = ...,
    policy_options: Mapping[str, Any] | None = ...,
    on_episode: Callable[[Trajectory], None] | None = ...,
    on_summary: Callable[[Summary], None] | None = ...,
) -> EvalReport: ...
def evaluate(
    policy: Player,
    env: EnvConfig | str | Sequence[EnvConfig | str],
    *,
    episodes: int = 256,
    per_task: int = 1,
    seed: int = 10**12,
    rollout: RolloutConfig | None = None,
    sampling: Sampling | None = None,
    outcome: OutcomeConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    policy_options: Mapping[str, Any] | None = None,
    on_episode: Callable[[Trajectory], None] | None = None,
    on_summary: Callable[[Summary], None] | None = None,
) -> EvalResult | EvalReport:
    """Plays the tasks `seed`, `seed + 1`, ... with `policy` and returns what came of it.

    Args:
        policy: any policy, or a function ``observation -> action``, plain or async.
        env: environment, or several; its `eval_kwargs` override its `kwargs` here.
        episodes: number of episodes in each environment, a multiple of `per_task`.
        per_task: episodes of each task; from 2 on intervals are over tasks, and pass@k and pass^k are estimated.
        seed: of the first task, and of the sampling.
        rollout: history, limits, deadlines and concurrency; None takes the defaults.
        sampling: how actions are drawn; None takes `rollout`'s.
        outcome: what an episode is worth and what counts as success.
        out: folder that every episode is written to when it ends (`EvalStore`). What it holds already is not played
            again, so that the same call completes an interrupted one.
        policy_options: what the policy was made with, where its name does not say; kept in `out`, so that another
            policy does not complete it.
        on_episode: called with every finished episode of this call.
        on_summary: called with the numbers of every episode, those found in `out` first. Without `out` and
            `on_episode`, scripted policies are fastest: no turn is kept.

    Returns:
        An `EvalResult` for one environment, an `EvalReport` for a sequence of them.

    Raises:
        UserError: `episodes` below 1 or no multiple of `per_task`, an environment that cannot be made, or an `out` made
            with other settings.
        InfrastructureError: not one episode could be scored; the message says why. Where that is so in one of several
            environments, an `EvaluationFailed`: the others have been played (`finished`).
    """
    if seed < 0:
        raise UserError(f"seed={seed}: environments take seeds from 0 on")
    if episodes < 1:
        raise UserError(f"episodes={episodes}: an evaluation needs at least 1")
    if per_task < 1 or episodes % per_task:
        raise UserError(f"episodes={episodes} cannot be dealt out to tasks of per_task={per_task}; make it a multiple")
    several = not isinstance(env, str | EnvConfig)
    given = list(env) if isinstance(env, Sequence) and not isinstance(env, str) else [env]
    if odd := [one for one in given if not isinstance(one, str | EnvConfig)]:
        raise UserError(
            f"env is an environment's id or an EnvConfig, or a list of them, not {type(odd[0]).__name__}; write for "
            "instance EnvConfig(id='Sokoban-v0', kwargs={'size': 6})"
        )
    envs = [EnvConfig(id=one) if isinstance(one, str) else one for one in given]
    if not envs:
        raise UserError("no environment to evaluate in")
    policy = as_policy(policy)
    rollout, outcome = rollout or RolloutConfig(), outcome or OutcomeConfig()
    sampling = sampling or Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens)
    plan = _Plan(episodes, per_task, seed, rollout, sampling, outcome, several, on_episode, on_summary)
    store = None
    if out is not None:
        store = EvalStore(
            out, identity(policy, policy_options, envs, episodes, per_task, seed, rollout, sampling, outcome)
        )
    try:
        if len(envs) > 1:
            for one in envs:
                with _naming(one):
                    check_made(one)
        report = _evaluate_all(policy, envs, plan, store)
        if store is not None:
            store.write_result(report)
    finally:
        if store is not None:
            store.release()
    return report if several else report.results[0]


@dataclass(frozen=True)
class _Plan:
    """What is to be done in each environment: the arguments of `evaluate`."""

    episodes: int
    per_task: int
    seed: int
    rollout: RolloutConfig
    sampling: Sampling
    outcome: OutcomeConfig
    several: bool
    on_episode: Callable[[Trajectory], None] | None
    on_summary: Callable[[Summary], None] | None


def _evaluate_all(policy: Policy, envs: Sequence[EnvConfig], plan: _Plan, store: EvalStore | None) -> EvalReport:
    results: list[EvalResult] = []
    failures: list[tuple[str, InfrastructureError]] = []
    for place, config in enumerate(envs):
        try:
            with _naming(config):
                results.append(_evaluate_in(policy, config, place, plan, store))
        except InfrastructureError as error:
            if len(envs) == 1:
                raise
            failures.append((config.id, error))
    report = EvalReport(policy=policy.name, results=results)
    if failures:
        raise EvaluationFailed("\n".join(f"{env}: {error}" for env, error in failures), report) from failures[0][1]
    return report


@contextmanager
def _naming(env: EnvConfig) -> Iterator[None]:
    """Says in which environment something is to be mended, where the error does not."""
    try:
        yield
    except UserError as error:
        if env.id in str(error):
            raise
        raise UserError(f"{env.id}: {error}") from error


def _evaluate_in(policy: Policy, env: EnvConfig, place: int, plan: _Plan, store: EvalStore | None) -> EvalResult:
    began, spent = perf_counter(), _usage(policy)
    summaries = _play(policy, env, place, plan, store)
    return result_of(
        summaries,
        env=env.id,
        env_kwargs={**env.kwargs, **env.eval_kwargs},
        policy=policy.name,
        per_task=plan.per_task,
        seed=plan.seed,
        seconds=perf_counter() - began,
        temperature=plan.sampling.temperature,
        usage=_usage(policy, spent),
    )


def check_made(env: EnvConfig) -> None:
    """Makes a local environment once, so that a mistake is told before others are played; a served one may be down now.

    Raises:
        UserError: there is none of this id, or it refuses its arguments.
    """
    if is_remote(env.id):
        return
    try:
        make(env.id, max_turns=env.max_turns, wrappers=env.wrappers, **{**env.kwargs, **env.eval_kwargs}).close()
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    except (Exception, SystemExit):  # no word on the arguments; the episodes meet the same fault, and tell it
        return


def _usage(policy: Policy, before: UsageStats | None = None) -> UsageStats | None:
    """Returns what the calls of a served policy have cost since `before`; None for other policies."""
    usage = getattr(policy, "usage", None)
    if usage is None:
        return None
    found = UsageStats(**{name: getattr(usage, name) for name in UsageStats.model_fields})
    if before is None:
        return found
    return UsageStats(**{name: value - getattr(before, name) for name, value in found})


def _play(policy: Policy, env: EnvConfig, place: int, plan: _Plan, store: EvalStore | None) -> list[Summary]:
    """Returns the summaries of all episodes of one environment: those in `store`, and those that are played now."""
    seed, on_episode, on_summary = plan.seed, plan.on_episode, plan.on_summary
    prefix = f"{place}-eval" if plan.several else "eval"
    tasks = [Task(seed + i, f"{prefix}-{seed + i}", plan.per_task) for i in range(plan.episodes // plan.per_task)]
    summaries = store.load(place, env.id, seed) if store is not None else []
    for one in summaries:
        if on_summary is not None:
            on_summary(one)
    done: dict[int, set[int]] = {}
    for one in summaries:
        done.setdefault(one.seed, set()).add(one.member)
    todo = [Task(t.seed, t.group_id, t.members, skip=frozenset(done.get(t.seed, ()))) for t in tasks] if done else tasks
    todo = [task for task in todo if len(task.skip) < task.members]

    def summarised(one: Summary) -> None:
        one.task = one.seed - seed  # its place among all tasks, not among those of this call
        summaries.append(one)
        if on_summary is not None:
            on_summary(one)

    def ended(trajectory: Trajectory) -> None:
        if store is not None and trajectory.stop_reason is not StopReason.CANCELLED:
            store.append(place, env.id, trajectory)
        if on_episode is not None:
            on_episode(trajectory)

    hooks: dict[str, Any] = {"on_summary": summarised}
    if store is not None or on_episode is not None:
        hooks["on_episode"] = ended
    try:
        if todo:
            with Collector(policy, env, plan.rollout, plan.outcome, evaluation=True, **hooks) as collector:
                collector.collect(todo, sampling=plan.sampling, seed=seed, keep=False)
    except InfrastructureError:
        # Every episode of this call failed. That is an error only where no earlier call has a scored one.
        if not any(one.scorable for one in summaries):
            raise
    finally:
        if store is not None:
            store.close()
    if not any(one.scorable for one in summaries):
        first = min(summaries, key=lambda one: (one.task, one.member))
        raise InfrastructureError(
            f"none of {len(summaries)} episodes of {env.id} could be scored; the first: {first.error}"
        )
    return summaries
