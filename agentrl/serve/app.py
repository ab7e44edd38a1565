"""The application: routes, the OpenAPI page, errors.

Every request passes the gate and is counted in `App.__call__`. Steps, single and in batches, are answered right there;
all else takes FastAPI's way, to the same handlers. Bodies are parsed by `agentrl.serve.answers`, not by FastAPI, whose
machinery costs more than a step; the schema is told from the models of the wire format all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import fastapi_offline
from fastapi import FastAPI, Request, WebSocket
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from agentrl import __version__
from agentrl.remote.protocol import CloseBatch, Closed, Code, CreateBatch, CreateRequest, Health
from agentrl.serve.answers import Answer, Refused, encode, parse, parse_step, parse_steps
from agentrl.serve.catalogue import Catalogue
from agentrl.serve.metrics import Metrics
from agentrl.serve.openapi import ROUTES, complete, describe
from agentrl.serve.openenv import PATH, SOCKET, OpenEnv, deny
from agentrl.serve.runner import Runner
from agentrl.serve.security import Gate, Receive, Scope
from agentrl.serve.sessions import RETRY_AFTER_S, Sessions
from agentrl.serve.settings import Settings

log = logging.getLogger("agentrl.serve")

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Handler = Callable[[bytes, str], Awaitable[Answer]]

SLICE_S = 0.01
"""Time that a batch may hold the event loop before others get a turn."""
_JSON = b"application/json"


class Api:
    """The handlers: body in, answer out."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.catalogue = Catalogue(settings)
        self.runner = Runner(self.catalogue, settings, clock)
        self.sessions = Sessions(self.catalogue, self.runner, settings, self.metrics, clock)
        self.metrics.gauges |= {
            "sessions": ("Episodes under way.", lambda: self.sessions.active),
            "sessions_kept": ("Sessions in memory, ended ones included.", lambda: self.sessions.kept),
            "environments_free": ("Environments that wait for an episode.", lambda: self.runner.free),
            "stuck_calls": ("Calls given up that have not come back.", lambda: self.runner.stuck),
        }

    async def create(self, body: bytes, _: str) -> Answer:
        """Makes a session."""
        return await self.sessions.create(parse(CreateRequest, body))

    async def create_batch(self, body: bytes, _: str) -> Answer:
        """Makes many sessions at once."""
        requests = parse(CreateBatch, body).sessions
        tasks = [asyncio.ensure_future(self._item(self.sessions.create(request))) for request in requests]
        return self._batch([await task for task in tasks])

    async def step(self, body: bytes, session: str) -> Answer:
        """Plays one step."""
        step, action = parse_step(body)
        answer = self.sessions.step(session, step, action)
        return answer if isinstance(answer, Answer) else await answer

    async def steps(self, body: bytes, _: str) -> Answer:
        """Plays a step of each of many sessions; the slow ones run side by side."""
        items = parse_steps(body)
        seen: set[str] = set()
        answers: list[Answer | Awaitable[Answer]] = []
        sliced = perf_counter()
        for number, item in enumerate(items):
            session = item["session"]
            try:
                if session in seen:
                    field = f"steps.{number}.session"
                    raise Refused(Code.INVALID, f"session {session!r} stands twice in one batch", field=field)
                seen.add(session)
                answers.append(self.sessions.step(session, item["step"], item["action"]))
            except Refused as refusal:
                self.metrics.errors[refusal.code] += 1
                answers.append(refusal.answer())
            if perf_counter() - sliced > SLICE_S:
                await asyncio.sleep(0)
                sliced = perf_counter()
        try:
            return self._batch([each if isinstance(each, Answer) else await self._item(each) for each in answers])
        finally:  # a client that left meanwhile: nobody waits for the rest
            for each in answers:
                if asyncio.iscoroutine(each):
                    each.close()

    async def close(self, _: bytes, session: str) -> Answer:
        """Closes a session."""
        return Answer(200, encode(Closed(closed=self.sessions.close([session])).model_dump()))

    async def close_batch(self, body: bytes, _: str) -> Answer:
        """Closes many sessions."""
        return Answer(200, encode(Closed(closed=self.sessions.close(parse(CloseBatch, body).sessions)).model_dump()))

    async def envs(self, _: bytes, __: str) -> Answer:
        """Tells of all environments."""
        return Answer(200, encode([entry.spec.model_dump() for entry in self.catalogue.entries.values()]))

    async def env(self, _: bytes, env_id: str) -> Answer:
        """Tells of one environment."""
        return Answer(200, encode(self.catalogue.entry(env_id).spec.model_dump()))

    async def health(self, _: bytes, __: str) -> Answer:
        """Says that the server lives."""
        health = Health(
            status="stopping" if self.sessions.stopping else "ok",
            version=__version__,
            sessions=self.sessions.active,
            envs=[*self.catalogue.entries],
        )
        return Answer(200, encode(health.model_dump()))

    async def ready(self, body: bytes, path: str) -> Answer:
        """Says that the server takes new sessions."""
        if self.sessions.stopping:
            raise Refused(Code.STOPPING, "the server is stopping", retry_after_s=RETRY_AFTER_S)
        return await self.health(body, path)

    async def _item(self, answer: Awaitable[Answer]) -> Answer:
        """Returns the answer to an item of a batch, an error as such."""
        try:
            return await answer
        except Refused as refusal:
            self.metrics.errors[refusal.code] += 1
            return refusal.answer()

    def _batch(self, answers: Iterable[Answer]) -> Answer:
        """Joins answers; what would make the batch too large is recorded and left to a request of its own."""
        bodies, left = [], self.settings.max_response
        for answer in answers:
            body = answer.body
            left -= len(body) + 1
            if left < 0:
                message = "the answers of this batch are too large together; ask for this item again, by itself"
                body = Refused(Code.TOO_LARGE, message).answer().body
            bodies.append(body)
        return Answer(200, b'{"results":[' + b",".join(bodies) + b"]}")


class App(FastAPI):
    """The ASGI application; `api` has its parts."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self.gate = Gate(settings, clock)
        self.api = Api(settings, clock)
        super().__init__(
            title="agentrl environments", version=__version__, docs_url=None, redoc_url=None, lifespan=_lifespan
        )
        for route in ROUTES:
            path = route.path.replace("{env}", "{env:path}")  # ids of Gymnasium may hold a slash
            handler = getattr(self.api, route.handler)
            self.add_api_route(path, self._endpoint(route.path, handler), methods=[route.method], **describe(route))
        openenv = OpenEnv(self.api, self.gate)
        for name, handler in openenv.told.items():
            path = f"{PATH}/{name}"
            self.add_api_route(path, self._endpoint(path, handler), methods=["GET"], include_in_schema=False)
        self.add_api_websocket_route(SOCKET, openenv.socket)
        self.add_api_route("/metrics", self._metrics, include_in_schema=False)
        self.add_api_route("/docs", self._docs, include_in_schema=False)
        static = Path(fastapi_offline.__file__).parent / "static"
        self.mount("/docs", StaticFiles(directory=static))
        self.add_exception_handler(HTTPException, self._http_error)
        self.add_exception_handler(Exception, self._fault)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, send)
        elif scope["type"] == "websocket":
            try:
                self.gate.admit(scope)
            except Refused as refusal:
                self.api.metrics.errors[refusal.code] += 1
                self._count("refused", refusal.answer())
                await deny(WebSocket(scope, receive, send), refusal)
            else:
                await super().__call__(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        try:
            self.gate.admit(scope)
            body = await self.gate.body(receive) if scope["method"] == "POST" else b""
            if scope["method"] == "POST" and path == "/v1/steps":
                answer = await self.api.steps(body, "")
            elif scope["method"] == "POST" and path[:13] == "/v1/sessions/" and path[-5:] == "/step":
                path = "/v1/sessions/{session}/step"
                answer = await self.api.step(body, scope["path"][13:-5])
            else:
                scope["agentrl.body"] = body
                await self._delegate(scope, receive, send)
                return
            self._count(path, answer)
        except Refused as refusal:
            self.api.metrics.errors[refusal.code] += 1
            answer = refusal.answer()
            self._count("refused", answer)
        except Exception as error:
            answer = self._internal_error(error)
        send = _until_gone(send)
        await send({"type": "http.response.start", "status": answer.status, "headers": _headers(answer)})
        await send({"type": "http.response.body", "body": answer.body})

    async def _delegate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets FastAPI answer. Where it fails, its exception handler has answered already."""
        with contextlib.suppress(Exception):
            await super().__call__(scope, receive, _until_gone(send))

    async def _fault(self, _: Request, error: Exception) -> Response:
        return _response(self._internal_error(error))

    async def _http_error(self, request: Request, error: Exception) -> Response:
        """What Starlette refuses by itself: no such path, another method."""
        assert isinstance(error, HTTPException)
        code = Code.METHOD if error.status_code == 405 else Code.NOT_FOUND
        answer = Refused(code, f"no {request.method} {request.url.path!a:.100}; see /docs").answer()
        self.api.metrics.errors[code] += 1
        self._count("refused", answer)
        response = _response(answer)
        response.headers.update(error.headers or {})
        return response

    def _internal_error(self, error: Exception) -> Answer:
        """A fault of the server itself: the log has it, the client learns nothing of it."""
        log.error("a request failed inside the server", exc_info=error)
        answer = Refused(Code.ENVIRONMENT, "internal error of the server; its log says more").answer()
        self._count("failed", answer)
        return answer

    def _endpoint(self, path: str, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            named = next(iter(request.path_params.values()), "")
            try:
                answer = await handler(request.scope.get("agentrl.body", b""), named)
            except Refused as refusal:
                self.api.metrics.errors[refusal.code] += 1
                answer = refusal.answer()
            self._count(path, answer)
            return _response(answer)

        return endpoint

    def _count(self, route: str, answer: Answer) -> None:
        self.api.metrics.requests[route, answer.status] += 1

    def openapi(self) -> dict[str, Any]:
        """Returns the OpenAPI schema, with the request models."""
        if self.openapi_schema is None:
            complete(super().openapi(), token=bool(self.api.settings.tokens))
        assert self.openapi_schema is not None
        return self.openapi_schema

    async def _metrics(self) -> Response:
        return Response(self.api.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _docs(self) -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=self.title,
            swagger_js_url="/docs/swagger-ui-bundle.js",
            swagger_css_url="/docs/swagger-ui.css",
            swagger_favicon_url="/docs/favicon.png",
        )


def create_app(settings: Settings, clock: Callable[[], float] = monotonic) -> App:
    """Returns the application that serves `settings.envs`.

    Args:
        settings: what to serve, and how.
        clock: seconds, for times to live and rates.

    Raises:
        UserError: an environment that cannot be served, or a server open to others without a token.
    """
    return App(settings, clock)


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    assert isinstance(app, App)
    sessions, every_s = app.api.sessions, min(app.api.settings.session_ttl_s / 4, 5.0)

    async def sweep() -> None:
        while True:
            await asyncio.sleep(every_s)
            sessions.sweep()

    sweeper = asyncio.create_task(sweep())
    try:
        yield
    finally:
        sweeper.cancel()
        await sessions.stop()


def _headers(answer: Answer) -> list[tuple[bytes, bytes]]:
    headers = [(b"content-type", _JSON), (b"content-length", str(len(answer.body)).encode())]
    if answer.retry_after_s is not None:
        headers.append((b"retry-after", str(math.ceil(answer.retry_after_s)).encode()))
    if answer.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def _response(answer: Answer) -> Response:
    return Response(answer.body, answer.status, {name.decode(): value.decode() for name, value in _headers(answer)})


def _until_gone(send: Send) -> Send:
    """Returns `send` that does nothing once the client has gone: its transport raises then."""
    gone = False

    async def guarded(message: MutableMapping[str, Any]) -> None:
        nonlocal gone
        if gone:
            return
        try:
            await send(message)
        except (OSError, RuntimeError) as error:
            gone = True
            log.debug("a client went away before its answer: %s", error)

    return guarded
