"""HTTP to environment servers: one attempt at a time (`Client`), many episodes in one request (`Lane`), and the calls
that an episode makes of attempts, pauses and servers (`anywhere`, `step`).

The calls are generators that yield what is to be done (`Ask`, `Pause`) and get back its answer or its error, so that
the rules stand here once: `drive` runs them where threads may block, `adrive` on an event loop.

Every retry is safe (`agentrl.remote.protocol`). A request without an answer is asked again with twice the patience, and
a batch in smaller ones: a step that hangs holds up nobody else for long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from agentrl.remote.codec import decode, encode
from agentrl.remote.errors import (
    InvalidRequest,
    NoAnswer,
    RemoteError,
    TooLarge,
    TooLate,
    Unreachable,
    error_of,
    error_of_answer,
)
from agentrl.remote.protocol import MAX_ACTION, MAX_BATCH, ErrorAnswer
from agentrl.remote.servers import FAILOVER_S, Budget, Server, choose
from agentrl.remote.transport import Reply, Transport, async_transport, transport

PATIENCE_S = 2.0
"""Seconds until a request without an answer is asked again, at first."""
BATCH = 256
"""Items of one batch request: larger ones would keep the client waiting while the server works, and the other way."""
MAX_BYTES = 4_000_000
"""Characters of one batch request, unless a single item has more."""
SPLIT = 16
"""Batches that a batch without an answer is asked again in."""
CLOSE_S = 0.1
"""Seconds that sessions to be closed wait for more of them."""

T = TypeVar("T")


class Kind(NamedTuple):
    """A kind of call: where its batches go, and under which name."""

    path: str
    items: str


CREATE = Kind("/v1/sessions/batch", "sessions")
STEP = Kind("/v1/steps", "steps")
DESCRIBE = Kind("/v1/envs", "")
"""Its item is ``{"env": id}``; not for lanes."""


class Ask(NamedTuple):
    """One attempt."""

    server: Server
    kind: Kind
    item: dict[str, Any]
    patience_s: float


class Pause(NamedTuple):
    """Nothing, until `time.monotonic` is `until`."""

    until: float


@dataclass(frozen=True)
class Settings:
    """What all calls of one environment have in common."""

    retry_s: float = 30.0
    timeout_s: float = 60.0
    token: str | None = field(default=None, repr=False)

    @cached_property
    def headers(self) -> dict[str, str]:
        """HTTP headers of every request."""
        bearer = {"authorization": f"Bearer {self.token}"} if self.token else {}
        return {"content-type": "application/json", "accept": "application/json", **bearer}


Call = Generator[Ask | Pause, Any, T]


def anywhere(
    kind: Kind, servers: Sequence[Server], item: dict[str, Any], settings: Settings
) -> Call[tuple[Server, Any]]:
    """Makes a call at one of `servers`, at another where one fails. Returns the server and its answer.

    The server's count of live sessions is one higher afterwards.

    Raises:
        RemoteError: refused, or failed for longer than the settings allow.
    """
    budget, patience = Budget(settings.retry_s, settings.timeout_s), PATIENCE_S
    while True:
        server = choose(servers)
        server.count(+1)
        try:
            answer = yield Ask(server, kind, item, patience)
        except NoAnswer as error:
            server.count(-1)
            patience *= 2
            _in_time(budget, error)
        except RemoteError as error:
            server.count(-1)
            if not error.elsewhere:
                raise
            budget.spend(error)
            if not any(other.up for other in servers):
                yield Pause(error.retry_at)
        except GeneratorExit:
            server.count(-1)
            raise
        else:
            return server, answer


def step(server: Server, servers: Sequence[Server], item: dict[str, Any], settings: Settings) -> Call[Any]:
    """Plays one step of a session at `server`. Returns its answer.

    Raises:
        RemoteError: refused, or failed for longer than the settings allow.
    """
    if len(item["action"]) > MAX_ACTION:  # in a batch it would make the whole request a bad one
        raise TooLarge(f"{server.url}: an action of {len(item['action']):,} characters; at most {MAX_ACTION:,}")
    budget, patience = Budget(settings.retry_s, settings.timeout_s), PATIENCE_S
    while True:
        try:
            return (yield Ask(server, STEP, item, patience))
        except NoAnswer as error:
            patience *= 2
            _in_time(budget, error)
        except RemoteError as error:
            if not error.passing:
                raise
            gone = isinstance(error, Unreachable) and error.status is None
            others = any(other.up for other in servers if other is not server)
            budget.spend(error, FAILOVER_S if gone and others else None)
            yield Pause(error.retry_at)


def _in_time(budget: Budget, error: RemoteError) -> None:
    if budget.left_s <= 0:
        raise TooLate(f"{error} within {budget.timeout_s:g} s")


def drive(call: Call[T], client: Client) -> T:
    """Runs a call here and now; blocks."""
    action = next(call)
    try:
        while True:
            if isinstance(action, Pause):
                time.sleep(max(action.until - monotonic(), 0))
                action = next(call)
                continue
            try:
                answer = client.ask(action)
            except RemoteError as error:
                action = call.throw(error)
            else:
                action = call.send(answer)
    except StopIteration as stop:
        value: T = stop.value
        return value
    finally:
        call.close()


async def adrive(call: Call[T], lanes: Lanes) -> T:
    """Runs a call on the event loop."""
    action = next(call)
    try:
        while True:
            if isinstance(action, Pause):
                await asyncio.sleep(max(action.until - monotonic(), 0))
                action = next(call)
                continue
            lane = lanes.of(action.server)
            answering = lane.submit(action.kind, action.item, action.patience_s)
            try:
                answer = await answering
            except asyncio.CancelledError:
                lane.withdraw(action.kind, answering)
                raise
            action = call.throw(answer.again()) if isinstance(answer, RemoteError) else call.send(answer)
    except StopIteration as stop:
        value: T = stop.value
        return value
    finally:
        call.close()


def _results(url: str, answer: Any, count: int) -> list[Any]:
    """Returns the items of a batch's answer, errors as exceptions."""
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list) or len(results) != count:
        raise Unreachable(f"{url}: answered a batch of {count} outside the protocol")
    return [_result(url, result) for result in results]


def _result(url: str, result: Any) -> Any:
    if not isinstance(result, dict) or "error" not in result:
        return result
    try:
        return error_of(url, ErrorAnswer.model_validate(result).error)
    except ValueError:
        return Unreachable(f"{url}: answered with an error outside the protocol")


def _note(server: Server, errors: Sequence[RemoteError]) -> None:
    """Tells a server's record of errors inside one answer: once for all, so that they try again together."""
    if not errors:
        return
    worst = max(errors, key=lambda error: error.retry_after_s or 0.0)
    server.failed(worst)
    for error in errors:
        error.retry_at = worst.retry_at


class Client:
    """Requests that block. Keeps its connections; one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._transports: dict[Server, Transport] = {}

    def ask(self, action: Ask) -> Any:
        """Makes one attempt. Returns the answer, as JSON holds it.

        Raises:
            RemoteError: there is none, or it is an error.
        """
        server, kind, item, patience_s = action
        if kind is DESCRIBE:
            return self.request(server, "GET", f"/v1/envs/{quote(item['env'], safe='')}", None, patience_s)
        if kind is CREATE:
            return self.request(server, "POST", "/v1/sessions", item, patience_s)
        body = {"step": item["step"], "action": item["action"]}
        return self.request(server, "POST", f"/v1/sessions/{item['session']}/step", body, patience_s)

    def request(self, server: Server, method: str, path: str, message: Any, patience_s: float) -> Any:
        """Makes one request. Returns the answer, as JSON holds it.

        Raises:
            RemoteError: there is none, or it is an error.
        """
        if server not in self._transports:
            self._transports[server] = transport(server.url, self._settings.headers)
        body = b"" if message is None else encode(message).encode()
        try:
            reply = self._transports[server].request(method, path, body, patience_s)
        except RemoteError as error:
            raise _noted(server, error) from error.__cause__
        return _read(server, reply)

    def close(self) -> None:
        """Closes the connections."""
        while self._transports:
            self._transports.popitem()[1].close()


def _read(server: Server, reply: Reply) -> Any:
    """Returns the JSON of an answer. Raises `RemoteError`: it is an error, or no JSON."""
    try:
        body = decode(reply.body)
    except (ValueError, RecursionError):
        body = None
    if reply.status == 200 and body is not None:
        server.answered()
        return body
    if reply.status == 200:
        raise _noted(server, Unreachable(f"{server.url}: answered outside the protocol: no JSON", status=200))
    raise _noted(server, error_of_answer(server.url, reply.status, reply.headers, body))


def _noted(server: Server, error: RemoteError) -> RemoteError:
    if error.elsewhere and not isinstance(error, NoAnswer):
        server.failed(error)
    return error


@dataclass(slots=True, eq=False)
class _Item:
    body: str
    answer: asyncio.Future[Any]
    patience_s: float


class Lane:
    """Requests to one server from one event loop: what becomes ready in the same tick travels in one request."""

    def __init__(self, server: Server, settings: Settings) -> None:
        self._server = server
        self._transport = async_transport(server.url, settings.headers)
        self._queues: dict[Kind, list[_Item]] = {CREATE: [], STEP: []}
        self._scheduled = False
        self._closing: list[str] = []
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: dict[Kind | None, set[asyncio.Task[None]]] = {CREATE: set(), STEP: set(), None: set()}

    def submit(self, kind: Kind, item: dict[str, Any], patience_s: float) -> asyncio.Future[Any]:
        """Queues a call; the future gets its answer, as JSON holds it, or a `RemoteError` (as its result)."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._queues[kind].append(_Item(encode(item), answer, patience_s))
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._flush)
        return answer

    def close_session(self, session: str) -> None:
        """Closes a session at the server soon, together with others."""
        self._closing.append(session)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(CLOSE_S, self._flush_closing)

    async def aclose(self, patience_s: float) -> None:
        """Ends all requests and closes all sessions that were given to `close_session`."""
        for task in self._tasks[STEP]:
            task.cancel()
        if self._tasks[CREATE]:  # sessions that nobody waits for any more can be closed once they are known
            await asyncio.wait(self._tasks[CREATE], timeout=patience_s)
        if self._timer is not None:
            self._timer.cancel()
            self._flush_closing()
        if self._tasks[None]:
            await asyncio.wait(self._tasks[None], timeout=patience_s)
        left = set.union(*self._tasks.values())
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._transport.aclose()

    def _flush(self) -> None:
        self._scheduled = False
        for kind, queue in self._queues.items():
            items, self._queues[kind] = queue, []
            batch: list[_Item] = []
            size = 0
            for item in items:
                if batch and (len(batch) == BATCH or size + len(item.body) > MAX_BYTES):
                    self._spawn(kind, batch)
                    batch, size = [], 0
                batch.append(item)
                size += len(item.body)
            self._spawn(kind, batch)

    def _spawn(self, kind: Kind, batch: list[_Item]) -> None:
        batch = [item for item in batch if not item.answer.done()]
        if batch:
            self._keep(kind, asyncio.get_running_loop().create_task(self._send(kind, batch)))

    def _keep(self, kind: Kind | None, task: asyncio.Task[None]) -> None:
        self._tasks[kind].add(task)
        task.add_done_callback(self._tasks[kind].discard)

    async def _send(self, kind: Kind, batch: list[_Item]) -> None:
        patience_s = max(item.patience_s for item in batch)
        body = f'{{"{kind.items}":[{",".join(item.body for item in batch)}]}}'
        answers: Sequence[Any]
        try:
            answers = _results(self._server.url, await self._post(kind.path, body, patience_s), len(batch))
            _note(self._server, [a for a in answers if isinstance(a, RemoteError) and a.elsewhere])
        except RemoteError as error:
            if len(batch) > 1 and isinstance(error, NoAnswer | TooLarge | InvalidRequest):
                # Whose doing it is shows in smaller batches.
                self._split(kind, batch, 2 * patience_s if isinstance(error, NoAnswer) else patience_s)
                return
            answers = [error] * len(batch)
        left = []
        for item, answer in zip(batch, answers, strict=True):
            if item.answer.done():
                self._orphan(kind, answer)
            elif isinstance(answer, TooLarge) and len(batch) > 1:
                left.append(item)  # all answers together are too large: asked for again, the server repeats it
            else:
                item.answer.set_result(answer)
        if left:
            self._split(kind, left, patience_s)

    def withdraw(self, kind: Kind, answer: asyncio.Future[Any]) -> None:
        """Nobody waits for `answer` any more (it may have come just before)."""
        if answer.done() and not answer.cancelled():
            self._orphan(kind, answer.result())

    def _orphan(self, kind: Kind, answer: Any) -> None:
        """Closes a session that was made for an episode that was given up in the meantime."""
        if kind is CREATE and isinstance(answer, dict) and isinstance(answer.get("session"), str):
            self.close_session(answer["session"])

    def _split(self, kind: Kind, batch: list[_Item], patience_s: float) -> None:
        for item in batch:
            item.patience_s = patience_s
        size = -(-len(batch) // SPLIT)
        for start in range(0, len(batch), size):
            self._spawn(kind, batch[start : start + size])

    def _flush_closing(self) -> None:
        self._timer = None
        sessions, self._closing = self._closing, []
        for start in range(0, len(sessions), MAX_BATCH):
            chunk = sessions[start : start + MAX_BATCH]
            self._keep(None, asyncio.get_running_loop().create_task(self._close_sessions(chunk)))

    async def _close_sessions(self, sessions: list[str]) -> None:
        """Tries for a while; what is left over then the server reaps by itself."""
        for _ in range(8):
            try:
                await self._post("/v1/close", encode({"sessions": sessions}), PATIENCE_S)
                return
            except RemoteError as error:
                if not error.elsewhere:
                    return
                await asyncio.sleep(max(error.retry_at - monotonic(), 0))

    async def _post(self, path: str, body: str, patience_s: float) -> Any:
        """Makes one attempt. Raises `RemoteError`."""
        try:
            reply = await self._transport.request("POST", path, body.encode(), patience_s)
        except RemoteError as error:
            raise _noted(self._server, error) from error.__cause__
        return _read(self._server, reply)


class Lanes:
    """The lanes of one event loop, one for each server."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lanes: dict[str, Lane] = {}

    def of(self, server: Server) -> Lane:
        """Returns the lane to `server`."""
        if server.url not in self._lanes:
            self._lanes[server.url] = Lane(server, self._settings)
        return self._lanes[server.url]

    async def aclose(self, patience_s: float = 5.0) -> None:
        """Closes given-up sessions and all connections."""
        await asyncio.gather(*(lane.aclose(patience_s) for lane in self._lanes.values()))
