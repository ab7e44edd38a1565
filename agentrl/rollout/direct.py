"""Episodes without the event loop: a plain function plays an environment that runs inline.

Nothing can overlap when both sides are functions that return at once, so that futures, batches and timers would only
cost time: more than a step of a small environment takes. Such an episode is played from `reset` to its end in one go.
It is the same episode: same seeds, same checks, same failures, same trajectory as through the event loop
(`tests/test_direct.py` compares the two).

Deadlines are looked at after each call, as they are for every inline environment: what runs here cannot be cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, cast

from agentrl.config.schema import OutcomeConfig
from agentrl.errors import (
    DeadlineExceeded,
    EnvironmentFailure,
    InfrastructureError,
    NonFiniteError,
    PolicyFailure,
    UserError,
)
from agentrl.policy import FunctionPolicy, PolicyAction, PolicyRequest
from agentrl.rollout.conversation import Conversation
from agentrl.rollout.episode import Episode, Shared
from agentrl.rollout.executors import Environment, Host, LocalHost
from agentrl.rollout.outcome import judged
from agentrl.rollout.seeds import action_seed
from agentrl.rollout.summary import Summary
from agentrl.rollout.tasks import Job
from agentrl.rollout.values import checked_observation, checked_step, stored_info
from agentrl.types import Content, StopReason, Trajectory, Turn

_new, _set = object.__new__, object.__setattr__
_TERMINATED, _TURN_LIMIT = StopReason.TERMINATED, StopReason.TURN_LIMIT


class _Names:
    """What an episode that is not recorded needs of a `Trajectory`: its names, for messages, and how it ended."""

    instructions = ""
    stop_reason = StopReason.TERMINATED
    error: str | None = None
    final_observation: Content | None = None
    turns: tuple[Turn, ...] = ()

    def __init__(self, job: Job, env: str) -> None:
        self.job, self.env = job, env

    @property
    def id(self) -> str:
        return f"{self.job.task.group_id}/{self.job.order[1]}"

    @property
    def group_id(self) -> str:
        return self.job.task.group_id

    @property
    def seed(self) -> int:
        return self.job.task.seed

    @property
    def scorable(self) -> bool:
        return self.stop_reason.scorable


class DirectEpisode(Episode):
    """An `Episode` that is played by a `FunctionPolicy` in an inline environment, without `await`.

    Args:
        shared: what it has in common with the others.
        job: what to play.
        attempt: 0, and more where it is played again.
        record: keep the turns in `trajectory`; without, only the numbers of `Summary` can be had.
        cancelled: says (by a number) whether the collection is being cancelled: no `await` would notice it here.
    """

    cause: BaseException | None = None
    state, since = "about to start", 0.0
    played = 0
    invalid = 0
    total = acting = stepping = 0.0
    solved = False
    _environment: Environment | None = None
    _observation: Content | None = None
    _context = _answer = _call = _expired = None
    _suspect = True
    _resetting = 0.0

    def __init__(self, shared: Shared, job: Job, attempt: int, *, record: bool, cancelled: Callable[[], int]) -> None:
        # Not that of `Episode`: most of what it sets is for the event loop.
        self.job, self._attempt, self._shared, self._record = job, attempt, shared, record
        self._cancelled = cancelled
        # Read from the configuration once: its models look attributes up slowly.
        self._deadline, self._patience = shared.config.step_deadline_s, shared.config.episode_deadline_s
        env = shared.pool.env_id
        self.trajectory = self._begin(job.task, env) if record else cast(Trajectory, _Names(job, env))

    def renew(self, job: Job) -> None:
        """Makes of an episode that ended well, and is not recorded, one that is to play `job` in its environment."""
        self.job = cast(_Names, self.trajectory).job = job
        self._observation = None
        self.played = self.invalid = 0
        self.total = self.acting = self.stepping = self._resetting = 0.0

    @property
    def key(self) -> str:  # type: ignore[override]
        shared = self._shared
        return f"{shared.label}{shared.iteration}/{self.job.task.group_id}/{self.job.order[1]}#{self._attempt}"

    @property
    def usable(self) -> bool:
        """Whether another episode may go on in its environment."""
        return self.cause is None and not self._suspect

    def play_now(self) -> None:
        """Plays to the end, whatever the end is. The environment stays with the episode until it is told to `leave`.

        Raises:
            UserError: the environment, its arguments or its observations are not usable.
            CancelledError: the collection is being cancelled (`trajectory` then says so too).
        """
        trajectory, shared = self.trajectory, self._shared
        self.since = began = perf_counter()
        expires = began + self._patience
        try:
            if self._environment is None:
                self._environment = shared.pool.take()
                self._made(self._environment, expires)
            observation, info = self._started(self._environment.host, expires)
            trajectory.stop_reason = self._turns(self._environment.host, observation, info, expires)
        except (InfrastructureError, asyncio.CancelledError) as error:
            self._failed(error)
        finally:
            trajectory.final_observation = self._observation
            clock = shared.clock
            clock.policy += self.acting
            clock.environment += self.stepping + self._resetting
            clock.last_event = self.since
            if shared.releases:
                self._release_policy()

    def _made(self, environment: Environment, expires: float) -> None:
        """Makes the environment, if that is still to be done."""
        if environment.made:
            return
        self.state, self.since = "environment make", perf_counter()
        try:
            environment.host.make()
        except (Exception, SystemExit) as error:
            raise self._environment_failure("make", error) from error
        now = perf_counter()
        self._resetting += now - self.since
        if now > expires:
            raise self._overdue()
        environment.made = True

    def _started(self, host: Host, expires: float) -> tuple[Content, dict[str, Any]]:
        """Resets the environment. Returns its first observation and info."""
        shared, job, trajectory = self._shared, self.job, self.trajectory
        self._suspect = True
        self.state = "environment reset"
        began = self.since = perf_counter()
        try:
            seen, info, instructions = host.reset(job.task.seed, dict(job.task.options))
        except (Exception, SystemExit) as error:
            raise self._environment_failure("reset", error) from error
        now = perf_counter()
        self._resetting += now - began
        if now - began > self._deadline:
            raise self._late("reset")
        if now > expires:
            raise self._overdue()
        self._suspect = False
        self._observation = observation = seen if type(seen) is str else checked_observation(trajectory.env, seen)
        if shared.pool.instructions is not None:
            instructions = shared.pool.instructions
        trajectory.instructions = instructions
        if self._record:
            trajectory.start_info = stored_info(info)
        if job.task.members > 1:
            shared.starts.check(trajectory, job, instructions, observation)
        return observation, info

    def _turns(self, host: Host, observation: Content, info: dict[str, Any], expires: float) -> StopReason:
        """Plays turn after turn: the loop that everything else here is for (`benchmarks/eval_overhead.py`)."""
        shared, trajectory, record = self._shared, self.trajectory, self._record
        turns, cancelled, deadline = trajectory.turns, self._cancelled, self._deadline
        function = cast(FunctionPolicy, shared.policy).function
        past: list[tuple[Content, str]] | None = None
        if shared.reads_requests:
            past, key, seeds = [], self.key, self.job.action_seed
            instructions, window, sampling = trajectory.instructions, shared.window, shared.sampling
        step = host.stepper() if isinstance(host, LocalHost) else host.step
        acting = stepping = total = 0.0
        played = invalid = 0
        stepped = perf_counter()
        try:
            while True:
                if stepped > expires:
                    raise self._overdue()
                self.state, self.since = "waiting for the policy", stepped
                try:
                    if past is None:
                        text = function(observation)
                    else:  # made here: a call for it would be a twentieth of what a step takes
                        said = Conversation(instructions, past, observation, window)
                        seed = action_seed(seeds, played)
                        text = function(PolicyRequest(key, played, observation, said, info, None, (), seed, sampling))
                except Exception as error:
                    raise self._refusal(error) from error
                if type(text) is not str:
                    text = self._text(text)
                acted = perf_counter()
                acting += acted - stepped
                if acted > expires:
                    raise self._overdue()
                if cancelled():
                    raise asyncio.CancelledError
                self.state = "environment step"
                try:
                    answer = step(text)
                except BaseException as error:
                    raise self._broken(error) from error
                asked, stepped = stepped, perf_counter()
                stepping += stepped - acted
                if stepped - acted > deadline:
                    raise self._too_late()
                try:  # as `checked_step`, for answers that are as they should be
                    seen, reward, terminated, truncated, info = answer
                    if type(reward) is not float or type(info) is not dict or reward - reward != 0.0:
                        raise TypeError
                except (TypeError, ValueError):
                    seen, reward, terminated, truncated, info = self._checked(answer)
                total += reward
                if info.get("valid_action") is False:
                    invalid += 1
                if past is not None:
                    past.append((observation, text))
                    info = dict(info)
                if record:
                    timings = {"policy": acted - asked, "environment": stepped - acted}
                    flags = bool(terminated), bool(truncated)
                    turns.append(_turn(observation, text, reward, *flags, timings, stored_info(info)))
                    stepped = perf_counter()
                self.played = played = played + 1
                observation = seen if type(seen) is str else checked_observation(trajectory.env, seen)
                if terminated or truncated:
                    self.solved = bool(info.get("success", False))
                    return _TERMINATED if terminated else _TURN_LIMIT
        finally:
            self._observation = observation
            self.acting, self.stepping, self.total, self.invalid = acting, stepping, total, invalid

    def _checked(self, answer: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Returns the answer of `step` with plain types.

        Raises:
            EnvironmentFailure: it is not what Gymnasium promises.
        """
        try:
            return checked_step(answer)
        except EnvironmentFailure as error:
            raise self._environment_failure("step", error) from error

    def _too_late(self) -> DeadlineExceeded:
        self._suspect = True
        return self._late("step")

    def _refusal(self, error: Exception) -> Exception:
        """What to raise for an error of the policy."""
        if isinstance(error, PolicyFailure | DeadlineExceeded | UserError | NonFiniteError):
            return self._policy_failure(error)
        failure = PolicyFailure(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
        return self._policy_failure(failure)

    def _text(self, answer: Any) -> str:
        """Returns an answer that is a subclass of `str` as plain text.

        Raises:
            PolicyFailure: it is no text.
        """
        if not isinstance(answer, str):
            self._take_action(PolicyAction(answer))
        return str(answer)

    def _broken(self, error: BaseException) -> BaseException:
        """What to raise for an error of `step`."""
        self._suspect = True
        return self._environment_failure("step", error) if isinstance(error, Exception | SystemExit) else error

    def _overdue(self) -> DeadlineExceeded:
        """The episode's own deadline has passed."""
        self._expire()
        assert self._expired is not None
        return self._expired


class DirectPlayer:
    """Plays one direct episode after another.

    Making an object for each takes as long as a step of a small environment; where nothing is kept of an episode and
    nothing went wrong in it, the next one takes over its object and its environment. And code that runs once in a while
    has left the processor's caches, and takes three times as long: what is known of such episodes is noted, and made
    summaries of many at once.
    """

    def __init__(
        self, shared: Shared, live: dict[Episode, None], *, record: bool, cancelled: Callable[[], int]
    ) -> None:
        self._shared, self._live, self._record, self._cancelled = shared, live, record, cancelled
        self._free: DirectEpisode | None = None
        self._noted: list[tuple[Any, ...]] = []
        self.episode: DirectEpisode
        """The last one."""

    def play(self, job: Job, attempt: int) -> DirectEpisode:
        """Plays `job`. The episode that it returns may be used until the next call, one that failed for ever.

        Raises:
            UserError, CancelledError: as `DirectEpisode.play_now`.
        """
        episode = self._free
        if episode is None or attempt:
            episode = DirectEpisode(self._shared, job, attempt, record=self._record, cancelled=self._cancelled)
            self._live[episode] = None
        else:
            episode.renew(job)
        self.episode, self._free = episode, None
        try:
            episode.play_now()
        except BaseException:
            self._retire(episode)
            raise
        if self._record or attempt or not episode.usable:
            self._retire(episode)
        else:
            self._free = episode
        return episode

    def note(self, episode: DirectEpisode) -> None:
        """Keeps the numbers of an episode that is over, for `summaries`."""
        trajectory = episode.trajectory
        spent = episode.acting + episode.stepping
        numbers = trajectory.stop_reason, episode.solved, episode.total, episode.played, episode.invalid, spent
        self._noted.append((episode.job, *numbers, trajectory.error, episode if episode.cause is not None else None))

    def summaries(self, outcome: OutcomeConfig) -> Iterator[tuple[Summary, DirectEpisode | None]]:
        """Yields what was noted since the last call, scored by `outcome`, with the episode where it failed."""
        noted, self._noted = self._noted, []
        for job, reason, solved, total, played, invalid, spent, error, failed in noted:
            worth, success = 0.0, False
            if failed is None:
                worth, success = judged(solved, total, reason is not _TERMINATED, outcome)
            place, member = job.order
            seed = job.task.seed
            yield Summary(place, member, seed, worth, success, reason, played, invalid, 0, spent, error), failed

    def close(self) -> None:
        """Gives the last environment back."""
        if self._free is not None:
            self._retire(self._free)
            self._free = None

    def _retire(self, episode: DirectEpisode) -> None:
        del self._live[episode]
        episode.leave()


def _turn(
    observation: Content,
    action: str,
    reward: float,
    terminated: bool,
    truncated: bool,
    timings: dict[str, float],
    info: dict[str, Any],
) -> Turn:
    """Returns a `Turn` of values that were checked one by one: pydantic's own check would take as long as a step."""
    turn = _new(Turn)
    values = _DEFAULTS | {name: make() for name, make in _FACTORIES}
    values |= {
        "observation": observation,
        "action": action,
        "reward": reward,
        "terminated": terminated,
        "truncated": truncated,
        "timings": timings,
        "info": info,
    }
    _set(turn, "__dict__", values)
    _set(turn, "__pydantic_fields_set__", set(values))
    _set(turn, "__pydantic_extra__", None)
    _set(turn, "__pydantic_private__", None)
    return turn


_DEFAULTS: dict[str, Any] = {name: field.default for name, field in Turn.model_fields.items()}
_FACTORIES: list[tuple[str, Any]] = [
    (name, field.default_factory) for name, field in Turn.model_fields.items() if field.default_factory is not None
]
