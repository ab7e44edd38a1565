"""The collector: every episode is a coroutine, at most `concurrency` of them alive.

with Collector(policy, env_config, rollout_config, outcome_config) as collector:
    collected = collector.collect([Task(seed=0, group_id="a", members=8)])
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from agentrl.config.schema import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.errors import InfrastructureError, UserError
from agentrl.policy import FunctionPolicy, Policy, Sampling, as_policy
from agentrl.rollout.batcher import Batcher, Clock
from agentrl.rollout.direct import DirectEpisode, DirectPlayer
from agentrl.rollout.episode import Episode, Shared
from agentrl.rollout.executors import EnvironmentPool
from agentrl.rollout.loop import run
from agentrl.rollout.outcome import score
from agentrl.rollout.summary import Summary, summarise
from agentrl.rollout.tasks import Job, Task, jobs_of
from agentrl.rollout.watchdog import Watchdog
from agentrl.types import Content, StopReason, Trajectory

log = logging.getLogger("agentrl.rollout")

_BREATH_S = 0.05
"""Seconds after which direct episodes let the event loop look at signals."""


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


@dataclass
class _Ended:
    """The episodes that came to an end, or only what must be known of them."""

    keep: bool
    retried: int = 0
    reasons: Counter[StopReason] = field(default_factory=Counter)
    acted: bool = False
    """Some episode has a turn."""
    first: tuple[tuple[int, int], Episode] | None = None
    kept: list[tuple[tuple[int, int], Trajectory]] = field(default_factory=list)

    def add(self, order: tuple[int, int], episode: Episode) -> None:
        self.count(order, episode.trajectory.stop_reason, episode.played > 0, episode)
        if self.keep:
            self.kept.append((order, episode.trajectory))

    def count(self, order: tuple[int, int], reason: StopReason, acted: bool, episode: Episode | None) -> None:
        self.reasons[reason] += 1
        self.acted = self.acted or acted
        if episode is not None and (self.first is None or order < self.first[0]):
            self.first = (order, episode)


class Collector:
    """Plays episodes. Keeps environments alive between calls; a context manager.

    Args:
        policy: who acts. With a chat codec (`policy.chat`) contexts are built in ids, token in, token out.
        env: which environment.
        rollout: history, limits, deadlines, concurrency.
        outcome: how an episode is scored when it ends.
        evaluation: play with ``env.eval_kwargs`` over ``env.kwargs``.
        on_episode: called with every finished trajectory, for progress bars.
        on_summary: called with the summary of every job's last episode, for statistics. Where that is all that is
            wanted (``collect(keep=False)`` without `on_episode`), direct episodes keep no turns.
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
        on_summary: Callable[[Summary], None] | None = None,
        watchdog_s: float = 60.0,
    ) -> None:
        self.policy, self.rollout, self.outcome = policy, rollout, outcome
        self.on_episode, self.on_summary = on_episode, on_summary
        self.watchdog_s = watchdog_s
        self.pool = EnvironmentPool(
            env, rollout.executor, evaluation=evaluation, whole=policy.batched or _answers_at_once(policy)
        )
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
        keep: bool = True,
    ) -> Collected:
        """Plays every member of every task once, and again where infrastructure failed, up to `rollout.retries` times.

        Args:
            tasks: what to play; every `group_id` once.
            sampling: how actions are drawn; None takes it from the rollout configuration.
            seed: together with iteration, task seed, member and turn it seeds each action.
            iteration: written into the trajectories.
            label: what this collection is called in logs and episode keys.
            keep: False: episodes go to `on_episode` and are forgotten, so that a long collection takes no memory;
                `Collected.trajectories` and `failed` stay empty.

        Raises:
            UserError: the tasks, the environment or its arguments are not usable, or members of a group do not start
                from the same observation.
            InfrastructureError: every single episode failed, all for the same reason.
        """
        return run(self.collect_async(tasks, sampling=sampling, seed=seed, iteration=iteration, label=label, keep=keep))

    async def collect_async(
        self,
        tasks: Sequence[Task],
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        iteration: int = 0,
        label: str = "",
        keep: bool = True,
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
                    lanes=nullcontext() if self.pool.executor == "async" else asyncio.Semaphore(self.rollout.workers),
                    iteration=iteration,
                    label=f"{label}/" if label else "",
                )
                try:
                    ended = await self._play_all(shared, jobs, live, _Ended(keep))
                finally:
                    await batcher.close()
                    await self.pool.settle()
        return _collected(ended, clock, self.rollout, shared.sampling)

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

    async def _play_all(self, shared: Shared, jobs: list[Job], live: dict[Episode, None], ended: _Ended) -> _Ended:
        """Plays `jobs` with as many coroutines as episodes may live at once."""
        waiting = deque(jobs)
        told: set[StopReason] = set()
        direct = _is_direct(self.policy, self.pool)
        record = ended.keep or self.on_episode is not None
        main = asyncio.current_task()
        assert main is not None
        directly = DirectPlayer(shared, live, record=record, cancelled=main.cancelling)

        def count() -> None:
            for summary, failed in directly.summaries(self.outcome):
                if self.on_summary is not None:
                    self.on_summary(summary)
                ended.count((summary.task, summary.member), summary.stop_reason, summary.turns > 0, failed)

        async def play_some() -> None:
            shared.batcher.arriving()
            breath = perf_counter()
            try:
                while waiting:
                    job = waiting.popleft()
                    for attempt in range(self.rollout.retries + 1):
                        if direct:
                            episode: Episode = self._play_now(directly, job, attempt, record)
                        else:
                            episode = await self._play(shared, job, attempt, live)
                        if episode.cause is None or attempt == self.rollout.retries or self.policy.interactive:
                            break
                        ended.retried += 1
                        self._report(episode, told)
                    if isinstance(episode, DirectEpisode) and not record:
                        directly.note(episode)
                    else:
                        self._finished(episode.trajectory)
                        if self.on_summary is not None:
                            self.on_summary(summarise(episode.trajectory, *job.order))
                        ended.add(job.order, episode)
                    if direct and perf_counter() - breath > _BREATH_S:
                        count()
                        await asyncio.sleep(0)
                        breath = perf_counter()
            finally:
                shared.batcher.away()
                directly.close()
                count()

        # A worker process is one environment, so that there are no more episodes alive than workers. Direct episodes
        # never wait for anything: side by side they would only share the time of one.
        alive = self.rollout.workers if self.pool.executor == "process" else 1 if direct else len(jobs)
        players = [asyncio.create_task(play_some()) for _ in range(min(self.rollout.concurrency, alive, len(jobs)))]
        try:
            await asyncio.gather(*players)
        except BaseException:
            for player in players:
                player.cancel()
            await asyncio.gather(*players, return_exceptions=True)
            raise
        return ended

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

    def _play_now(self, player: DirectPlayer, job: Job, attempt: int, record: bool) -> DirectEpisode:
        try:
            return player.play(job, attempt)
        except asyncio.CancelledError:
            if record:
                self._finished(player.episode.trajectory)
            raise

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


def _answers_at_once(policy: Policy) -> bool:
    """Whether a policy is a plain function."""
    return isinstance(policy, FunctionPolicy) and type(policy).act is FunctionPolicy.act


def _is_direct(policy: Policy, pool: EnvironmentPool) -> bool:
    """Whether policy and environment both answer at once, so that episodes need no event loop."""
    return _answers_at_once(policy) and pool.executor == "inline"


def _collected(ended: _Ended, clock: Clock, config: RolloutConfig, sampling: Sampling) -> Collected:
    reasons, count = ended.reasons, ended.reasons.total()
    if ended.first is not None:
        first = ended.first[1].trajectory
        if len(reasons) == 1 and not first.scorable:
            raise InfrastructureError(
                f"every one of {count} episodes ended with {first.stop_reason.value!r}, after {ended.retried} "
                f"retries; the first: {first.error}"
            ) from ended.first[1].cause
        if set(reasons) == {StopReason.TOKEN_LIMIT} and not ended.acted:
            new = f"max_new_tokens={sampling.max_new_tokens}"
            if config.max_episode_tokens is not None and config.max_episode_tokens < sampling.max_new_tokens:
                new = f"max_episode_tokens={config.max_episode_tokens}"
            raise UserError(
                f"no episode could act: the first prompt has {first.metadata['refused_context_tokens']} tokens; with "
                f"{new} it passes rollout.max_context_tokens={config.max_context_tokens}; raise that"
            )
    kept = [trajectory for _, trajectory in sorted(ended.kept, key=lambda one: one[0])]
    return Collected(
        trajectories=[one for one in kept if one.scorable],
        failed=[one for one in kept if not one.scorable],
        retried=ended.retried,
        seconds=clock.seconds(),
        counts={reason.value: reasons[reason] for reason in StopReason if reasons[reason]},
    )


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
    policy = as_policy(policy)
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
