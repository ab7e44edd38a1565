"""The collector: every episode is a coroutine, at most `concurrency` of them alive.

with Collector(policy, env_config, rollout_config, outcome_config) as collector:
    collected = collector.collect([Task(seed=0, group_id="a", members=8)])
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from agentrl.config.schema import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.errors import InfrastructureError, UserError
from agentrl.policy import Policy, PolicyAction, PolicyRequest, Sampling
from agentrl.rollout.batcher import Batcher, Clock
from agentrl.rollout.episode import Episode, Shared
from agentrl.rollout.executors import EnvironmentPool
from agentrl.rollout.loop import run
from agentrl.rollout.outcome import score
from agentrl.rollout.tasks import Job, Task, jobs_of
from agentrl.rollout.watchdog import Watchdog
from agentrl.types import Content, StopReason, Trajectory

log = logging.getLogger("agentrl.rollout")


@dataclass
class Collected:
    """What came of one collection."""

    trajectories: list[Trajectory]
    """Scorable ones, in (task, member) order, with outcome and success."""
    failed: list[Trajectory]
    """Those that infrastructure ended even after all retries, in the same order. Never scored."""
    retried: int
    """Attempts that failed and were played again."""
    seconds: dict[str, float]
    """Wall time: ``policy`` (it was acting), ``environment`` (not overlapped by the policy), ``total``."""
    counts: dict[str, int]
    """Number of final trajectories per stop reason that occurred."""


class Collector:
    """Plays episodes. Keeps environments alive between calls; a context manager.

    Args:
        policy: who acts. With a chat codec (`policy.chat`) contexts are built in ids, token in, token out.
        env: which environment.
        rollout: history, limits, deadlines, concurrency.
        outcome: how an episode is scored when it ends.
        evaluation: play with ``env.eval_kwargs`` over ``env.kwargs``.
        on_episode: called with every finished trajectory, for progress bars.
        watchdog_s: after this many seconds without an event, what is being waited for is logged.
    """

    def __init__(
        self,
        policy: Policy,
        env: EnvConfig,
        rollout: RolloutConfig,
        outcome: OutcomeConfig,
        *,
        evaluation: bool = False,
        on_episode: Callable[[Trajectory], None] | None = None,
        watchdog_s: float = 60.0,
    ) -> None:
        self.policy, self.rollout, self.outcome = policy, rollout, outcome
        self.on_episode = on_episode
        self.watchdog_s = watchdog_s
        self.pool = EnvironmentPool(env, rollout.executor, evaluation=evaluation)
        self._busy = False

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all environments, their threads and processes. The policy stays open."""
        self.pool.close()

    def collect(
        self,
        tasks: Sequence[Task],
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        iteration: int = 0,
        label: str = "",
    ) -> Collected:
        """Plays every member of every task once, and again where infrastructure failed, up to `rollout.retries` times.

        Args:
            tasks: what to play; every `group_id` once.
            sampling: how actions are drawn; None takes it from the rollout configuration.
            seed: together with iteration, task seed, member and turn it seeds each action.
            iteration: written into the trajectories.
            label: what this collection is called in logs and episode keys.

        Raises:
            UserError: the tasks, the environment or its arguments are not usable, or members of a group do not start
                from the same observation.
            InfrastructureError: every single episode failed, all for the same reason.
        """
        return run(self.collect_async(tasks, sampling=sampling, seed=seed, iteration=iteration, label=label))

    async def collect_async(
        self,
        tasks: Sequence[Task],
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        iteration: int = 0,
        label: str = "",
    ) -> Collected:
        """`collect`, for a running event loop."""
        jobs = jobs_of(tasks, seed, iteration)
        with self._alone():
            clock = Clock()
            batcher = Batcher(self.policy, self.rollout.policy_deadline_s, clock)
            live: dict[Episode, None] = {}
            with Watchdog(label or "rollout", clock, live, self.watchdog_s):
                await self.pool.decide(self.rollout.episode_deadline_s)
                shared = Shared(
                    policy=self.policy,
                    pool=self.pool,
                    config=self.rollout,
                    sampling=sampling or _sampling(self.rollout),
                    batcher=batcher,
                    clock=clock,
                    lanes=asyncio.Semaphore(self.rollout.workers),
                    iteration=iteration,
                    label=f"{label}/" if label else "",
                )
                try:
                    ended, retried = await self._play_all(shared, jobs, live)
                finally:
                    await batcher.close()
        return _collected(ended, retried, clock, self.rollout.max_context_tokens, shared.sampling)

    @contextmanager
    def _alone(self) -> Any:
        if self._busy:
            raise UserError(
                "this Collector is already collecting; await the first collection, or make a second Collector"
            )
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    async def _play_all(self, shared: Shared, jobs: list[Job], live: dict[Episode, None]) -> tuple[list[Episode], int]:
        """Plays `jobs` with as many coroutines as episodes may live at once. Returns the episodes and the retries."""
        waiting = deque(jobs)
        ended: dict[tuple[int, int], Episode] = {}
        retried = 0
        told: set[StopReason] = set()

        async def play_some() -> None:
            nonlocal retried
            shared.batcher.arriving()
            try:
                while waiting:
                    job = waiting.popleft()
                    for attempt in range(self.rollout.retries + 1):
                        episode = await self._play(shared, job, attempt, live)
                        if episode.trajectory.scorable or attempt == self.rollout.retries:
                            break
                        retried += 1
                        self._report(episode, told)
                    ended[job.order] = episode
                    self._finished(episode.trajectory)
            finally:
                shared.batcher.away()

        # A worker process is one environment, so that there are no more episodes alive than workers.
        limit = min(self.rollout.concurrency, self.rollout.workers if self.pool.executor == "process" else len(jobs))
        players = [asyncio.create_task(play_some()) for _ in range(min(limit, len(jobs)))]
        try:
            await asyncio.gather(*players)
        except BaseException:
            for player in players:
                player.cancel()
            await asyncio.gather(*players, return_exceptions=True)
            raise
        return [ended[job.order] for job in jobs], retried

    async def _play(self, shared: Shared, job: Job, attempt: int, live: dict[Episode, None]) -> Episode:
        episode = Episode(shared, job, attempt)
        live[episode] = None
        try:
            await episode.play()
        except asyncio.CancelledError:
            self._finished(episode.trajectory)
            raise
        finally:
            del live[episode]
        return episode

    def _report(self, episode: Episode, told: set[StopReason]) -> None:
        """Logs why an episode is played again: the first time for each reason in full, then briefly."""
        reason = episode.trajectory.stop_reason
        if reason in told:
            log.info("played again (%s): %s", reason.value, episode.trajectory.error)
        else:
            told.add(reason)
            origin = episode.cause.__cause__ if episode.cause is not None else None
            log.warning("played again (%s): %s", reason.value, episode.trajectory.error, exc_info=origin)

    def _finished(self, trajectory: Trajectory) -> None:
        trajectory.outcome, trajectory.success = score(trajectory, self.outcome)
        if self.on_episode is not None:
            self.on_episode(trajectory)


def _sampling(config: RolloutConfig) -> Sampling:
    return Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)


def _collected(episodes: list[Episode], retried: int, clock: Clock, limit: int, sampling: Sampling) -> Collected:
    trajectories = [episode.trajectory for episode in episodes]
    reasons = Counter(trajectory.stop_reason for trajectory in trajectories)
    if len(reasons) == 1 and not trajectories[0].scorable:
        first = episodes[0]
        raise InfrastructureError(
            f"every one of {len(episodes)} episodes ended with {trajectories[0].stop_reason.value!r}, after {retried} "
            f"retries; the first: {first.trajectory.error}"
        ) from first.cause
    if episodes and all(one.stop_reason is StopReason.TOKEN_LIMIT and not one.turns for one in trajectories):
        raise UserError(
            f"no episode could act: the first prompt has {trajectories[0].metadata['refused_context_tokens']} tokens; "
            f"with max_new_tokens={sampling.max_new_tokens} it passes rollout.max_context_tokens={limit}; raise that"
        )
    return Collected(
        trajectories=[one for one in trajectories if one.scorable],
        failed=[one for one in trajectories if not one.scorable],
        retried=retried,
        seconds=clock.seconds(),
        counts={reason.value: reasons[reason] for reason in StopReason if reasons[reason]},
    )


class _ObservationPolicy(Policy):
    """A plain function ``observation -> action`` as a policy; an async one is called concurrently."""

    def __init__(self, function: Callable[[Content], str | Awaitable[str]]) -> None:
        self._function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.batched = not any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))

    async def act(self, requests: Sequence[PolicyRequest]) -> list[PolicyAction]:
        texts = [self._function(request.observation) for request in requests]
        return [PolicyAction(text if isinstance(text, str) else await text) for text in texts]


def collect(
    policy: Policy | Callable[[Content], str | Awaitable[str]],
    env: str | EnvConfig,
    *,
    episodes: int = 16,
    group_size: int = 1,
    seed: int = 0,
    rollout: RolloutConfig | None = None,
    outcome: OutcomeConfig | None = None,
    evaluation: bool = False,
    on_episode: Callable[[Trajectory], None] | None = None,
) -> Collected:
    """Plays `episodes` episodes and returns them. ``agentrl.collect(lambda text: "up", "Sokoban-v0")``.

    Args:
        policy: a `Policy`, or a function ``observation -> action`` (plain or async).
        env: environment id or configuration.
        episodes: number of episodes, a multiple of `group_size`.
        group_size: episodes of each task; task i has the seed ``seed + i``.
        seed: first task seed, and seed of the actions.
        rollout: limits, deadlines, concurrency; None = the defaults.
        outcome: how episodes are scored; None = the environment's own success.
        evaluation: use the environment's evaluation settings.
        on_episode: called with every finished trajectory.

    Raises:
        UserError: as `Collector.collect`; and where `episodes` is not a multiple of `group_size`.
        InfrastructureError: as `Collector.collect`.
    """
    if episodes < 1 or group_size < 1 or episodes % group_size:
        raise UserError(
            f"episodes={episodes} cannot be dealt out to groups of group_size={group_size}; make episodes a multiple"
        )
    if not isinstance(policy, Policy):
        if not callable(policy):
            raise UserError(f"policy is a Policy or a function observation -> action, not {type(policy).__name__}")
        policy = _ObservationPolicy(policy)
    config = EnvConfig(id=env) if isinstance(env, str) else env
    tasks = [Task(seed + i, f"{seed + i}", group_size) for i in range(episodes // group_size)]
    with Collector(
        policy,
        config,
        rollout or RolloutConfig(),
        outcome or OutcomeConfig(),
        evaluation=evaluation,
        on_episode=on_episode,
    ) as collector:
        return collector.collect(tasks, seed=seed)
