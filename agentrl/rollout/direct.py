"""Episodes without the event loop: a plain function plays an environment that runs inline.

Nothing can overlap when both sides are functions that return at once, so that futures, batches and timers would only
cost time: more than a step of a small environment takes. Such an episode is played from `reset` to its end in one go.
It is the same episode: same seeds, same checks, same failures, same trajectory as through the event loop
(`tests/test_direct.py` compares the two).

Deadlines are looked at after each call, as they are for every inline environment: what runs here cannot be cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast, overload

from agentrl.config.schema import OutcomeConfig
from agentrl.errors import (
    DeadlineExceeded,
    EnvironmentFailure,
    InfrastructureError,
    NonFiniteError,
    PolicyFailure,
    UserError,
)
from agentrl.policy import FunctionPolicy, Policy, PolicyAction, PolicyRequest
from agentrl.rollout.episode import Episode, Shared
from agentrl.rollout.executors import Environment, LocalHost, Method
from agentrl.rollout.outcome import judged
from agentrl.rollout.seeds import action_seed
from agentrl.rollout.summary import Summary
from agentrl.rollout.tasks import Job, Task
from agentrl.rollout.values import checked_observation, checked_step, stored_info
from agentrl.types import Content, Message, StopReason, Trajectory, Turn

_new, _set = object.__new__, object.__setattr__


class Conversation(Sequence[Message]):
    """The messages of a request, made when they are looked at: most plain functions read the observation alone."""

    __slots__ = ("_count", "_episode", "_made", "_observation")

    def __init__(self, episode: DirectEpisode, observation: Content) -> None:
        self._episode, self._observation, self._count = episode, observation, episode.played
        self._made: tuple[Message, ...] | None = None

    def _all(self) -> tuple[Message, ...]:
        if self._made is None:
            self._made = self._episode.conversation(self._count, self._observation)
        return self._made

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Message, ...]: ...
    def __getitem__(self, index: int | slice) -> Message | tuple[Message, ...]:
        return self._all()[index]

    def __len__(self) -> int:
        return len(self._all())

    def __eq__(self, other: object) -> bool:
        return self._all() == (other._all() if isinstance(other, Conversation) else other)

    def __hash__(self) -> int:
        return hash(self._all())

    def __repr__(self) -> str:
        return repr(self._all())


@dataclass(slots=True)
class _Names:
    """What an episode that is not recorded needs of a `Trajectory`: its names, for messages, and how it ended."""

    id: str
    group_id: str
    env: str
    seed: int
    instructions: str = ""
    stop_reason: StopReason = StopReason.TERMINATED
    error: str | None = None
    final_observation: Content | None = None
    turns: tuple[Turn, ...] = ()

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
    _total = _acting = _stepping = 0.0
    _solved = False

    def __init__(self, shared: Shared, job: Job, attempt: int, *, record: bool, cancelled: Callable[[], int]) -> None:
        # Not that of `Episode`: most of what it sets is for the event loop.
        self.job, self._attempt, self._shared, self._record = job, attempt, shared, record
        self._cancelled = cancelled
        self._past: list[tuple[Content, str]] = []
        """Observations and actions, for policies that read requests."""
        self._messages = []
        self.trajectory = self._begin(job.task, shared.pool.env_id)

    @property
    def key(self) -> str:  # type: ignore[override]
        shared = self._shared
        return f"{shared.label}{shared.iteration}/{self.job.task.group_id}/{self.job.order[1]}#{self._attempt}"

    def _release(self) -> None:
        if type(self._shared.policy).release is not Policy.release:
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
        try:
            trajectory.stop_reason = self._play_now(perf_counter() + shared.config.episode_deadline_s)
        except (InfrastructureError, asyncio.CancelledError) as error:
            self._failed(error)
        finally:
            trajectory.final_observation = self._observation
            self._release()
            shared.clock.policy += self._acting
            shared.clock.inline(self._stepping, self.since)

    def summary(self, outcome: OutcomeConfig) -> Summary:
        """Returns what an evaluation counts of this episode, scored by `outcome`."""
        reason = self.trajectory.stop_reason
        value, success = 0.0, False
        if reason.scorable:
            value, success = judged(self._solved, self._total, reason is not StopReason.TERMINATED, outcome)
        place, member = self.job.order
        seconds = self._acting + self._stepping
        return Summary(
            place,
            member,
            self.trajectory.seed,
            value,
            success,
            reason,
            self._played,
            self._invalid,
            0,
            seconds,
            self.trajectory.error,
        )

    def conversation(self, turns: int, observation: Content) -> tuple[Message, ...]:
        """Returns the messages of the first `turns` turns and `observation`, as the history setting shows them."""
        instructions, window = self.trajectory.instructions, self._shared.window
        messages = [Message(role="system", content=instructions)] if instructions else []
        for seen, action in self._past[0 if window is None else max(0, turns - window) : turns]:
            messages.append(Message(role="user", content=seen))
            messages.append(Message(role="assistant", content=action))
        return (*messages, Message(role="user", content=observation))

    def _begin(self, task: Task, env_id: str) -> Trajectory:
        if self._record:
            return super()._begin(task, env_id)
        names = _Names(f"{task.group_id}/{self.job.order[1]}", task.group_id, env_id, task.seed)
        return cast(Trajectory, names)

    def _play_now(self, expires: float) -> StopReason:
        shared, job, trajectory = self._shared, self.job, self.trajectory
        self._environment = environment = shared.pool.take()
        if not environment.made:
            self._now("make", expires)
            environment.made = True
        seen, info, instructions = self._now("reset", expires, job.task.seed, dict(job.task.options))
        observation = checked_observation(trajectory.env, seen)
        if shared.pool.instructions is not None:
            instructions = shared.pool.instructions
        trajectory.instructions = instructions
        if self._record:
            trajectory.start_info = stored_info(info)
        if job.task.members > 1:
            shared.starts.check(trajectory, job, instructions, observation)
        self._observation = observation
        return self._turns(observation, info, expires)

    def _turns(self, observation: Content, info: dict[str, Any], expires: float) -> StopReason:
        """Plays turn after turn: the loop that everything else here is for (`benchmarks/eval_overhead.py`)."""
        shared, trajectory, record = self._shared, self.trajectory, self._record
        policy, turns = shared.policy, trajectory.turns
        assert isinstance(policy, FunctionPolicy)
        assert self._environment is not None
        function, reads_request = policy.function, policy.reads == "request"
        cancelled = self._cancelled
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
                    text = function(self._request(observation, info) if reads_request else observation)
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
                if reads_request:
                    self._past.append((observation, text))
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
                    return StopReason.TERMINATED if terminated else StopReason.TURN_LIMIT
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

    def _request(self, observation: Content, info: dict[str, Any]) -> PolicyRequest:
        turn = self._played
        return PolicyRequest(
            self.key,
            turn,
            observation,
            Conversation(self, observation),
            info,
            seed=action_seed(self.job.action_seed, turn),
            sampling=self._shared.sampling,
        )

    def _now(self, method: Method, expires: float, *arguments: Any) -> Any:
        """Calls `make` or `reset` here and now.

        Raises:
            EnvironmentFailure: it raised.
            DeadlineExceeded: it took longer than `step_deadline_s`, or the episode's time was up.
            UserError: it says that the user must mend something.
        """
        self._suspect = True
        self.state, self.since = f"environment {method}", perf_counter()
        assert self._environment is not None
        try:
            answer = self._environment.call(method, *arguments)
        except (Exception, SystemExit) as error:
            raise self._environment_failure(method, error) from error
        now = perf_counter()
        self._shared.clock.inline(now - self.since, now)
        if method != "make" and now - self.since > self._shared.config.step_deadline_s:
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
