"""Scripted agents for PythonTool. They read the observation alone."""

from __future__ import annotations

import random
import re

from agentrl.envs.calls import ToolCall
from agentrl.policy import FunctionPolicy, Policy, PolicyRequest
from agentrl.types import text_of
from environments.python_tool.problems import read_problem

_PRINTED = re.compile(r"^Output:\n(-?\d+(?:\.\d+)?)\s*$", re.M)


def _read(request: PolicyRequest) -> tuple[str, str | None]:
    """Returns the problem's text, and the number that the last program printed alone."""
    shown = text_of(request.observation)
    problem = shown[shown.index("Problem: ") + len("Problem: ") :].partition("\n")[0]
    found = _PRINTED.search(shown)
    return problem, found[1] if found else None


def _answer(number: str) -> str:
    return str(ToolCall("answer", {"value": float(number) if "." in number else int(number)}))


def _python(code: str) -> str:
    return str(ToolCall("python", {"code": code}))


def _expert(request: PolicyRequest) -> str:
    text, printed = _read(request)
    if printed is not None:
        return _answer(printed)
    problem = read_problem(text)
    if problem is None:
        return _python("print(0)")
    given = "\n".join(f"{name} = {value}" for name, value in problem.values.items())
    return _python(f"{given}\n{problem.kind.program}")


def _naive(request: PolicyRequest) -> str:
    text, printed = _read(request)
    first, second = [*re.findall(r"\d+", text), "1", "1"][:2]
    return _answer(printed) if printed is not None else _python(f"print({first} * {second})")


def _random(request: PolicyRequest) -> str:
    text, printed = _read(request)
    rng, numbers = random.Random(request.seed), re.findall(r"\d+", text) or ["1"]
    if rng.random() < 0.5:
        return _answer(rng.choice([*numbers, *([printed] if printed is not None else [])]))
    return _python(f"print({rng.choice(numbers)} {rng.choice('+-*')} {rng.choice(numbers)})")


def expert_policy() -> Policy:
    """Returns the policy that reads the numbers from the text, writes the program of its kind, and gives the output."""
    return FunctionPolicy(_expert, name="python-tool-expert")


def naive_policy() -> Policy:
    """Returns the policy that multiplies the first two numbers, whatever is asked."""
    return FunctionPolicy(_naive, name="python-tool-naive")


def random_policy() -> Policy:
    """Returns the policy that calculates with, or answers, numbers on screen at random."""
    return FunctionPolicy(_random, name="python-tool-random")
