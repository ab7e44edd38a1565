"""JSON in and out.

What pydantic's parser refuses goes to the standard library: half a surrogate pair, which agents do write, is no JSON
to others. What is parsed is then checked, steps by hand (half the cost of a batch), all else by pydantic. Answers are
bytes, so that a recorded one costs nothing to send again.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import pydantic_core
from pydantic import BaseModel, ValidationError

from agentrl.errors import AgentRLError, EnvironmentFailure, UserError
from agentrl.images import png_bytes
from agentrl.remote.protocol import (
    MAX_ACTION,
    MAX_BATCH,
    STATUS,
    Code,
    ErrorAnswer,
    ErrorBody,
    SessionStep,
    StepBatch,
    StepRequest,
)
from agentrl.rollout.values import checked_observation, checked_step, jsonable
from agentrl.types import Content, TextPart

T = TypeVar("T", bound=BaseModel)

KEY = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_MESSAGE = 500
"""Characters of an environment's own words in an error."""
_ADVICE = 2000
"""And of an error that says what to mend: what was given may stand in it."""


class Answer(NamedTuple):
    """One answer, ready to send."""

    status: int
    body: bytes
    retry_after_s: float | None = None


class Refused(Exception):
    """A request that is not served, with what the client is told."""

    def __init__(self, code: Code, message: str, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.body = ErrorBody.model_construct(code=code, message=message, field=field, retry_after_s=retry_after_s)

    def answer(self) -> Answer:
        """Returns what is sent."""
        body = encode(ErrorAnswer.model_construct(error=self.body).model_dump())
        return Answer(STATUS[self.code], body, self.body.retry_after_s)


def encode(value: Any) -> bytes:
    """Returns `value`, of plain types, as JSON; floats by their shortest exact form, NaN and infinity as constants."""
    try:
        return pydantic_core.to_json(value, inf_nan_mode="constants")
    except (ValueError, RecursionError):  # half a surrogate pair has no UTF-8: escape it
        return json.dumps(value, separators=(",", ":")).encode()


def decode(body: bytes) -> Any:
    """Returns what the JSON `body` says.

    Raises:
        Refused: it is no JSON.
    """
    try:
        return pydantic_core.from_json(body, cache_strings="keys")
    except ValueError:
        return _decode_slowly(body)


def _decode_slowly(body: bytes) -> Any:
    try:
        return json.loads(body.decode())
    except UnicodeDecodeError as error:
        raise Refused(Code.INVALID, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise Refused(Code.INVALID, "the body is nested too deeply") from None
    except ValueError as error:
        raise Refused(Code.INVALID, f"the body is not JSON: {error}" if body else "the body is empty") from None


def parse(model: type[T], body: bytes) -> T:
    """Returns `body` as a `model`.

    Raises:
        Refused: it is no JSON, or not of this form; names the field.
    """
    return checked(model, decode(body))


def checked(model: type[T], value: Any) -> T:
    """Returns the decoded `value` as a `model`.

    Raises:
        Refused: it has another form; names the field.
    """
    try:
        return model.model_validate(value, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
    # An action may hold half a surrogate pair, so that this is not the fault where there is another.
    problem = next((p for p in problems if p["type"] != "string_unicode"), problems[0])
    field = ".".join(str(level) for level in problem["loc"])
    given = problem["input"]
    shown = "" if isinstance(given, dict | list) else f", not {given!a:.60}"
    message = f"{field}: {problem['msg']}{shown}" if field else f"the body: {problem['msg']}"
    raise Refused(Code.INVALID, message, field=field or None)


def parse_step(body: bytes) -> tuple[int, str]:
    """Returns number and action of a `StepRequest`.

    Raises:
        Refused: it is none; names the field.
    """
    value = decode(body)
    if type(value) is dict and len(value) == 2:
        step, action = value.get("step"), value.get("action")
        if type(step) is int and step >= 1 and type(action) is str and len(action) <= MAX_ACTION:
            return step, action
    request = checked(StepRequest, value)
    return request.step, request.action


def parse_steps(body: bytes) -> list[dict[str, Any]]:
    """Returns the items of a `StepBatch`: dicts of ``session``, ``step``, ``action``.

    Raises:
        Refused: it is none; names the field, with the item's number.
    """
    value = decode(body)
    items = value.get("steps") if type(value) is dict and len(value) == 1 else None
    if type(items) is not list or len(items) > MAX_BATCH:
        checked(StepBatch, value)
        raise AssertionError("a batch of the right form was refused")
    for number, item in enumerate(items):
        if type(item) is dict and len(item) == 3:
            step, action, session = item.get("step"), item.get("action"), item.get("session")
            good = type(step) is int and step >= 1 and type(action) is str and len(action) <= MAX_ACTION
            if good and type(session) is str and KEY.match(session):
                continue
        try:
            checked(SessionStep, item)
        except Refused as refusal:
            field = ".".join(filter(None, ("steps", str(number), refusal.body.field)))
            raise Refused(Code.INVALID, f"steps.{number}: {refusal}", field=field) from None
    return items


def created(session: str, env_id: str, answer: Any) -> bytes:
    """Returns a `Created`, from what a host's `reset` returned.

    Raises:
        EnvironmentFailure: info is no mapping.
        UserError: an observation that no agent can read.
    """
    observation, info, instructions = answer
    if not isinstance(info, Mapping):
        raise EnvironmentFailure(f"returned the info {info!r:.80}; wanted a dict")
    return encode(
        {
            "session": session,
            "observation": wire_observation(checked_observation(env_id, observation)),
            "info": jsonable(info),
            "instructions": instructions,
        }
    )


def stepped(step: int, env_id: str, answer: Any) -> tuple[bytes, bool]:
    """Returns a `Stepped`, from what the environment returned, and whether the episode is over.

    Raises:
        EnvironmentFailure: not five values, or a reward that is no finite number.
        UserError: an observation that no agent can read.
    """
    observation, reward, terminated, truncated, info = checked_step(answer)
    if type(observation) is not str:
        observation = wire_observation(checked_observation(env_id, observation))
    body = encode(
        {
            "step": step,
            "observation": observation,
            "reward": reward,
            "terminated": terminated,
            "truncated": truncated,
            "info": jsonable(info),
        }
    )
    return body, terminated or truncated


def wire_observation(content: Content) -> Any:
    """Returns an observation as it travels: pictures as base64, each once."""
    if isinstance(content, str):
        return content
    sent: set[str] = set()
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, TextPart):
            parts.append({"type": "text", "text": part.text})
            continue
        png = None if part.path in sent else base64.b64encode(png_bytes(part)).decode()
        sent.add(part.path)
        parts.append({"type": "image", "path": part.path, "alt": part.alt, "png": png})
    return parts


def words_of(error: BaseException, hide: Callable[[str], str]) -> str:
    """Returns what a client is told of an exception: kind and message, no place in the code.

    Args:
        error: what happened.
        hide: takes out of a text what clients may not know.
    """
    if isinstance(error, UserError):
        return _clipped(hide(str(error)), _ADVICE)
    text = str(error) if isinstance(error, AgentRLError) else f"{type(error).__name__}: {error}"
    return _clipped(hide(re.sub(r" \([^()\n]*:\d+\)\Z", "", text)), _MESSAGE)


def _clipped(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
