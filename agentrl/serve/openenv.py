"""Our environments for OpenEnv's stock client: one WebSocket, one episode at a time.

    GenericEnvClient("http://localhost:8000/openenv/Sokoban-v0")

A connection is a seat at the same sessions that `agentrl.remote.protocol` plays: every message passes the gate and is
counted as a request, episodes have the same cap, deadlines and time to live. OpenEnv knows no step numbers, so that a
connection that is lost takes its episode with it, and one flag for the end, so that `truncated` is a field of the
observation.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import WebSocket, WebSocketDisconnect
from fastapi.responses import Response
from pydantic import Field, StringConstraints

from agentrl import __version__
from agentrl.remote.protocol import MAX_ACTION, Code, CreateRequest, Wire
from agentrl.serve.answers import Answer, Refused, checked, decode, encode
from agentrl.serve.catalogue import Entry
from agentrl.serve.security import OPENENV, Gate

if TYPE_CHECKING:
    from agentrl.serve.app import Api

log = logging.getLogger("agentrl.serve")

PATH = OPENENV + "{env:path}"
SOCKET = PATH + "/ws"

_CODES = {
    Code.INVALID: "VALIDATION_ERROR",
    Code.FORBIDDEN: "VALIDATION_ERROR",
    Code.CAPACITY: "CAPACITY_REACHED",
    Code.UNKNOWN_SESSION: "SESSION_ERROR",
}
"""OpenEnv's codes; all others are EXECUTION_ERROR."""


class Reset(Wire):
    """What a reset may say: OpenEnv's two parameters, and those of `CreateRequest`."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """None: the server draws one (`State.seed`)."""
    episode_id: Annotated[str, StringConstraints(max_length=255)] | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    max_turns: Annotated[int, Field(ge=1)] | None = None
    wrappers: list[dict[str, Any]] = Field(default_factory=list)
    options: dict[str, Any] = Field(default_factory=dict)


class Action(Wire):
    message: Annotated[str, StringConstraints(max_length=MAX_ACTION)]
    """The agent's text."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Every action of OpenEnv has it; not read."""


class Observation(Wire):
    text: str
    """What the agent reads; pictures in words."""
    instructions: str = ""
    """System prompt; after a reset only."""
    truncated: bool = False
    """Whether a limit ended the episode; `done` is true then too."""
    info: dict[str, Any] = Field(default_factory=dict)


class State(Wire):
    episode_id: str | None = None
    step_count: int = 0
    seed: int | None = None


class OpenEnv:
    """The routes; `GET` ones are told as those of `Api`."""

    def __init__(self, api: Api, gate: Gate) -> None:
        self._api, self._gate = api, gate
        self.told = {"schema": self._schema, "metadata": self._metadata, "health": self._health}

    async def socket(self, websocket: WebSocket) -> None:
        """Plays what one client asks for, until it leaves."""
        try:
            entry = self._api.catalogue.entry(websocket.path_params["env"])
        except Refused as refusal:
            self._api.metrics.errors[refusal.code] += 1
            await deny(websocket, refusal)
            return
        seat = Seat(self._api, self._gate, entry)
        try:
            with contextlib.suppress(WebSocketDisconnect):
                await websocket.accept()
                await websocket.close(*await self._play(websocket, seat))
        except Exception:
            log.exception("a WebSocket failed inside the server")
            self._api.metrics.requests["failed", 500] += 1
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                await websocket.close(1011)
        finally:
            seat.leave()

    async def _play(self, websocket: WebSocket, seat: Seat) -> tuple[int, str]:
        """Answers messages. Returns with which code and reason to close.

        Raises:
            WebSocketDisconnect: the client has gone.
        """
        idle_s = self._api.settings.session_ttl_s
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    message = await websocket.receive()
            except TimeoutError:
                return 1001, f"no message for {idle_s:g} s"
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message["code"])
            reply = await seat.reply(websocket, message.get("text"))
            if reply is None:
                seat.leave()
                return 1000, ""
            await websocket.send_text(reply.decode())
            await asyncio.sleep(0)  # a client that sends many messages at once must not hold the loop

    async def _schema(self, _: bytes, env_id: str) -> Answer:
        self._api.catalogue.entry(env_id)
        models: dict[str, type[Wire]] = {"action": Action, "observation": Observation, "state": State}
        return Answer(200, encode({name: model.model_json_schema() for name, model in models.items()}))

    async def _metadata(self, _: bytes, env_id: str) -> Answer:
        spec = self._api.catalogue.entry(env_id).spec
        told = {"name": spec.id, "description": spec.summary or spec.id, "readme_content": spec.instructions}
        return Answer(200, encode({**told, "version": __version__, "author": None, "documentation_url": None}))

    async def _health(self, _: bytes, env_id: str) -> Answer:
        self._api.catalogue.entry(env_id)
        await self._api.ready(b"", "")
        return Answer(200, encode({"status": "healthy"}))


class Seat:
    """One client: at most one session at a time."""

    def __init__(self, api: Api, gate: Gate, entry: Entry) -> None:
        self._api, self._gate, self._entry = api, gate, entry
        self._session = ""
        self._state = State()

    async def reply(self, websocket: WebSocket, text: str | None) -> bytes | None:
        """Returns the answer to one message; None for a goodbye."""
        metrics = self._api.metrics
        try:
            self._gate.admit(websocket.scope)
            message = decode((text or "").encode())
            kind = message.get("type") if isinstance(message, dict) else None
            if kind == "close":
                return None
            if kind == "reset":
                answer = await self._reset(message.get("data", {}))
            elif kind == "step":
                answer = await self._step(message.get("data"))
            elif kind == "state":
                answer = Answer(200, encode({"type": "state", "data": self._state.model_dump()}))
            else:
                raise Refused(Code.INVALID, f"type: {kind!a:.60} is none of reset, step, state, close", field="type")
        except Refused as refusal:
            metrics.errors[refusal.code] += 1
            answer = refusal.answer()
        metrics.requests[SOCKET, answer.status] += 1
        return answer.body if answer.status == 200 else _error(answer)

    def leave(self) -> None:
        """Closes the session."""
        if self._session:
            self._api.sessions.close([self._session])
            self._session = ""

    async def _reset(self, data: Any) -> Answer:
        wanted = checked(Reset, data)
        seed = secrets.randbelow(2**31) if wanted.seed is None else wanted.seed
        arguments = wanted.model_dump(exclude={"episode_id", "seed"})
        request = CreateRequest.model_construct(
            env=self._entry.env_id, seed=seed, request=secrets.token_hex(16), **arguments
        )
        self._api.catalogue.recipe(self._entry, request)  # what is refused here leaves the last episode as it was
        self.leave()
        self._state = State(episode_id=wanted.episode_id, seed=seed)
        answer = await self._api.sessions.create(request)
        if answer.status != 200:
            return answer
        made = json.loads(answer.body)
        self._session = made["session"]
        self._state.episode_id = wanted.episode_id or self._session
        return _observed(made, reward=None, done=False)

    async def _step(self, data: Any) -> Answer:
        action = data.get("message") if type(data) is dict and data.keys() <= {"message", "metadata"} else None
        if type(action) is not str or len(action) > MAX_ACTION:  # else it may hold half a surrogate pair
            action = checked(Action, data).message
        if not self._session:
            raise Refused(Code.UNKNOWN_SESSION, "no episode has begun: reset first")
        playing = self._api.sessions.step(self._session, self._state.step_count + 1, action)
        self._state.step_count += 1
        answer = playing if isinstance(playing, Answer) else await playing
        if answer.status != 200:
            return answer
        played = json.loads(answer.body)
        return _observed(played, reward=played["reward"], done=played["terminated"] or played["truncated"])


async def deny(websocket: WebSocket, refusal: Refused) -> None:
    """Answers a client that asks for a WebSocket with an HTTP error."""
    answer = refusal.answer()
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        await websocket.send_denial_response(Response(answer.body, answer.status, media_type="application/json"))
    else:
        await websocket.receive()
        await websocket.close(1008)


def _observed(played: dict[str, Any], *, reward: float | None, done: bool) -> Answer:
    """Returns what OpenEnv calls an observation, of a `Created` or `Stepped`."""
    shown = played["observation"]
    if not isinstance(shown, str):
        shown = "".join(part["text"] if part["type"] == "text" else part["alt"] for part in shown)
    observation = {
        "text": shown,
        "instructions": played.get("instructions", ""),
        "truncated": played.get("truncated", False),
        "info": played["info"],
    }
    data = {"observation": observation, "reward": reward, "done": done}
    return Answer(200, encode({"type": "observation", "data": data}))


def _error(answer: Answer) -> bytes:
    error = json.loads(answer.body)["error"]
    code = Code(error["code"])
    data = {"message": error["message"], "code": _CODES.get(code, "EXECUTION_ERROR"), "reason": code.value}
    return encode({"type": "error", "data": data})
