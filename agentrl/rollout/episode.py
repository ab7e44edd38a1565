"""One episode, from `reset` to its stop reason: a coroutine.

Whatever goes wrong outside the agent ends the episode with a `StopReason`, never with a reward. What the user must mend
(`UserError`) goes straight through.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from pydantic import ValidationError

from agentrl.config.schema import RolloutConfig, parse_history
from agentrl.errors import (
    AgentRLError,
    DeadlineExceeded,
    EnvironmentFailure,
    InfrastructureError,
    NonFiniteError,
    PolicyFailure,
    UserError,
)
from agentrl.policy import Policy, PolicyAction, PolicyRequest, Sampling
from agentrl.rollout.batcher import Answer, Batcher, Cancelled, Clock
from agentrl.rollout.context import Context, ContextBuilder
from agentrl.rollout.executors import Environment, EnvironmentPool, Method
from agentrl.rollout.seeds import action_seed
from agentrl.rollout.tasks import Job, Starts, Task
from agentrl.rollout.values import checked_observation, checked_step, jsonable, stored_info
from agentrl.types import Content, Message, StopReason, Trajectory, Turn

log = logging.getLogger("agentrl.rollout")


@dataclass(eq=False)
class Shared:
    """What the episodes of one collection have in common."""

    policy: Policy
    pool: EnvironmentPool
    config: RolloutConfig
    sampling: Sampling
    batcher: Batcher
    clock: Clock
    lanes: AbstractAsyncContextManager[Any]
    """Held during a slow environment call: a semaphore, where they are bounded."""
    iteration: int
    label: str
    starts: Starts = field(default_factory=Starts)

    def __post_init__(self) -> None:
        self.codec = getattr(self.policy, "chat", None)
        self.window = parse_history(self.config.history)
        self.reads_requests = getattr(self.policy, "reads", "request") == "request"
        self.releases = type(self.policy).release is not Policy.release


class Episode:
    """One attempt at one job. `play` it once; `trajectory` is what came of it."""

    def __init__(self, shared: Shared, job: Job, attempt: int) -> None:
        task, pool = job.task, shared.pool
        self.job = job
        self.key = f"{shared.label}{shared.iteration}/{task.group_id}/{job.order[1]}#{attempt}"
        self.state = "about to start"
        self.since = perf_counter()
        self.cause: BaseException | None = None
        self._shared = shared
        self._action_seed = job.action_seed
        self.trajectory = self._begin(task, pool.env_id)
        self._environment: Environment | None = None
        self._messages: list[Message] = []
        self._observation: Content | None = None
        self._context: ContextBuilder | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._call: asyncio.Future[tuple[bool, Any]] | None = None
        self._expired: DeadlineExceeded | None = None
        self._suspect = True
        """The environment may be broken: set while it is being called."""

    def _begin(self, task: Task, env_id: str) -> Trajectory:
        """Returns the trajectory, as yet without turns."""
        shared = self._shared
        return Trajectory(
            id=f"{task.group_id}/{self.job.order[1]}",
            group_id=task.group_id,
            env=env_id,
            task={"kwargs": jsonable(shared.pool.kwargs), "options": jsonable(task.options)},
            seed=task.seed,
            iteration=shared.iteration,
            policy=shared.policy.name,
        )

    @property
    def played(self) -> int:
        """Turns so far."""
        return len(self.trajectory.turns)

    async def play(self) -> Trajectory:
        """Plays to the end, whatever the end is.

        Raises:
            UserError: the environment, its arguments or its observations are not usable.
            CancelledError: the collection was cancelled (`trajectory` then says so too).
        """
        shared, trajectory = self._shared, self.trajectory
        deadline = shared.config.episode_deadline_s
        timer = None
        if not shared.policy.interactive:
            timer = asyncio.get_running_loop().call_later(deadline, self._expire)
        try:
            trajectory.stop_reason = await self._play()
        except (InfrastructureError, asyncio.CancelledError) as error:
            self._failed(error)
        finally:
            if timer is not None:
                timer.cancel()
            trajectory.final_observation = self._observation
            self.leave()
            self._release_policy()
        return trajectory

    def _failed(self, error: InfrastructureError | asyncio.CancelledError) -> None:
        """Says in the trajectory what ended it; raises the cancellation on."""
        if isinstance(error, asyncio.CancelledError):
            self.trajectory.stop_reason, self.trajectory.error = StopReason.CANCELLED, "the collection was cancelled"
            raise error
        self.trajectory.stop_reason, self.trajectory.error = _reason(error), str(error)
        self.cause = error

    def leave(self) -> None:
        """Gives the environment back."""
        if self._environment is not None:
            self._shared.pool.give_back(self._environment, usable=not self._suspect)

    def _release_policy(self) -> None:
        try:
            self._shared.policy.release(self.key)
        except Exception:
            log.warning("policy %r failed to release episode %s", self._shared.policy.name, self.key, exc_info=True)

    async def _play(self) -> StopReason:
        shared, job, trajectory = self._shared, self.job, self.trajectory
        self._environment = environment = shared.pool.take()
        if not environment.made:
            await self._call_environment("make")
            environment.made = True
        (seen, info, instructions), _ = await self._call_environment("reset", job.task.seed, dict(job.task.options))
        observation = checked_observation(trajectory.env, seen)
        if shared.pool.instructions is not None:
            instructions = shared.pool.instructions
        trajectory.instructions = instructions
        trajectory.start_info = stored_info(info)
        shared.starts.check(trajectory, job, instructions, observation)
        if shared.codec is not None:
            tools = trajectory.start_info.get("tool_schemas", ())
            as_template = shared.config.past_turns == "template"
            self._context = ContextBuilder(shared.codec, instructions, shared.window, tools, as_template=as_template)
        if instructions:
            self._messages.append(Message(role="system", content=instructions))

        while True:
            context, sampling = self._observe(observation), shared.sampling
            if context is not None:
                room = self._room(context)
                if room < 1:
                    return StopReason.TOKEN_LIMIT
                if room < sampling.max_new_tokens:
                    sampling = replace(sampling, max_new_tokens=room)
            action, policy_s = await self._ask_policy(observation, info, context, sampling)
            answer, environment_s = await self._call_environment("step", action.text)
            try:
                seen, reward, terminated, truncated, info = checked_step(answer)
            except EnvironmentFailure as error:
                raise self._environment_failure("step", error) from error
            timings = {"policy": policy_s, "environment": environment_s}
            outcome = {"reward": reward, "terminated": terminated, "truncated": truncated, "info": stored_info(info)}
            self._store(observation, context, action, outcome, timings)
            observation = checked_observation(trajectory.env, seen)
            if terminated or truncated:
                self._observation = observation
                return StopReason.TERMINATED if terminated else StopReason.TURN_LIMIT

    def _observe(self, observation: Content) -> Context | None:
        """Adds `observation` to the conversation, in words and, for models, in ids."""
        self._observation = observation
        self._messages.append(Message(role="user", content=observation))
        return None if self._context is None else self._context.observe(observation)

    def _room(self, context: Context) -> int:
        """Returns how many tokens this turn may sample; 0 at a limit, and says in the trajectory which."""
        config, room = self._shared.config, self._shared.sampling.max_new_tokens
        if config.max_episode_tokens is not None:
            room = min(room, config.max_episode_tokens - self.trajectory.action_tokens)
            if room < 1:
                self.trajectory.metadata["used_up_tokens"] = self.trajectory.action_tokens
                return 0
        if len(context.ids) + room > config.max_context_tokens:
            self.trajectory.metadata["refused_context_tokens"] = len(context.ids)
            return 0
        return room

    def _store(
        self,
        observation: Content,
        context: Context | None,
        action: PolicyAction,
        outcome: dict[str, Any],
        timings: dict[str, float],
    ) -> None:
        """Appends the turn to the trajectory."""
        try:
            turn = Turn(
                observation=observation,
                action=action.text,
                prompt_ids=context.prompt_ids if context is not None else [],
                prompt_images=context.prompt_images if context is not None else [],
                action_ids=action.ids or [],
                action_logprobs=action.logprobs or [],
                new_row=context is None or context.new_row,
                policy_version=action.version,
                policy_versions=list(action.versions),
                timings=timings,
                **outcome,
            )
        except ValidationError as error:
            raise PolicyFailure(f"{self._who()}: its answer cannot be stored: {error}") from error
        self.trajectory.turns.append(turn)

    def _visible(self) -> tuple[Message, ...]:
        """The conversation as the history setting shows it: system text, last k turns, current observation."""
        messages, window = self._messages, self._shared.window
        system = 1 if messages[0].role == "system" else 0
        if window is None or len(messages) - system <= 2 * window + 1:
            return tuple(messages)
        return (*messages[:system], *messages[-(2 * window + 1) :])

    async def _ask_policy(
        self, observation: Content, info: dict[str, Any], context: Context | None, sampling: Sampling
    ) -> tuple[PolicyAction, float]:
        """Returns the policy's action and the seconds its call took."""
        if self._expired is not None:
            raise self._expired
        shared, turn = self._shared, len(self.trajectory.turns)
        request = PolicyRequest(
            episode=self.key,
            turn=turn,
            observation=observation,
            messages=self._visible(),
            info=info,
            context_ids=None if context is None else context.ids,
            context_images=() if context is None else context.images,
            seed=action_seed(self._action_seed, turn),
            sampling=sampling,
        )
        self.state, self.since = "waiting for the policy", perf_counter()
        self._answer = shared.batcher.submit(self.job.order, request)
        try:
            answer = await self._answer
        except asyncio.CancelledError:
            shared.batcher.withdraw(self._answer)
            raise
        finally:
            self._answer = None
        self.state = "acting"
        if answer.error is not None:
            raise self._policy_failure(answer.error) from answer.error
        assert answer.action is not None
        self._take_action(answer.action)
        return answer.action, answer.seconds

    def _policy_failure(self, error: AgentRLError) -> AgentRLError:
        """What to raise for an error that the policy answered with."""
        if error is self._expired or isinstance(error, UserError | NonFiniteError):
            return error
        kind = next(kind for kind in (DeadlineExceeded, Cancelled, PolicyFailure) if isinstance(error, kind))
        return kind(f"{self._who()}: {error}")

    def _who(self) -> str:
        where = f"turn {self.played} of episode {self.trajectory.id}"
        return f"policy {self._shared.policy.name!r}, {where}"

    def _take_action(self, action: PolicyAction) -> None:
        """Checks what the policy answered and adds it to the conversation.

        Raises:
            PolicyFailure: not a text, or not one log-prob per id.
            NonFiniteError: a log-prob is NaN or infinite; training on it would spread it.
        """
        if not isinstance(action, PolicyAction) or not isinstance(action.text, str):
            got = getattr(action, "text", action)
            text, hint = f"{got!r:.80} ({type(got).__name__})", ""
            if inspect.iscoroutine(got):
                hint = "; a function that is to be awaited must be declared async"
                got.close()
            raise PolicyFailure(f"{self._who()}: answered {text}; an action is text (str){hint}")
        if self._context is not None:
            ids, logprobs = action.ids, action.logprobs
            if ids is None or logprobs is None or len(ids) != len(logprobs):
                raise PolicyFailure(
                    f"{self._who()}: answered {'no' if ids is None else len(ids)} ids with "
                    f"{'no' if logprobs is None else len(logprobs)} log-probs; a model policy returns one for each"
                )
            if not all(map(math.isfinite, logprobs)):
                raise NonFiniteError(f"{self._who()}: the log-probs of its action hold NaN or infinity: {logprobs}")
            self._context.act(ids)
        self._messages.append(Message(role="assistant", content=action.text))

    async def _call_environment(self, method: Method, *arguments: Any) -> tuple[Any, float]:
        """Calls the environment where it runs. Returns its answer and the seconds it took.

        Raises:
            EnvironmentFailure: it raised or died.
            DeadlineExceeded: it took longer than `step_deadline_s`, or the episode's time was up.
            UserError: `make` or `reset` say that the user must mend something.
        """
        if self._expired is not None:
            raise self._expired
        shared, environment = self._shared, self._environment
        assert environment is not None
        deadline = shared.config.step_deadline_s
        self._suspect = True
        self.state, self.since = f"environment {method}", perf_counter()
        if environment.slow:
            good, answer = await self._call_slow(environment, method, arguments)
            seconds = perf_counter() - self.since
        else:
            good = True
            try:
                answer = environment.call(method, *arguments)
            except (Exception, SystemExit) as error:
                good, answer = False, error
            now = perf_counter()
            seconds = now - self.since
            shared.clock.inline(seconds, now)
            if seconds > deadline and method != "make":  # it cannot be cut off here, but it can be told
                raise self._late(method)
        self.state = "acting"
        if not good:
            raise self._environment_failure(method, answer) from answer
        self._suspect = False
        return answer, seconds

    async def _call_slow(
        self, environment: Environment, method: Method, arguments: tuple[Any, ...]
    ) -> tuple[bool, Any]:
        """Calls an environment in its thread or process, without holding up anybody."""
        shared, loop = self._shared, asyncio.get_running_loop()
        shared.batcher.away()
        state, self.state = self.state, "waiting for an environment worker"
        try:
            async with shared.lanes:
                self.state, self.since = state, perf_counter()
                if self._expired is not None:
                    raise self._expired
                self._call = call = loop.create_future()
                timer = None
                if method != "make":
                    timer = loop.call_later(shared.config.step_deadline_s, self._give_up, call, self._late(method))
                shared.clock.environment_call(+1)
                try:
                    environment.submit(method, arguments, call)
                    good, answer = await call
                    return good, answer
                finally:
                    shared.clock.environment_call(-1)
                    self._call = None
                    if timer is not None:
                        timer.cancel()
        finally:
            shared.batcher.arriving()

    def _give_up(self, call: asyncio.Future[tuple[bool, Any]], error: DeadlineExceeded) -> None:
        if not call.done():
            call.set_exception(error)

    def _expire(self) -> None:
        """The episode's own deadline has passed: whatever it waits for is given up."""
        deadline = self._shared.config.episode_deadline_s
        seconds = perf_counter() - self.since
        self._expired = DeadlineExceeded(
            f"episode {self.trajectory.id} did not end within {deadline:g} s; after {self.played} turns "
            f"it was {self.state} for {seconds:.1f} s"
        )
        if self._answer is not None:
            self._shared.batcher.resolve(self._answer, Answer(None, self._expired, seconds))
        if self._call is not None:
            self._give_up(self._call, self._expired)

    def _late(self, method: str) -> DeadlineExceeded:
        deadline = self._shared.config.step_deadline_s
        return DeadlineExceeded(f"{self._where(method)}: no answer within {deadline:g} s")

    def _environment_failure(self, method: str, error: BaseException) -> Exception:
        """What to raise for an error of the environment."""
        self._suspect = True
        if isinstance(error, UserError) and method != "step":
            return error
        if isinstance(error, DeadlineExceeded):  # its own, e.g. of a server behind it
            return DeadlineExceeded(f"{self._where(method)}: {error}")
        text = str(error) if isinstance(error, EnvironmentFailure) else f"{type(error).__name__}: {error}"
        return EnvironmentFailure(f"{self._where(method)}: {text}")

    def _where(self, method: str) -> str:
        trajectory = self.trajectory
        turn = f", turn {self.played}" if method == "step" else ""
        return f"environment {trajectory.env!r}, {method} of episode {trajectory.id} (seed {trajectory.seed}{turn})"


def _reason(error: InfrastructureError) -> StopReason:
    """Returns the stop reason that belongs to `error`."""
    if isinstance(error, DeadlineExceeded):
        return StopReason.DEADLINE
    if isinstance(error, PolicyFailure):
        return StopReason.POLICY_ERROR
    if isinstance(error, Cancelled):
        return StopReason.CANCELLED
    return StopReason.ENVIRONMENT_ERROR
