"""Policy calls of all live episodes, batched as they arrive.

There is no lock-step and no waiting time to tune. A batch departs when no live episode is about to arrive: when each of
them either waits for the policy or is inside a slow (thread or process) environment call. Whatever arrives while the
policy is busy makes the next batch. With inline environments the composition of every batch is then a function of the
seeds alone, and the order inside a batch is canonical, so that a run reproduces bit for bit.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

from agentrl.errors import AgentRLError, DeadlineExceeded, InfrastructureError, NonFiniteError, PolicyFailure, UserError
from agentrl.policy import Policy, PolicyAction, PolicyRequest

log = logging.getLogger("agentrl.rollout")


class Cancelled(InfrastructureError):
    """Something outside the episode called it off."""


@dataclass(slots=True)
class Answer:
    """What an episode gets back from the policy: an action, or the reason why there is none."""

    action: PolicyAction | None
    error: AgentRLError | None
    seconds: float
    """Duration of the policy call, shared by its whole batch."""


class Clock:
    """Wall time by what it was spent on. Environment time counts only where the policy was not acting."""

    def __init__(self) -> None:
        self.policy = self.environment = 0.0
        self._policy_calls = self._environment_calls = 0
        self._since = self.started = self.last_event = perf_counter()

    def _advance(self) -> None:
        now = perf_counter()
        if self._policy_calls:
            self.policy += now - self._since
        elif self._environment_calls:
            self.environment += now - self._since
        self._since = self.last_event = now

    def policy_call(self, change: int) -> None:
        """`change`: +1 when a policy call begins, -1 when it ends."""
        self._advance()
        self._policy_calls += change

    def environment_call(self, change: int) -> None:
        """`change`: +1 when a slow environment call begins, -1 when it ends."""
        self._advance()
        self._environment_calls += change

    def inline(self, seconds: float, now: float) -> None:
        """An environment call of `seconds` has run on the event loop until `now`."""
        if not self._policy_calls:
            self.environment += seconds
        self.last_event = now

    def seconds(self) -> dict[str, float]:
        """Returns seconds of ``policy``, ``environment`` (not overlapped by the policy) and ``total``."""
        self._advance()
        return {"policy": self.policy, "environment": self.environment, "total": self._since - self.started}


@dataclass(slots=True, eq=False)
class _Waiting:
    order: tuple[int, int]
    request: PolicyRequest
    answer: asyncio.Future[Answer]


@dataclass(slots=True, eq=False)
class _Call:
    waiting: list[_Waiting]
    started: float
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    over: bool = False


@dataclass(eq=False)
class Batcher:
    """Collects requests and calls the policy. One per collection; lives on one event loop.

    Episodes tell it where they are: `arriving` when they start or come back from a slow call, `away` when they end or
    go into one. `submit` and the answer keep the count by themselves.
    """

    policy: Policy
    deadline_s: float
    clock: Clock
    batches: int = 0
    """Number of policy calls so far."""
    _arriving: int = 0
    _queue: list[_Waiting] = field(default_factory=list)
    _calls: list[_Call] = field(default_factory=list)
    _scheduled: bool = False

    def arriving(self) -> None:
        """One more episode is on its way to the policy."""
        self._arriving += 1

    def away(self) -> None:
        """One episode fewer is on its way to the policy."""
        self._arriving -= 1
        self._check()

    def submit(self, order: tuple[int, int], request: PolicyRequest) -> asyncio.Future[Answer]:
        """Queues `request`; await the future for the answer.

        Args:
            order: canonical place (task, member) inside a batch.
            request: what to act on.
        """
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(order, request, answer)
        self._arriving -= 1
        if self.policy.batched:
            self._queue.append(waiting)
            self._check()
        else:
            self._depart([waiting])
        return answer

    def resolve(self, answer: asyncio.Future[Answer], value: Answer) -> None:
        """Gives an episode its answer, and counts it as arriving from this moment on."""
        if not answer.done():
            self._arriving += 1
            answer.set_result(value)

    def withdraw(self, answer: asyncio.Future[Answer]) -> None:
        """Takes back a request whose episode was cancelled while it waited (an answer may have come just before)."""
        if not answer.done() or answer.cancelled():
            self._arriving += 1
            answer.cancel()

    async def close(self, patience_s: float = 5.0) -> None:
        """Cancels the calls under way and waits `patience_s` for them to end."""
        calls, self._calls = self._calls, []
        tasks = [call.task for call in calls if call.task is not None]
        for call in calls:
            self._abandon(call)
        if tasks:
            await asyncio.wait(tasks, timeout=patience_s)

    def _check(self) -> None:
        if self._arriving == 0 and self._queue and not self._calls and not self._scheduled:
            # One trip round the loop: environment answers that are in already join this batch.
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._maybe_depart)

    def _maybe_depart(self) -> None:
        self._scheduled = False
        if self._arriving or self._calls:
            return
        waiting = [one for one in self._queue if not one.answer.done()]
        self._queue.clear()
        if waiting:
            waiting.sort(key=lambda one: one.order)
            self._depart(waiting)

    def _depart(self, waiting: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        call = _Call(waiting, perf_counter())
        self.batches += 1
        self._calls.append(call)
        self.clock.policy_call(+1)
        if not self.policy.interactive:
            call.timer = loop.call_later(self.deadline_s, self._expire, call)
        call.task = loop.create_task(self._act(call))

    async def _act(self, call: _Call) -> None:
        error: AgentRLError | None = None
        actions: Sequence[PolicyAction] = []
        try:
            actions = await self.policy.act([one.request for one in call.waiting])
            if len(actions) != len(call.waiting):
                raise PolicyFailure(f"answered {len(call.waiting)} requests with {len(actions)} actions")
        except asyncio.CancelledError:
            if call.over:
                raise
            error = Cancelled("the policy cancelled its call")
        except (PolicyFailure, DeadlineExceeded, UserError, NonFiniteError) as failure:
            error = failure
        except Exception as failure:
            error = PolicyFailure(f"{type(failure).__name__}: {failure}")
            error.__cause__ = failure
        if not call.over:
            self._finish(call, actions, error)

    def _finish(self, call: _Call, actions: Sequence[PolicyAction], error: AgentRLError | None) -> None:
        seconds = perf_counter() - call.started
        self._end(call)
        if error is None:
            for one, action in zip(call.waiting, actions, strict=True):
                self.resolve(one.answer, Answer(action, None, seconds))
        else:
            for one in call.waiting:
                self.resolve(one.answer, Answer(None, error, seconds))
        self._check()

    def _expire(self, call: _Call) -> None:
        log.warning("policy %r: no answer within %g s; its call is abandoned", self.policy.name, self.deadline_s)
        waiting, task = call.waiting, call.task
        error = DeadlineExceeded(f"no answer within {self.deadline_s:g} s to a batch of {len(waiting)}")
        self._finish(call, [], error)
        if task is not None:
            task.cancel()

    def _abandon(self, call: _Call) -> None:
        self._end(call)
        if call.task is not None:
            call.task.cancel()

    def _end(self, call: _Call) -> None:
        call.over = True
        if call.timer is not None:
            call.timer.cancel()
        if call in self._calls:
            self._calls.remove(call)
        self.clock.policy_call(-1)
