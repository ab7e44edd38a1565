"""Arithmetic and word problems from templates, integer and decimal, with exact answers.

A kind is a text with numbers left open, how to draw them, the answer as an exact number, and Python that prints it. The
program is what the expert writes once it has read the numbers from the text; tests hold it against the answer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

Number = int | Fraction


@dataclass(frozen=True)
class Kind:
    """A template of problems."""

    text: str
    """With ``{a}`` for each number."""
    ranges: Mapping[str, tuple[int, int]]
    """Least and largest value of each number, both included."""
    answer: Callable[..., Number]
    """From the numbers, by name."""
    program: str
    """Prints the answer from variables of these names."""
    decimal: bool = False
    """The answer is wanted to two decimals, else it is an integer."""

    def draw(self, random: np.random.Generator) -> Problem:
        """Returns a problem with numbers drawn from `random`."""
        values = {name: int(random.integers(low, high + 1)) for name, (low, high) in self.ranges.items()}
        return Problem(self, values)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches a problem's text; groups are the numbers."""
        parts = re.split(r"\{(\w+)\}", self.text)
        return re.compile("".join(rf"(?P<{p}>\d+)" if i % 2 else re.escape(p) for i, p in enumerate(parts)))


@dataclass(frozen=True)
class Problem:
    """A kind with its numbers."""

    kind: Kind
    values: dict[str, int]

    def __reduce__(self) -> tuple[Any, ...]:
        return read_problem, (self.text,)  # kinds hold functions, which cannot be pickled; the text says all

    @property
    def text(self) -> str:
        asked = " Give the answer to two decimals." if self.kind.decimal else ""
        return self.kind.text.format(**self.values) + asked

    @property
    def answer(self) -> Number:
        return self.kind.answer(**self.values)

    def accepts(self, value: float, tolerance: float) -> bool:
        """Whether `value` is right: exactly for integers, within `tolerance` for decimals."""
        return abs(Fraction(value) - self.answer) <= (Fraction(tolerance) if self.kind.decimal else 0)


def read_problem(text: str) -> Problem | None:
    """Returns the problem that stands in `text`; None where there is none."""
    for kind in KINDS.values():
        if found := kind.pattern.search(text):
            return Problem(kind, {name: int(value) for name, value in found.groupdict().items()})
    return None


def _digit_sum(a: int, b: int) -> int:
    return sum(map(int, str(a**b)))


def _primes(a: int, b: int) -> int:
    return sum(all(n % d for d in range(2, math.isqrt(n) + 1)) for n in range(max(a, 2), b + 1))


def _sequence(a: int, b: int, c: int, d: int, n: int) -> int:
    for _ in range(n - 1):
        a = (b * a + c) % d
    return a


KINDS = {
    "crates": Kind(
        "A crate holds {a} bottles. How many bottles do {b} crates hold?",
        {"a": (12, 480), "b": (13, 999)},
        lambda a, b: a * b,
        "print(a * b)",
    ),
    "tickets": Kind(
        "A theatre sold {a} tickets at {b} coins and {c} tickets at {d} coins, and paid {e} coins in rent. "
        "How many coins are left?",
        {"a": (20, 400), "b": (8, 60), "c": (20, 300), "d": (61, 150), "e": (100, 900)},
        lambda a, b, c, d, e: a * b + c * d - e,
        "print(a * b + c * d - e)",
    ),
    "discount": Kind(
        "A shop takes {b} percent off a coat of {a} coins, then adds {c} percent tax to what is left. "
        "How many coins does the coat cost?",
        {"a": (40, 900), "b": (3, 45), "c": (2, 25)},
        lambda a, b, c: Fraction(a * (100 - b) * (100 + c), 10_000),
        "print(round(a * (100 - b) / 100 * (100 + c) / 100, 4))",
        decimal=True,
    ),
    "interest": Kind(
        "A bank pays {b} percent interest each year on {a} coins and adds it to the account. "
        "How many coins are there after {c} years?",
        {"a": (100, 9000), "b": (1, 12), "c": (3, 25)},
        lambda a, b, c: a * Fraction(100 + b, 100) ** c,
        "from fractions import Fraction\nprint(round(float(a * Fraction(100 + b, 100) ** c), 4))",
        decimal=True,
    ),
    "journey": Kind(
        "A train covers {a} kilometres at {b} kilometres an hour and {c} kilometres at {d} kilometres an hour. "
        "What is its average speed in kilometres an hour?",
        {"a": (30, 400), "b": (40, 160), "c": (30, 400), "d": (40, 160)},
        lambda a, b, c, d: (a + c) / (Fraction(a, b) + Fraction(c, d)),
        "print(round((a + c) / (a / b + c / d), 4))",
        decimal=True,
    ),
    "mixture": Kind(
        "{a} litres of a solution with {b} percent salt are mixed with {c} litres with {d} percent salt. "
        "What percentage of the mixture is salt?",
        {"a": (2, 60), "b": (1, 30), "c": (2, 60), "d": (31, 80)},
        lambda a, b, c, d: Fraction(a * b + c * d, a + c),
        "print(round((a * b + c * d) / (a + c), 4))",
        decimal=True,
    ),
    "work": Kind(
        "One pump empties a tank in {a} hours, a second in {b} hours and a third in {c} hours. "
        "How many hours do all three take together?",
        {"a": (3, 30), "b": (3, 40), "c": (3, 50)},
        lambda a, b, c: 1 / (Fraction(1, a) + Fraction(1, b) + Fraction(1, c)),
        "print(round(1 / (1 / a + 1 / b + 1 / c), 4))",
        decimal=True,
    ),
    "multiples": Kind(
        "What is the sum of all whole numbers from 1 to {a} that are divisible by {b} or by {c}?",
        {"a": (100, 5000), "b": (3, 19), "c": (4, 23)},
        lambda a, b, c: sum(n for n in range(1, a + 1) if n % b == 0 or n % c == 0),
        "print(sum(n for n in range(1, a + 1) if n % b == 0 or n % c == 0))",
    ),
    "digits": Kind(
        "What is the sum of the decimal digits of {a} to the power of {b}?",
        {"a": (2, 99), "b": (8, 60)},
        _digit_sum,
        "print(sum(int(digit) for digit in str(a ** b)))",
    ),
    "primes": Kind(
        "How many prime numbers are there from {a} to {b}, both included?",
        {"a": (2, 2000), "b": (2001, 6000)},
        _primes,
        "print(sum(all(n % d for d in range(2, int(n ** 0.5) + 1)) for n in range(max(a, 2), b + 1)))",
    ),
    "lamps": Kind(
        "Lamps blink every {a}, {b} and {c} seconds and have just blinked together. "
        "After how many seconds do they blink together again?",
        {"a": (6, 90), "b": (6, 90), "c": (6, 90)},
        lambda a, b, c: math.lcm(a, b, c),
        "import math\nprint(math.lcm(a, b, c))",
    ),
    "sequence": Kind(
        "A sequence begins with {a}. Each next number is {b} times the last plus {c}, modulo {d}. "
        "What is the number at place {n}, the first number being at place 1?",
        {"a": (1, 50), "b": (2, 40), "c": (1, 99), "d": (101, 9973), "n": (8, 400)},
        _sequence,
        "for _ in range(n - 1):\n    a = (b * a + c) % d\nprint(a)",
    ),
}
