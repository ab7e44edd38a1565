"""A person at the terminal acts.

``agentrl collect Sokoban-v0 --policy human --episodes 1 --out mine.jsonl`` shows each observation and takes a line of
text as the action. Ctrl-D leaves: the episodes that are not over are cancelled, those that are stay.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from agentrl.errors import UserError
from agentrl.policy import Policy, PolicyAction, PolicyRequest
from agentrl.terminal import visible
from agentrl.types import text_of

_LISTED = 40
"""Admissible actions that are written out."""


class HumanPolicy(Policy):
    """A person at the terminal acts, one episode after the other.

    Each turn shows the observation (the instructions with the first one, what came of the last action with the
    others), the admissible actions where the environment lists them, and reads one line. An action may be given by its
    number in the list. An empty line asks again; Ctrl-D leaves. Control characters of what is shown, but new lines and
    tabs, are written out (``\\x1b``): an environment, or whoever writes its texts, must not fill the clipboard or move
    the cursor.

    Args:
        numbers: whether a number means the action at that place of the list. Off where actions are numbers.
        reader: where lines come from; None: standard input.
        writer: where observations go; None: standard output.

    Raises:
        UserError: standard input is closed.
    """

    name = "human"
    batched = False
    interactive = True

    def __init__(self, numbers: bool = True, reader: TextIO | None = None, writer: TextIO | None = None) -> None:
        self.numbers, self.writer = numbers, writer
        if reader is None and (sys.stdin is None or sys.stdin.closed):
            raise UserError("the human policy reads actions from standard input, which is closed here")
        self._lines = _Lines(reader or sys.stdin)
        self._seat: str | None = None
        """The episode that is being played."""
        self._played = 0
        self._waiting: list[asyncio.Event] = []
        self._left = False

    async def act(self, requests: Sequence[PolicyRequest]) -> list[PolicyAction]:
        """Asks for each action in turn.

        Raises:
            CancelledError: the person has left, now or before.
        """
        return [PolicyAction(await self._ask(request)) for request in requests]

    def release(self, episode: str) -> None:
        """The next episode that waits gets the terminal."""
        if self._seat == episode:
            self._seat = None
            self._wake()

    async def _ask(self, request: PolicyRequest) -> str:
        while not self._left and self._seat not in (None, request.episode):
            free = asyncio.Event()
            self._waiting.append(free)
            try:
                await free.wait()
            finally:
                if free in self._waiting:
                    self._waiting.remove(free)
        if self._seat is None:
            self._seat, self._played = request.episode, self._played + 1
        actions = list(map(str, request.info.get("admissible_actions") or ()))
        if not self._left:
            self._say(_shown(request, actions, self._played))
        while not self._left:
            self._say("> ", end="")
            line = await self._lines.next()
            if line is None:
                self._leave()
            elif text := line.strip():
                return self._action(text, actions)
        raise asyncio.CancelledError("the person at the terminal has left")

    def _action(self, text: str, actions: list[str]) -> str:
        at = int(text) if self.numbers and text.isdecimal() and text.isascii() and text not in actions else 0
        return actions[at - 1] if 0 < at <= len(actions) else text

    def _leave(self) -> None:
        self._left = True
        self._say("\nleft: what is not over is cancelled")
        while self._waiting:
            self._wake()

    def _wake(self) -> None:
        if self._waiting:
            self._waiting.pop(0).set()

    def _say(self, text: str, end: str = "\n") -> None:
        print(visible(text), end=end, flush=True, file=self.writer or sys.stdout)


def _shown(request: PolicyRequest, actions: list[str], number: int) -> str:
    lines: list[str] = []
    if request.turn == 0:
        lines.append(f"\n=== episode {number}")
        lines += [text_of(message.content) + "\n" for message in request.messages if message.role == "system"]
    else:
        lines.append(f"\n--- turn {request.turn}{_came_of(request.info)}")
    lines.append(text_of(request.observation))
    if actions:
        listed = [f"{place} {action}" for place, action in enumerate(actions[:_LISTED], 1)]
        more = f", and {len(actions) - _LISTED} more" if len(actions) > _LISTED else ""
        lines.append("actions: " + ", ".join(listed) + more)
    return "\n".join(lines)


def _came_of(info: Mapping[str, Any]) -> str:
    return " (that was no action)" if info.get("valid_action") is False else ""


class _Lines:
    """Lines of a stream without blocking the event loop, so that deadlines, Ctrl-C and other episodes go on.

    Waits for the descriptor itself: a thread blocked in `readline` could neither be cancelled nor ended.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rest = b""
        self._ended = False

    async def next(self) -> str | None:
        """Returns the next line; None at the end of the input."""
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):  # no file: a string in memory
            return self._stream.readline() or None
        while b"\n" not in self._rest and not self._ended:
            await _readable(descriptor)
            block = os.read(descriptor, 65536)
            self._rest += block
            self._ended = not block
        line, found, rest = self._rest.partition(b"\n")
        if not found and not line:
            self._ended = False  # a terminal goes on after Ctrl-D
            return None
        self._rest = rest
        return line.decode(self._stream.encoding or "utf-8", errors="replace")


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(descriptor, ready.set)
    except (NotImplementedError, PermissionError):  # Windows, or a regular file, which is always ready
        return
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
