"""What has been said in an episode, as messages that are made when somebody reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from agentrl.types import Content, Message


class Conversation(Sequence[Message]):
    """The messages of a request, made when they are looked at: most plain functions read the observation alone."""

    __slots__ = ("_count", "_instructions", "_made", "_observation", "_past", "_window")

    def __init__(
        self, instructions: str, past: list[tuple[Content, str]], observation: Content, window: int | None
    ) -> None:
        self._instructions, self._past, self._observation, self._window = instructions, past, observation, window
        self._count = len(past)
        """Turns so far: `past` grows with the episode."""
        self._made: tuple[Message, ...] | None = None

    def _all(self) -> tuple[Message, ...]:
        if self._made is None:
            self._made = (*self._before(), Message(role="user", content=self._observation))
        return self._made

    def _before(self) -> Iterator[Message]:
        if self._instructions:
            yield Message(role="system", content=self._instructions)
        first = 0 if self._window is None else max(0, self._count - self._window)
        for seen, action in self._past[first : self._count]:
            yield Message(role="user", content=seen)
            yield Message(role="assistant", content=action)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Message, ...]: ...
    def __getitem__(self, index: int | slice) -> Message | tuple[Message, ...]:
        return self._all()[index]

    def __len__(self) -> int:
        return len(self._all())

    def __eq__(self, other: object) -> bool:
        return self._all() == (other._all() if isinstance(other, Conversation) else other)

    def __hash__(self) -> int:
        return hash(self._all())

    def __repr__(self) -> str:
        return repr(self._all())
