"""The wire format of environments over HTTP, version 1: what server and client both import.

    POST   /v1/sessions               CreateRequest   -> Created        make + reset
    POST   /v1/sessions/batch         CreateBatch     -> CreatedBatch   many at once
    POST   /v1/sessions/{id}/step     StepRequest     -> Stepped
    POST   /v1/steps                  StepBatch       -> SteppedBatch   many sessions in one request
    DELETE /v1/sessions/{id}                          -> Closed
    POST   /v1/close                  CloseBatch      -> Closed
    GET    /v1/envs                                   -> list[EnvSpec]
    GET    /v1/envs/{env}                             -> EnvSpec
    GET    /health  /ready  /metrics                  no token needed

Every retry is safe. A create carries the client's own `request` key: the same key returns the same session. A step
carries its number (1 is the first after reset): the number last played returns the recorded answer, any other but the
next is refused. Errors are `ErrorBody`, with the HTTP status of `STATUS`; inside a batch each item has its own.

Observations are text, or parts (`agentrl.types.Content`); the pixels of a picture travel as base64 PNG in
`WireImage.png`, each once per answer. `info` holds the JSON-compatible part (`agentrl.rollout.values.jsonable`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

VERSION = 1
MAX_BATCH = 4096
"""Items of one batch request."""
MAX_ACTION = 1_000_000
"""Characters of one action."""

Key = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""A session's id, or a create request's."""


class Wire(BaseModel):
    """Base of all messages: unknown fields refused, NaN and infinity in rewards kept as JSON constants."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")


class Code(StrEnum):
    """What went wrong. Clients act on the code; the message is for people."""

    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    UNKNOWN_ENV = "unknown_env"
    UNKNOWN_SESSION = "unknown_session"
    FINISHED = "finished"
    WRONG_STEP = "wrong_step"
    BUSY = "busy"
    TOO_LARGE = "too_large"
    INVALID = "invalid"
    CAPACITY = "capacity"
    RATE = "rate"
    ENVIRONMENT = "environment_error"
    DEADLINE = "deadline"
    STOPPING = "stopping"
    NOT_FOUND = "not_found"
    METHOD = "method_not_allowed"


STATUS: dict[Code, int] = {
    Code.UNAUTHORIZED: 401,
    Code.FORBIDDEN: 403,
    Code.UNKNOWN_ENV: 404,
    Code.UNKNOWN_SESSION: 404,
    Code.NOT_FOUND: 404,
    Code.METHOD: 405,
    Code.FINISHED: 409,
    Code.WRONG_STEP: 409,
    Code.BUSY: 409,
    Code.TOO_LARGE: 413,
    Code.INVALID: 422,
    Code.CAPACITY: 429,
    Code.RATE: 429,
    Code.ENVIRONMENT: 500,
    Code.STOPPING: 503,
    Code.DEADLINE: 504,
}


class ErrorBody(Wire):
    """One error."""

    code: Code
    message: str
    field: str | None = None
    """The field that is wrong, with dots between levels (`invalid`)."""
    retry_after_s: float | None = None
    """Seconds after which a retry may succeed (`capacity`, `rate`, `stopping`); also the header ``Retry-After``."""


class ErrorAnswer(Wire):
    """Body of every answer with a status of 400 or above."""

    error: ErrorBody


class WireText(Wire):
    type: Literal["text"] = "text"
    text: str


class WireImage(Wire):
    type: Literal["image"] = "image"
    path: str
    """Name of the picture: a hash of its pixels."""
    alt: str = ""
    png: str | None = None
    """Base64 of the PNG file; None where the same answer holds it already."""


Observation = str | list[WireText | WireImage]


class CreateRequest(Wire):
    """Makes an environment and resets it with `seed`."""

    env: str
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the environment, as in `agentrl.make`. Those that name files or commands on the server
    (`TextEnv.local_arguments`) are refused: the server's owner sets them."""
    max_turns: Annotated[int, Field(ge=1)] | None = None
    wrappers: list[dict[str, Any]] = Field(default_factory=list)
    """Wrappers by registered name (no ``module:Class``: that would run code of the client's choice)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of `reset`."""
    request: Key
    """Chosen by the client, unique to this episode: a retry with the same key returns the same session."""


class Created(Wire):
    session: Key
    observation: Observation
    info: dict[str, Any]
    instructions: str
    """System prompt."""


class StepRequest(Wire):
    step: Annotated[int, Field(ge=1)]
    action: Annotated[str, StringConstraints(max_length=MAX_ACTION)]


class Stepped(Wire):
    step: int
    observation: Observation
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class CreateBatch(Wire):
    sessions: Annotated[list[CreateRequest], Field(max_length=MAX_BATCH)]


class CreatedBatch(Wire):
    results: list[Created | ErrorAnswer]
    """One for each request, in order."""


class SessionStep(StepRequest):
    session: Key


class StepBatch(Wire):
    steps: Annotated[list[SessionStep], Field(max_length=MAX_BATCH)]
    """At most one step of each session."""


class SteppedBatch(Wire):
    results: list[Stepped | ErrorAnswer]
    """One for each step, in order."""


class CloseBatch(Wire):
    sessions: Annotated[list[Key], Field(max_length=MAX_BATCH)]


class Closed(Wire):
    closed: int
    """Sessions that were open."""


class EnvSpec(Wire):
    """What an environment is, for clients."""

    protocol: int = VERSION
    id: str
    summary: str
    instructions: str
    """With the server's default arguments, after a reset with seed 0."""
    observation_space: str
    action_space: str
    max_turns: int | None
    tools: list[dict[str, Any]]
    """Tool schemas, for environments that have tools."""
    reward_range: tuple[float, float] | None
    provides: dict[str, dict[str, Any]]
    """As `TextEnv.provides`: what credit methods may ask of it."""
    single_task: bool
    hard: bool = False
    fast: bool
    kwargs: dict[str, Any]
    """Default keyword arguments, the server's included."""


class Health(Wire):
    status: Literal["ok", "stopping"]
    version: str
    protocol: int = VERSION
    sessions: int
    envs: list[str]
