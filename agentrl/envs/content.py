"""`AnyContent`: the observation space of environments that show text and pictures."""

from __future__ import annotations

from typing import Any

from agentrl.envs.core import AnyText
from agentrl.types import ImagePart, TextPart


class AnyContent(AnyText):
    """The space of all message contents: a string, or a list of `TextPart` and `ImagePart`. `sample` draws strings."""

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) or (isinstance(x, list) and all(isinstance(p, TextPart | ImagePart) for p in x))

    def __repr__(self) -> str:
        return "AnyContent()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyContent)
