"""Episodes without the event loop: a plain function plays an environment that runs inline.

Nothing can overlap when both sides are functions that return at once, so that futures, batches and timers would only
cost time: more than a step of a small environment takes. Such an episode is played from `reset` to its end in one go.
It is the same episode: same seeds, same checks, same failures, same trajectory as through the event loop
(`tests/test_direct.py` compares the two).

Deadlines are looked at after each call, as they are for every inline environment: what runs here cannot be cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cached_property
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
from agentrl.rollout.executors import Environment, Host, LocalHost, Method
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
        record: keep the turns in `trajectory`; without, only `summary` can be had.
        cancelled: says (by a number) whether the collection is being cancelled: no `await` would notice it here.
    """

    cause: BaseException | None = None
    state, since = "about to start", 0.0
    _environment: Environment | None = None
    _observation: Content | None = None
    _context = _answer = _call = _expired = None
    _suspect = True
    _played = _invalid = 0
    _total = _acting = _stepping = _resetting = 0.0
    _solved = False

    def __init__(self, shared: Shared, job: Job, attempt: int, *, record: bool, cancelled: Callable[[], int]) -> None:
        # Not that of `Episode`: most of what it sets is for the event loop.
        self.job, self._attempt, self._shared, self._record = job, attempt, shared, record
        self._cancelled = cancelled
        env = shared.pool.env_id
        self.trajectory = self._begin(job.task, env) if record else cast(Trajectory, _Names(job, env))

    def renew(self, job: Job) -> None:
        """Makes of an episode that ended well, and is not recorded, one that is to play `job`."""
        self.job = cast(_Names, self.trajectory).job = job
        self._environment = self._observation = None
        self._played = self._invalid = 0
        self._total = self._acting = self._stepping = self._resetting = 0.0
        self.__dict__.pop("key", None)

    @cached_property
    def key(self) -> str:  # type: ignore[override]
        shared = self._shared
        return f"{shared.label}{shared.iteration}/{self.job.task.group_id}/{self.job.order[1]}#{self._attempt}"

    def _release(self) -> None:
        if self._shared.releases:
            super()._release()
        elif self._environment is not None:
            self._shared.pool.give_back(self._environment, usable=not self._suspect)

    @property
    def played(self) -> int:
        return self._played

    def play_now(self) -> None:
        """Plays to the end, whatever the end is.

        Raises:
            UserError: the environment, its arguments or its observations are not usable.
            CancelledError: the collection is being cancelled (`trajectory` then says so too).
        """
        trajectory, shared = self.trajectory, self._shared
        self.since = began = perf_counter()
        expires = began + shared.config.episode_deadline_s
        try:
            self._environment = environment = shared.pool.take()
            if not environment.made:
                self._now("make", environment.host.make, expires)
                environment.made = True
            observation, info = self._started(environment.host, expires)
            trajectory.stop_reason = self._turns(observation, info, expires)
        except (InfrastructureError, asyncio.CancelledError) as error:
            self._failed(error)
        finally:
            trajectory.final_observation = self._observation
            self._release()
            shared.clock.policy += self._acting
            shared.clock.inline(self._stepping + self._resetting, self.since)

    def summary(self, outcome: OutcomeConfig) -> Summary:
        """Returns what an evaluation counts of this episode, scored by `outcome`."""
        trajectory = self.trajectory
        reason = trajectory.stop_reason
        value, success = 0.0, False
        if self.cause is None:
            value, success = judged(self._solved, self._total, reason is not _TERMINATED, outcome)
        place, member = self.job.order
        seconds = self._acting + self._stepping
        seed, error = self.job.task.seed, trajectory.error
        return Summary(place, member, seed, value, success, reason, self._played, self._invalid, 0, seconds, error)

    def _started(self, host: Host, expires: float) -> tuple[Content, dict[str, Any]]:
        """Resets the environment. Returns its first observation and info."""
        shared, job, trajectory = self._shared, self.job, self.trajectory
        seen, info, instructions = self._now("reset", host.reset, expires, job.task.seed, dict(job.task.options))
        self._observation = observation = checked_observation(trajectory.env, seen)
        if shared.pool.instructions is not None:
            instructions = shared.pool.instructions
        trajectory.instructions = instructions
        if self._record:
            trajectory.start_info = stored_info(info)
        if job.task.members > 1:
            shared.starts.check(trajectory, job, instructions, observation)
        return observation, info

    def _turns(self, observation: Content, info: dict[str, Any], expires: float) -> StopReason:
        """Plays turn after turn: the loop that everything else here is for (`benchmarks/eval_overhead.py`)."""
        shared, trajectory, record = self._shared, self.trajectory, self._record
        policy, turns = shared.policy, trajectory.turns
        assert isinstance(policy, FunctionPolicy)
        assert self._environment is not None
        function, cancelled = policy.function, self._cancelled
        past: list[tuple[Content, str]] | None = None
        if shared.reads_requests:
            past, key, seeds = [], self.key, self.job.action_seed
            instructions, window, sampling = trajectory.instructions, shared.window, shared.sampling
        host, deadline = self._environment.host, shared.config.step_deadline_s
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
                    plain = type(reward) is float and type(info) is dict and reward - reward == 0.0
                except (TypeError, ValueError):
                    plain = False
                if not plain:
                    seen, reward, terminated, truncated, info = self._checked(answer)
                total += reward
                played += 1
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
                self._played = played
                observation = seen if type(seen) is str else checked_observation(trajectory.env, seen)
                if terminated or truncated:
                    self._solved = bool(info.get("success", False))
                    return _TERMINATED if terminated else _TURN_LIMIT
        finally:
            self._observation = observation
            self._acting, self._stepping, self._total, self._invalid = acting, stepping, total, invalid

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

    def _now(self, method: Method, call: Callable[..., Any], expires: float, *arguments: Any) -> Any:
        """Calls `make` or `reset` here and now.

        Raises:
            EnvironmentFailure: it raised.
            DeadlineExceeded: it took longer than `step_deadline_s`, or the episode's time was up.
            UserError: it says that the user must mend something.
        """
        self._suspect = True
        self.state, self.since = f"environment {method}", perf_counter()
        began = self.since
        try:
            answer = call(*arguments)
        except (Exception, SystemExit) as error:
            raise self._environment_failure(method, error) from error
        now = perf_counter()
        self._resetting += now - began
        if method != "make" and now - began > self._shared.config.step_deadline_s:
            raise self._late(method)
        if now > expires:
            raise self._overdue()
        self._suspect = False
        return answer

    def _overdue(self) -> DeadlineExceeded:
        """The episode's own deadline has passed."""
        self._expire()
        assert self._expired is not None
        return self._expired


class DirectPlayer:
    """Plays one direct episode after another.

    Making an object for each takes as long as a step of a small environment; where nothing is kept of an episode and
    nothing went wrong in it, the next one takes over its object.
    """

    def __init__(
        self, shared: Shared, live: dict[Episode, None], *, record: bool, cancelled: Callable[[], int]
    ) -> None:
        self._shared, self._live, self.record, self._cancelled = shared, live, record, cancelled
        self._free: DirectEpisode | None = None
        self.episode: DirectEpisode
        """The last one."""

    def play(self, job: Job, attempt: int) -> DirectEpisode:
        """Plays `job`. The episode that it returns may be used until the next call, one that failed for ever.

        Raises:
            UserError, CancelledError: as `DirectEpisode.play_now`.
        """
        episode = self._free
        if episode is None or attempt:
            episode = DirectEpisode(self._shared, job, attempt, record=self.record, cancelled=self._cancelled)
        else:
            episode.renew(job)
        self.episode, self._free = episode, None
        self._live[episode] = None
        try:
            episode.play_now()
        finally:
            del self._live[episode]
        if not self.record and episode.cause is None and not attempt:
            self._free = episode
        return episode


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
