"""Messages as they travel: requests to JSON, answers from JSON, pictures from base64."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii
from typing import Any

import pydantic_core
from pydantic import TypeAdapter, ValidationError

from agentrl.remote.errors import Unreachable
from agentrl.remote.protocol import Created, Stepped, WireText
from agentrl.types import Content, ImagePart, TextPart

_PICTURE = re.compile(r"images/[0-9a-f]{32}\.png")
"""`agentrl.images` names pictures so. A server's word is not taken for it: the name becomes a path of files."""
_encode = json.JSONEncoder(separators=(",", ":")).encode
_PNG = b"\x89PNG\r\n\x1a\n"
_FIELDS = Stepped.model_fields.keys()

Played = tuple[int, Any, float, bool, bool, dict[str, Any]]
"""Step, observation (`content` reads it), reward, terminated, truncated, info."""


def encode(message: Any) -> str:
    """Returns JSON in ASCII, so that half a surrogate pair survives."""
    return _encode(message)


def encode_step(item: Mapping[str, Any]) -> str:
    """Returns `encode` of a `SessionStep`, at a tenth of the cost: only the action may need escapes."""
    action = encode_basestring_ascii(item["action"])
    return f'{{"session":"{item["session"]}","step":{item["step"]},"action":{action}}}'


def decode(body: bytes) -> Any:
    """Returns what JSON holds, NaN and half surrogate pairs included.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        answer = pydantic_core.from_json(body, cache_strings="keys")
    except ValueError:  # half a surrogate pair is no JSON to this parser
        answer = json.loads(body)
    if b'"png"' in body:
        _share_pictures(answer)
    return answer


def created(url: str, answer: Any) -> Created:
    """Checks the answer to a create. Raises `Unreachable`: it is none."""
    made: Created = _checked(_CREATED, url, answer)
    return made


def stepped(url: str, answer: Any) -> Played:
    """Returns the fields of a `Stepped`.

    Checked by hand where they have just the types they should: pydantic takes seven times as long.

    Raises:
        Unreachable: it is no answer to a step.
    """
    if type(answer) is dict and answer.keys() == _FIELDS:
        step, observation, reward = answer["step"], answer["observation"], answer["reward"]
        terminated, truncated, info = answer["terminated"], answer["truncated"], answer["info"]
        numbers = type(step) is int and type(reward) is float and type(terminated) is type(truncated) is bool
        if numbers and type(observation) is str and type(info) is dict:
            return step, observation, reward, terminated, truncated, info
    played: Stepped = _checked(_STEPPED, url, answer)
    return played.step, played.observation, played.reward, played.terminated, played.truncated, played.info


def content(url: str, observation: Any) -> Content:
    """Returns an observation with its pictures.

    Raises:
        Unreachable: a picture without pixels, or under a name that is none of a picture.
    """
    if isinstance(observation, str):
        return observation
    parts: list[TextPart | ImagePart] = []
    for part in observation:
        if isinstance(part, WireText):
            parts.append(TextPart(text=part.text))
            continue
        try:
            png = base64.b64decode(part.png or "", validate=True)
        except binascii.Error:
            png = b""
        if not png.startswith(_PNG) or not _PICTURE.fullmatch(part.path):
            raise Unreachable(f"{url}: answered with the picture {part.path!r:.80}, which is none")
        image = ImagePart(path=part.path, alt=part.alt)
        image._source = png
        parts.append(image)
    return parts


_CREATED: TypeAdapter[Created] = TypeAdapter(Created)
_STEPPED: TypeAdapter[Stepped] = TypeAdapter(Stepped)


def _checked(kind: TypeAdapter[Any], url: str, answer: Any) -> Any:
    try:
        return kind.validate_python(answer)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the answer"
        raise Unreachable(f"{url}: answered outside the protocol: {where}: {first['msg']}") from error


def _share_pictures(answer: Any) -> None:
    """Gives every picture of an answer its pixels, which stand there once."""
    found: dict[str, str] = {}
    bare: list[dict[str, Any]] = []
    results = answer.get("results", [answer]) if isinstance(answer, dict) else []
    for result in results if isinstance(results, list) else []:
        observation = result.get("observation") if isinstance(result, dict) else None
        for part in observation if isinstance(observation, list) else []:
            if isinstance(part, dict) and part.get("type") == "image" and isinstance(part.get("path"), str):
                if isinstance(part.get("png"), str):
                    found[part["path"]] = part["png"]
                else:
                    bare.append(part)
    for part in bare:
        part["png"] = found.get(part["path"])
