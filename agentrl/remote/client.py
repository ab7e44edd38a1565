"""HTTP to environment servers: one attempt at a time (`Client`), and the calls that an episode makes of attempts,
pauses and servers (`anywhere`, `step`). Many episodes in one request are in `agentrl.remote.lanes`.

The calls are generators that yield what is to be done (`Ask`, `Pause`) and get back its answer or its error, so that
the rules stand here once: `drive` runs them where threads may block, `adrive` on an event loop.

Every retry is safe (`agentrl.remote.protocol`). A request without an answer is asked again with more patience, and a
batch in smaller ones: a step that hangs holds up nobody else for long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote

from agentrl.remote.codec import decode, encode
from agentrl.remote.errors import (
    NoAnswer,
    RemoteError,
    TooLate,
    Unreachable,
    error_of_answer,
)
from agentrl.remote.servers import FAILOVER_S, Budget, Server, choose
from agentrl.remote.transport import Reply, Transport, transport

if TYPE_CHECKING:
    from agentrl.remote.lanes import Lanes

PATIENCE_S = 2.0
"""Seconds until a request without an answer is asked again, at first."""
MOST_PATIENCE_S = 8.0
"""And at most: a server answers a step under way to whoever asks again, so that more waiting would gain nothing, and
lost answers would use up an episode's time in a few long waits."""
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
        asked = monotonic()
        try:
            answer = yield Ask(server, kind, item, patience)
        except NoAnswer as error:
            server.count(-1)
            patience = longer(patience)
            server.silent(asked)
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


def step(
    server: Server, servers: Sequence[Server], item: dict[str, Any], settings: Settings, started: float | None = None
) -> Call[Any]:
    """Plays one step of a session at `server`. Returns its answer.

    Args:
        server: that of the session.
        servers: all servers of the environment.
        item: session, step, action.
        settings: of the environment.
        started: `time.monotonic` of the first attempt; None is now.

    Raises:
        RemoteError: refused, or failed for longer than the settings allow.
    """
    budget, patience = Budget(settings.retry_s, settings.timeout_s, started), PATIENCE_S
    while True:
        try:
            return (yield Ask(server, STEP, item, patience))
        except NoAnswer as error:
            patience = longer(patience)
            _in_time(budget, error)
        except RemoteError as error:
            if not error.passing:
                raise
            gone = isinstance(error, Unreachable) and error.status is None
            others = any(other.up for other in servers if other is not server)
            budget.spend(error, FAILOVER_S if gone and others else None)
            yield Pause(error.retry_at)


def longer(patience_s: float) -> float:
    """Returns the seconds to wait for an answer after `patience_s` brought none."""
    return min(2 * patience_s, MOST_PATIENCE_S)


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


async def adrive(call: Call[T], lanes: Lanes, failed: RemoteError | None = None) -> T:
    """Runs a call on the event loop.

    Args:
        call: what to run.
        lanes: of the event loop.
        failed: what came of its first attempt, where that was made already.
    """
    action = next(call)
    try:
        if failed is not None:
            action = call.throw(failed.again())
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


async def astep(
    server: Server, servers: Sequence[Server], item: dict[str, Any], settings: Settings, lanes: Lanes
) -> Any:
    """Runs `step` on the event loop. Its first attempt, mostly the only one, goes without the generator: half the cost.

    Raises:
        RemoteError: as `step`.
    """
    started = monotonic()
    answer = await lanes.of(server).submit(STEP, item, PATIENCE_S)
    if isinstance(answer, RemoteError):
        return await adrive(step(server, servers, item, settings, started), lanes, failed=answer)
    return answer


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
            raise noted(server, error) from error.__cause__
        return read_reply(server, reply)

    def close(self) -> None:
        """Closes the connections."""
        while self._transports:
            self._transports.popitem()[1].close()


def read_reply(server: Server, reply: Reply) -> Any:
    """Returns the JSON of an answer. Raises `RemoteError`: it is an error, or no JSON."""
    try:
        body = decode(reply.body)
    except (ValueError, RecursionError):
        body = None
    if reply.status == 200 and body is not None:
        server.answered()
        return body
    if reply.status == 200:
        raise noted(server, Unreachable(f"{server.url}: answered outside the protocol: no JSON", status=200))
    raise noted(server, error_of_answer(server.url, reply.status, reply.headers, body))


def noted(server: Server, error: RemoteError) -> RemoteError:
    if error.elsewhere and not isinstance(error, NoAnswer):
        server.failed(error)
    return error
