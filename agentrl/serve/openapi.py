"""The routes, and what the OpenAPI page says of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from agentrl.remote.protocol import (
    STATUS,
    CloseBatch,
    Closed,
    Code,
    CreateBatch,
    Created,
    CreatedBatch,
    CreateRequest,
    EnvSpec,
    ErrorAnswer,
    Health,
    StepBatch,
    Stepped,
    SteppedBatch,
    StepRequest,
)

REF = "#/components/schemas/{model}"

_ALWAYS = (Code.UNAUTHORIZED, Code.FORBIDDEN, Code.RATE)
_BODY = (Code.INVALID, Code.TOO_LARGE)
_PLAYED = (Code.ENVIRONMENT, Code.DEADLINE, Code.STOPPING)


class Route(NamedTuple):
    """One route of the wire format; `handler` is the name of a method of `Api`."""

    method: str
    path: str
    handler: str
    summary: str
    request: type[BaseModel] | None
    response: Any
    codes: tuple[Code, ...]


ROUTES = (
    Route("POST", "/v1/sessions", "create", "Make an environment and reset it", CreateRequest, Created,
          (*_ALWAYS, *_BODY, *_PLAYED, Code.UNKNOWN_ENV, Code.CAPACITY)),
    Route("POST", "/v1/sessions/batch", "create_batch", "Make and reset many", CreateBatch, CreatedBatch,
          (*_ALWAYS, *_BODY)),
    Route("POST", "/v1/sessions/{session}/step", "step", "Play one step", StepRequest, Stepped,
          (*_ALWAYS, *_BODY, *_PLAYED, Code.UNKNOWN_SESSION, Code.FINISHED, Code.WRONG_STEP, Code.BUSY)),
    Route("POST", "/v1/steps", "steps", "Play a step of each of many sessions", StepBatch, SteppedBatch,
          (*_ALWAYS, *_BODY)),
    Route("DELETE", "/v1/sessions/{session}", "close", "Close a session", None, Closed, _ALWAYS),
    Route("POST", "/v1/close", "close_batch", "Close many sessions", CloseBatch, Closed, (*_ALWAYS, *_BODY)),
    Route("GET", "/v1/envs", "envs", "What is served", None, list[EnvSpec], _ALWAYS),
    Route("GET", "/v1/envs/{env}", "env", "One environment", None, EnvSpec, (*_ALWAYS, Code.UNKNOWN_ENV)),
    Route("GET", "/health", "health", "Whether the server lives", None, Health, (Code.FORBIDDEN,)),
    Route("GET", "/ready", "ready", "Whether the server takes new sessions", None, Health,
          (Code.FORBIDDEN, Code.STOPPING)),
)  # fmt: skip


def describe(route: Route) -> dict[str, Any]:
    """Returns what FastAPI is told of a route, for the page only."""
    extra: dict[str, Any] = {}
    if route.request is not None:
        schema = {"$ref": REF.format(model=route.request.__name__)}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{" in route.path:
        name = route.path.partition("{")[2].partition("}")[0]
        extra["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}]
    codes: dict[int, list[str]] = {}
    for code in route.codes:
        codes.setdefault(STATUS[code], []).append(f"`{code.value}`")
    return {
        "tags": [_tag(route.path)],
        "summary": route.summary,
        "operation_id": route.handler,
        "response_model": route.response,
        "responses": {
            status: {"model": ErrorAnswer, "description": ", ".join(names)} for status, names in sorted(codes.items())
        },
        "openapi_extra": extra,
    }


def _tag(path: str) -> str:
    """Returns the heading that a route stands under."""
    if not path.startswith("/v1/"):
        return "server"
    return "environments" if path.startswith("/v1/envs") else "sessions"


def complete(schema: dict[str, Any], *, token: bool) -> dict[str, Any]:
    """Adds the request models and the token to FastAPI's schema. Returns it."""
    requests = [route.request for route in ROUTES if route.request is not None]
    _, models = models_json_schema([(model, "validation") for model in requests], ref_template=REF)
    parts = schema["components"]
    parts["schemas"] |= models["$defs"]
    parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    if token:
        schema["security"] = [{"token": []}]
    return schema
