"""Values on their way from an environment into a trajectory file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
from pydantic import BaseModel

from agentrl.errors import EnvironmentFailure, UserError
from agentrl.images import image_part, images_of
from agentrl.types import Content, ImagePart, TextPart

_PLAIN = frozenset({str, int, float, bool, type(None)})
_DEPTH = 16
"""Nesting beyond this (or a value that contains itself) is stored as its repr."""


def stored_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a `Turn` keeps of an environment's info: JSON-compatible, without `admissible_actions`.

    Arrays and numpy scalars become lists and numbers; what JSON cannot hold becomes its repr. The list of admissible
    actions is for agents that are playing; in files it would be most of the bytes.
    """
    return {
        str(key): value if type(value) in _PLAIN else jsonable(value)
        for key, value in info.items()
        if key != "admissible_actions"
    }


def jsonable(value: Any, depth: int = _DEPTH) -> Any:
    """Returns `value` in types that survive JSON unchanged (str, int, float, bool, None, list, dict with str keys)."""
    if type(value) in _PLAIN:
        return value
    if depth == 0:
        return repr(value)
    if type(value) is dict:  # the common cases first: this runs for every turn
        return {str(k): v if type(v) in _PLAIN else jsonable(v, depth - 1) for k, v in value.items()}
    if isinstance(value, Enum):
        return jsonable(value.value, depth - 1)
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist(), depth - 1)
    if isinstance(value, BaseModel):
        return jsonable(dict(value), depth - 1)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item, depth - 1) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((jsonable(item, depth - 1) for item in value), key=repr)
    for plain in (str, int, float):
        if isinstance(value, plain):
            return plain(value)
    return repr(value)


def checked_observation(env_id: str, observation: Any) -> Content:
    """Returns `observation` if it is text, or text and image parts.

    A Gymnasium observation ``{"text": str, "image": (height, width, 3) uint8}`` becomes the picture, then the text.

    Raises:
        UserError: anything else, with the type that came; a picture without pixels.
    """
    if type(observation) is str:
        return observation
    if isinstance(observation, str):
        return str(observation)
    if isinstance(observation, Mapping) and set(observation) == {"text", "image"}:
        return [image_part(observation["image"]), TextPart(text=str(observation["text"]))]
    if isinstance(observation, list) and all(isinstance(part, TextPart | ImagePart) for part in observation):
        if bare := [part.path for part in images_of(observation) if part._source is None]:
            raise UserError(
                f"environment {env_id!r} returned the picture {bare[0]!r} without its pixels; make image parts with "
                "agentrl.images.image_part(pixels)"
            )
        return observation
    raise UserError(
        f"environment {env_id!r} returned a {type(observation).__name__} as its observation; agents read text (str) or "
        "a list of TextPart and ImagePart: wrap it in a gymnasium.ObservationWrapper that describes it in words"
    )


def checked_step(answer: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
    """Returns the five-tuple of `gymnasium.Env.step` with plain types.

    Raises:
        EnvironmentFailure: not five values, or a reward that is no finite number.
    """
    try:
        observation, reward, terminated, truncated, info = answer
    except (TypeError, ValueError):
        raise EnvironmentFailure(
            f"returned {answer!r:.80}; wanted (observation, reward, terminated, truncated, info)"
        ) from None
    if type(reward) is float and type(info) is dict and math.isfinite(reward):
        return observation, reward, bool(terminated), bool(truncated), info.copy()
    if not isinstance(info, Mapping):
        raise EnvironmentFailure(f"returned the info {info!r:.80}; wanted a dict")
    try:
        reward = float(reward)
    except (TypeError, ValueError):
        raise EnvironmentFailure(f"returned the reward {reward!r:.80}, which is no number") from None
    if not math.isfinite(reward):
        raise EnvironmentFailure(f"returned the reward {reward}")
    return observation, reward, bool(terminated), bool(truncated), dict(info)
