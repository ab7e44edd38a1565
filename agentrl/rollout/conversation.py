"""What has been said in an episode, as messages that are made when somebody reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from agentrl.types import Content, Message


class Conversation(Sequence[Message]):
    """The messages of a request, made when they are looked at: most plain functions read the observation alone."""

    __slots__ = ("_made", "_parts")

    def __init__(
        self, instructions: str, past: list[tuple[Content, str]], observation: Content, window: int | None
    ) -> None:
        # Turns are counted now: `past` grows with the episode.
        self._parts = (instructions, past, len(past), observation, window)
        self._made: tuple[Message, ...] | None = None

    def _all(self) -> tuple[Message, ...]:
        if self._made is None:
            self._made = tuple(self._messages())
        return self._made

    def _messages(self) -> Iterator[Message]:
        instructions, past, count, observation, window = self._parts
        if instructions:
            yield Message(role="system", content=instructions)
        for seen, action in past[0 if window is None else max(0, count - window) : count]:
            yield Message(role="user", content=seen)
            yield Message(role="assistant", content=action)
        yield Message(role="user", content=observation)

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
