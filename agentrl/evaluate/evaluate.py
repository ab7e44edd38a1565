"""`evaluate`: a policy plays held-out tasks, in one environment or several."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, overload

from agentrl.config.schema import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.errors import InfrastructureError, UserError
from agentrl.evaluate.result import EvalReport, EvalResult, result_of
from agentrl.evaluate.store import EvalStore, identity
from agentrl.policy import Policy, Sampling, as_policy
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
        InfrastructureError: not one episode of an environment could be scored; the message says why.
    """
    if episodes < 1:
        raise UserError(f"episodes={episodes}: an evaluation needs at least 1")
    if per_task < 1 or episodes % per_task:
        raise UserError(f"episodes={episodes} cannot be dealt out to tasks of per_task={per_task}; make it a multiple")
    several = not isinstance(env, str | EnvConfig)
    given = list(env) if not isinstance(env, str | EnvConfig) else [env]
    envs = [EnvConfig(id=one) if isinstance(one, str) else one for one in given]
    if not envs:
        raise UserError("no environment to evaluate in")
    policy = as_policy(policy)
    rollout, outcome = rollout or RolloutConfig(), outcome or OutcomeConfig()
    sampling = sampling or Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens)
    store = None
    if out is not None:
        store = EvalStore(
            out, identity(policy, policy_options, envs, episodes, per_task, seed, rollout, sampling, outcome)
        )
    results = []
    for place, config in enumerate(envs):
        began = perf_counter()
        tasks = [
            Task(seed + i, f"{place}-eval-{seed + i}" if several else f"eval-{seed + i}", per_task)
            for i in range(episodes // per_task)
        ]
        summaries = _play(policy, config, place, tasks, rollout, sampling, outcome, store, on_episode, on_summary)
        results.append(
            result_of(
                summaries,
                env=config.id,
                env_kwargs={**config.kwargs, **config.eval_kwargs},
                policy=policy.name,
                per_task=per_task,
                seed=seed,
                seconds=perf_counter() - began,
                temperature=sampling.temperature,
            )
        )
    found = EvalReport(policy=policy.name, results=results) if several else results[0]
    if store is not None:
        store.write_result(EvalReport(policy=policy.name, results=results))
    return found


def _play(
    policy: Policy,
    env: EnvConfig,
    place: int,
    tasks: Sequence[Task],
    rollout: RolloutConfig,
    sampling: Sampling,
    outcome: OutcomeConfig,
    store: EvalStore | None,
    on_episode: Callable[[Trajectory], None] | None,
    on_summary: Callable[[Summary], None] | None,
) -> list[Summary]:
    """Returns the summaries of all episodes of one environment: those in `store`, and those that are played now."""
    seed = tasks[0].seed
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
            with Collector(policy, env, rollout, outcome, evaluation=True, **hooks) as collector:
                collector.collect(todo, sampling=sampling, seed=seed, keep=False)
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
