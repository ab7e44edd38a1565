"""Open episodes: a session is one episode of one client.

A session ends when its episode does, when it is closed, when its environment fails, or when nobody steps it for its
time to live. Its environment goes back to the runner then; its last answer stays for another such time, so that a retry
that comes late is still answered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from time import perf_counter
from typing import Any

from agentrl.errors import DeadlineExceeded, UserError
from agentrl.remote.protocol import Code, CreateRequest
from agentrl.rollout.executors import Environment
from agentrl.serve.answers import Answer, Refused, created, stepped, words_of
from agentrl.serve.catalogue import Catalogue, Entry, Recipe
from agentrl.serve.metrics import Metrics
from agentrl.serve.runner import Runner
from agentrl.serve.settings import Settings

log = logging.getLogger("agentrl.serve")

RETRY_AFTER_S = 1.0
"""When to come back where the server is full or about to stop."""

FAST_S = 0.2
"""A step on the event loop that takes longer is the last one of its environment there: all others waited for it."""

FAILED = (Code.ENVIRONMENT, Code.DEADLINE, Code.INVALID)


class Session:
    """One episode. `step` is the number of the last action taken, `answer` what came of it."""

    __slots__ = ("answer", "created", "ended", "env", "environment", "id", "recipe", "request", "step", "task",
                 "terms", "used")  # fmt: skip

    def __init__(self, env: str, recipe: Recipe, terms: tuple[Any, ...], request: str, now: float) -> None:
        self.id = secrets.token_urlsafe(16)
        self.env, self.recipe, self.request = env, recipe, request
        self.terms = terms
        """What was asked for: a retry of the create must ask for the same."""
        self.environment: Environment | None = None
        self.step = 0
        self.answer = self.created = Answer(0, b"")
        self.task: asyncio.Task[Answer] | None = None
        """The call under way."""
        self.used = now
        self.ended = ""
        """Why; "" while it goes on."""


class Sessions:
    """All sessions of a server. Everything here runs on one event loop."""

    def __init__(
        self, catalogue: Catalogue, runner: Runner, settings: Settings, metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._catalogue, self._runner, self._settings, self._metrics = catalogue, runner, settings, metrics
        self._clock = clock
        self._sessions: dict[str, Session] = {}
        self._requests: dict[str, Session] = {}
        self._ended: deque[tuple[float, Session]] = deque()
        self.active = 0
        """Sessions whose episode goes on."""
        self.stopping = False
        self.idle = asyncio.Event()
        """Set while no episode goes on."""
        self.idle.set()

    async def create(self, request: CreateRequest) -> Answer:
        """Makes and resets an environment; the same request key again returns the same session.

        Raises:
            Refused: unknown environment, arguments that clients may not set, no room, or the server is stopping.
        """
        terms = (request.env, request.seed, _text(request.kwargs), request.max_turns, _text(request.wrappers),
                 _text(request.options))  # fmt: skip
        session = self._requests.get(request.request)
        if session is None:
            entry = self._catalogue.entry(request.env)
            recipe, trusted = self._catalogue.recipe(entry, request)
            self._admit()
            session = Session(entry.env_id, recipe, terms, request.request, self._clock())
            self._sessions[session.id] = self._requests[request.request] = session
            self.active += 1
            self.idle.clear()
            session.task = asyncio.create_task(self._begin(session, entry, request, trusted))
        elif session.terms != terms:
            raise Refused(
                Code.INVALID, f"request {request.request!r} was used for another session; draw a new key for each",
                field="request",
            )  # fmt: skip
        return await self._settled(session.task) if session.step == 0 and session.task else session.created

    def step(self, session_id: str, step: int, action: str) -> Answer | Awaitable[Answer]:
        """Plays `action` as number `step`; the number last played again returns the recorded answer.

        Returns:
            The answer, or what to wait for.

        Raises:
            Refused: no such session, another number than the next, one still under way, or a finished episode.
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise Refused(Code.UNKNOWN_SESSION, f"no session {session_id[:64]!r} (closed, idle for too long, or never)")
        if step != session.step + 1 or session.task is not None or session.ended:
            return self._again(session, step)
        session.step = step
        environment = session.environment
        assert environment is not None
        if environment.slow:
            session.task = asyncio.create_task(self._play(session, environment, action))
            return self._settled(session.task)
        started = perf_counter()
        try:
            answer = self._played(session, environment.host.step(action))
        except (Exception, SystemExit) as error:
            answer = self._failed(session, error, f"step {step}")
        spent = perf_counter() - started
        if spent > FAST_S and environment is session.environment:
            log.info("session %s (%s): a step took %.2f s; the next run in a thread", session.id, session.env, spent)
            environment.outrun()
        self._metrics.stepped(session.env, spent)
        session.used = self._clock()
        session.answer = answer
        return answer

    def close(self, session_ids: Iterable[str]) -> int:
        """Closes sessions. Returns how many were open."""
        closed = 0
        for session_id in session_ids:
            session = self._sessions.get(session_id)
            if session is not None and session.ended in ("", "finished"):
                closed += 1
                self._end(session, "closed")
        return closed

    def sweep(self) -> None:
        """Closes sessions that nobody stepped for their time to live, and forgets those that ended as long ago."""
        limit = self._clock() - self._settings.session_ttl_s
        for session in list(self._sessions.values()):
            if not session.ended and session.task is None and session.used < limit:
                log.info("session %s (%s) was idle for too long", session.id, session.env)
                self._end(session, "reaped")
        while self._ended and self._ended[0][0] < limit:
            self._forget(self._ended.popleft()[1])
        self._runner.sweep()

    async def stop(self) -> None:
        """Ends all sessions and environments."""
        self.stopping = True
        tasks = [session.task for session in self._sessions.values() if session.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in list(self._sessions.values()):
            if not session.ended:
                self._end(session, "stopping")
        self._sessions.clear()
        self._requests.clear()
        self._ended.clear()
        await self._runner.close()

    @property
    def kept(self) -> int:
        """Sessions in memory: those that go on, and those that ended a while ago."""
        return len(self._sessions)

    def _admit(self) -> None:
        if self.stopping:
            raise Refused(Code.STOPPING, "the server is stopping: no new sessions", retry_after_s=RETRY_AFTER_S)
        if self.active >= self._settings.max_sessions:
            raise Refused(
                Code.CAPACITY,
                f"all {self._settings.max_sessions} sessions are taken; close some, or come back",
                retry_after_s=RETRY_AFTER_S,
            )
        while len(self._ended) > 4 * self._settings.max_sessions:
            self._forget(self._ended.popleft()[1])

    def _again(self, session: Session, step: int) -> Answer | Awaitable[Answer]:
        """Returns the recorded answer of the step last played, or what to wait for; refuses any other."""
        if step == session.step:
            if session.task is not None:
                return self._settled(session.task)
            if session.ended not in ("closed", "reaped", "stopping"):
                session.used = self._clock()
                return session.answer
        wanted = session.step + 1
        if session.ended == "finished" and step == wanted:
            raise Refused(Code.FINISHED, f"the episode of session {session.id!r} is over; create another")
        if session.ended and session.ended != "finished":
            raise Refused(Code.UNKNOWN_SESSION, f"session {session.id!r} has ended: {session.ended}")
        if session.task is not None:
            raise Refused(Code.BUSY, f"step {session.step} of session {session.id!r} is still under way")
        raise Refused(
            Code.WRONG_STEP, f"session {session.id!r}: step {step} is not the next, {wanted}, nor the one before",
            field="step",
        )  # fmt: skip

    async def _settled(self, task: asyncio.Task[Answer]) -> Answer:
        """Waits for a call that must not end with the one who waits."""
        await asyncio.wait([task])
        if task.cancelled():
            raise Refused(Code.STOPPING, "the server stopped during this call", retry_after_s=RETRY_AFTER_S)
        return task.result()

    async def _begin(self, session: Session, entry: Entry, request: CreateRequest, trusted: bool) -> Answer:
        environment = session.environment = self._runner.take(session.recipe)
        try:
            answer = await self._runner.start(environment, request.seed, request.options, trusted=trusted)
            session.created = self._limited(created(session.id, session.env, answer))
            self._metrics.created(session.env)
        except (Exception, SystemExit) as error:
            session.created = self._failed(session, error, "create")
            # Nothing was begun: the same key may try again.
            del self._sessions[session.id], self._requests[session.request]
        finally:
            self._rest(session)
        return session.created

    async def _play(self, session: Session, environment: Environment, action: str) -> Answer:
        started = perf_counter()
        try:
            session.answer = self._played(session, await self._runner.step(environment, action))
        except (Exception, SystemExit) as error:
            session.answer = self._failed(session, error, f"step {session.step}")
        finally:
            self._metrics.stepped(session.env, perf_counter() - started)
            self._rest(session)
        return session.answer

    def _rest(self, session: Session) -> None:
        """The call is over; a session that was closed meanwhile lets its environment go."""
        session.task = None
        session.used = self._clock()
        if session.ended:
            self._release(session, usable=session.ended not in FAILED)

    def _played(self, session: Session, raw: Any) -> Answer:
        body, over = stepped(session.step, session.env, raw)
        answer = self._limited(body)
        if over and not session.ended:
            self._end(session, "finished", keep_task=True)
        return answer

    def _limited(self, body: bytes) -> Answer:
        if len(body) > self._settings.max_response:
            raise UserError(
                f"the answer has {len(body):,} bytes; this server's limit is {self._settings.max_response:,}. Wrap the "
                'environment: wrappers=[{"name": "truncate_observation", "limit": 4000}]'
            )
        return Answer(200, body)

    def _failed(self, session: Session, error: BaseException, during: str) -> Answer:
        """Ends a session whose environment failed. Returns what the client is told."""
        where = f"environment {session.env!r} at {during}"
        said = words_of(error, self._catalogue.entries[session.env].without_secrets)
        if isinstance(error, UserError):
            refusal = Refused(Code.INVALID, f"{where}: {said}")
            log.info("session %s: %s", session.id, refusal)
        elif isinstance(error, DeadlineExceeded):
            refusal = Refused(Code.DEADLINE, f"{where}: {said}")
            log.warning("session %s: %s", session.id, refusal)
        else:
            refusal = Refused(Code.ENVIRONMENT, f"{where} failed: {said}")
            log.error("session %s: %s failed", session.id, where, exc_info=error)
        self._metrics.errors[refusal.code] += 1
        if not session.ended:
            self._end(session, refusal.code, keep_task=True)
        else:
            session.ended = refusal.code
        return refusal.answer()

    def _end(self, session: Session, why: str, *, keep_task: bool = False) -> None:
        """Ends a session; its environment goes back at once, or when the call under way is over.

        Args:
            session: the session.
            why: for metrics, logs and later requests.
            keep_task: the call under way is what ends it.
        """
        if not session.ended:
            self.active -= 1
            self._metrics.ended(session.env, why)
            if not self.active:
                self.idle.set()
            self._ended.append((self._clock(), session))
        session.ended = why
        if keep_task or session.task is None:
            self._release(session, usable=why not in FAILED)

    def _release(self, session: Session, *, usable: bool) -> None:
        environment, session.environment = session.environment, None
        if environment is not None:
            self._runner.give_back(session.recipe, environment, usable=usable)

    def _forget(self, session: Session) -> None:
        self._sessions.pop(session.id, None)
        if self._requests.get(session.request) is session:  # not another create with the key of one that failed
            del self._requests[session.request]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
