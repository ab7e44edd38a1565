"""What both sides of `vs_trl.py` share: the game, its words, and how a side takes turns with the other.

A secret number from 1 to `HIGHEST`, `GUESSES` guesses by a call of one tool, then a farewell: the episode ends with an
answer that calls no tool, as TRL's tool loop ends. Right guess = reward 1.

Standard library and numpy only, since the interpreter of either side imports it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np

HIGHEST, GUESSES = 10, 3
MAX_TURNS = 6
"""Answers in an episode, the farewell included; a player that goes on calling is cut off here."""

INSTRUCTIONS = (
    f"You are playing a game. A secret number between 1 and {HIGHEST} has been chosen. Find it with at most {GUESSES} "
    "guesses by calling the tool. After each guess you are told whether the secret is higher or lower. When the game "
    "is over, say goodbye."
)
FIRST = "The secret number is chosen. Make your first guess."
TOOL = {"name": "guess", "says": "Guesses the secret number.", "number": "The number that is guessed."}
FAREWELL = "The game is over. Thank you for playing with me. Goodbye."


class Game:
    """One secret and what has become of it.

    Args:
        random: where the secret comes from; both sides seed it with the task's seed.
    """

    def __init__(self, random: np.random.Generator) -> None:
        self.secret = int(random.integers(1, HIGHEST + 1))
        self.guesses, self.solved = 0, False

    def guess(self, number: int) -> str:
        """Returns what the player is told."""
        if self.solved or self.guesses == GUESSES:
            return "The game is over."
        self.guesses += 1
        self.solved = number == self.secret
        if self.solved:
            return f"{number} is right. You win."
        if self.guesses == GUESSES:
            return f"{number} is wrong. You lose."
        return f"{number} is wrong. The secret is {'higher' if number < self.secret else 'lower'}."


def call(number: int) -> str:
    """Returns a guess as Qwen models write tool calls."""
    arguments = json.dumps({"name": TOOL["name"], "arguments": {"number": number}})
    return f"<tool_call>\n{arguments}\n</tool_call>"


def response(text: str) -> str:
    """Returns what a tool said as Qwen's chat template shows it."""
    return f"<tool_response>\n{text}\n</tool_response>"


PROBE = (FIRST, call(5), Game(np.random.default_rng(0)).guess(5))
"""A conversation whose token ids must be equal on both sides: first message, action, what the tool says to it."""


class Turns:
    """A side's end of taking turns: it trains only while the benchmark waits for it.

    The benchmark writes ``N`` for N steps; the side writes a line of JSON for each, with the wall and processor
    seconds it took. What a library prints goes to standard error, since standard output belongs to these lines.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        sys.stdout = sys.stderr
        self._left = 0
        self._started = self._worked = 0.0

    def ready(self, facts: dict[str, Any]) -> None:
        """Says what the benchmark compares before it begins, and waits for the first turn."""
        self._say(facts)
        self._wait()

    def step(self, facts: dict[str, Any]) -> None:
        """Ends a training step: called from within the training loop, which goes on when this returns."""
        took = {"seconds": time.perf_counter() - self._started, "cpu_seconds": time.process_time() - self._worked}
        self._say({**facts, **took})
        self._left -= 1
        if self._left == 0:
            self._wait()
        self._start()

    def _wait(self) -> None:
        line = sys.stdin.readline()
        if not line.strip():
            os._exit(0)  # the benchmark is done: no checkpoint, no farewell of a library
        self._left = int(line)
        self._start()

    def _start(self) -> None:
        self._started, self._worked = time.perf_counter(), time.process_time()

    def _say(self, facts: dict[str, Any]) -> None:
        self._out.write(json.dumps(facts) + "\n")
        self._out.flush()
