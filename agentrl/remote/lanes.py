"""Many episodes in one request: what becomes ready in the same tick of an event loop travels together.

With no steps under way, many of them leave as two halves: while the server works at the second, the first is read and
its episodes go on, so that from then on both sides work at the same time. Where the episodes wait for one another, as
they do for a policy that acts on all of them at once, a tick travels whole instead: halves would gain nothing, and who
acts with whom would depend on timing.

A batch without an answer is asked for again in smaller ones, with more patience: a step that hangs holds up nobody
else for long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from agentrl.remote import client
from agentrl.remote.client import CREATE, STEP, Kind, Settings, noted, read_reply
from agentrl.remote.codec import encode, encode_step
from agentrl.remote.errors import InvalidRequest, NoAnswer, RemoteError, TooLarge, Unreachable, error_of
from agentrl.remote.protocol import MAX_BATCH, ErrorAnswer
from agentrl.remote.servers import Server
from agentrl.remote.transport import async_transport

BATCH = 256
"""Items of one batch request: larger ones would keep the client waiting while the server works, and the other way."""
HALF = 16
"""Steps that are worth a request of their own, while the other half is under way."""
MAX_BYTES = 4_000_000
"""Characters of one batch request, unless a single item has more."""
SPLIT = 16
"""Batches that a batch without an answer is asked again in."""
CLOSE_S = 0.1
"""Seconds that sessions to be closed wait for more of them."""


@dataclass(slots=True, eq=False)
class _Item:
    body: str
    answer: asyncio.Future[Any]
    patience_s: float


class Lane:
    """Requests to one server from one event loop.

    Args:
        server: where they go.
        settings: of the environment.
        whole: what becomes ready in the same tick travels in one request, as far as one holds it.
    """

    def __init__(self, server: Server, settings: Settings, whole: bool) -> None:
        self._server, self._whole = server, whole
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
        body = encode_step(item) if kind is STEP else encode(item)
        self._queues[kind].append(_Item(body, answer, patience_s))
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
        for kind, items in self._queues.items():
            if items:
                self._queues[kind] = []
                for batch in _batches(items, self._most(kind, len(items))):
                    self._spawn(kind, batch)

    def _most(self, kind: Kind, ready: int) -> int:
        """Returns how many of the `ready` items travel in one request."""
        if self._whole:
            return MAX_BATCH
        if kind is STEP and ready >= 2 * HALF and not self._tasks[STEP]:
            return min(BATCH, -(-ready // 2))
        return BATCH

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
            answers = _results(self._server, await self._post(kind.path, body, patience_s), len(batch))
        except RemoteError as error:
            if len(batch) > 1 and isinstance(error, NoAnswer | TooLarge | InvalidRequest):
                # Whose doing it is shows in smaller batches.
                self._split(kind, batch, client.longer(patience_s) if isinstance(error, NoAnswer) else patience_s)
                return
            answers = [error] * len(batch)
        left = []
        for item, answer in zip(batch, answers, strict=True):
            if item.answer.done():
                self._orphan(kind, answer)
            elif type(answer) is TooLarge and len(batch) > 1:
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
                await self._post("/v1/close", encode({"sessions": sessions}), client.PATIENCE_S)
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
            raise noted(self._server, error) from error.__cause__
        return read_reply(self._server, reply)


class Lanes:
    """The lanes of one event loop, one for each server. Arguments as those of `Lane`."""

    def __init__(self, settings: Settings, whole: bool = False) -> None:
        self._settings, self._whole = settings, whole
        self._lanes: dict[str, Lane] = {}

    def of(self, server: Server) -> Lane:
        """Returns the lane to `server`."""
        if server.url not in self._lanes:
            self._lanes[server.url] = Lane(server, self._settings, self._whole)
        return self._lanes[server.url]

    async def aclose(self, patience_s: float = 5.0) -> None:
        """Closes given-up sessions and all connections."""
        await asyncio.gather(*(lane.aclose(patience_s) for lane in self._lanes.values()))


def _batches(items: list[_Item], most: int) -> Iterator[list[_Item]]:
    """Yields `items` in batches of at most `most`."""
    batch: list[_Item] = []
    size = 0
    for item in items:
        if batch and (len(batch) == most or size + len(item.body) > MAX_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += len(item.body)
    yield batch


def _results(server: Server, answer: Any, count: int) -> list[Any]:
    """Returns the items of a batch's answer, errors as exceptions, and tells the server's record of those."""
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list) or len(results) != count:
        raise Unreachable(f"{server.url}: answered a batch of {count} outside the protocol")
    bad = [number for number, result in enumerate(results) if not isinstance(result, dict) or "error" in result]
    for number in bad:
        results[number] = _result(server.url, results[number])
    _note(server, [error for number in bad if isinstance(error := results[number], RemoteError) and error.elsewhere])
    return results


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
