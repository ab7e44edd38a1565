"""`PythonToolEnv`: a problem that is hard in the head and easy in Python, and two tools: python, answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

from agentrl.envs.core import Step
from agentrl.envs.tools import ToolEnv, tool
from agentrl.errors import UnknownNameError, UserError
from environments.python_tool.problems import KINDS, Problem, read_problem
from environments.python_tool.sandbox import run_python

Split = Literal["all", "train", "test"]
TEST_ONE_IN = 10


class PythonToolEnv(ToolEnv):
    """Arithmetic and word problems with a Python interpreter.

    Each call of `python` is a fresh process of its own (see `sandbox`): nothing is kept from one to the next. Reward: 1
    for the right answer, which ends the episode. Code whose output depends on the clock, on addresses or on drawn
    numbers, or that runs near the time limit, is the only thing that can make two equal episodes differ.

    `info` holds `success`, `valid_action`, `state_key` (the problem and the last output) and `kind` of the problem.
    ``reset(options={"problem": text})`` asks a problem, as observations write it.

    Args:
        kinds: names of problem kinds (`problems.KINDS`); None: all.
        split: ``train`` and ``test`` never share a problem.
        tolerance: largest error of an answer that is asked for with decimals; integers must be exact.
        timeout_s: wall-clock seconds that a program may take.
        memory_mb: address space that it may use, in MiB (at least 64).
        max_output: characters of its output that are shown.

    Raises:
        UserError: an unknown kind, or a setting out of its range.
    """

    provides = {"state_keys": {}}
    instructions = (
        "Solve the problem. Use Python to calculate: print what you want to see. Each program starts afresh, has the "
        "standard library only, and neither files nor network. Then give the answer, a number."
    )

    reward_range = (0.0, 1.0)
    local_arguments = frozenset({"timeout_s", "memory_mb", "max_output"})

    def __init__(
        self,
        *,
        kinds: Sequence[str] | None = None,
        split: Split = "all",
        tolerance: float = 0.00501,
        timeout_s: float = 2.0,
        memory_mb: int = 256,
        max_output: int = 2000,
        render_mode: Literal["ansi"] | None = None,
    ) -> None:
        super().__init__()
        for name in kinds or ():
            if name not in KINDS:
                raise UnknownNameError("kind of problem", name, KINDS)
        if split not in get_args(Split):
            raise UserError(f"split={split!r}: one of 'all', 'train', 'test'")
        if not tolerance >= 0:
            raise UserError(f"tolerance={tolerance}: at least 0")
        if not 0.2 <= timeout_s <= 600:
            raise UserError(f"timeout_s={timeout_s}: 0.2 to 600 seconds; the interpreter itself takes some to start")
        if memory_mb < 64:
            raise UserError(f"memory_mb={memory_mb}: at least 64, for the interpreter itself")
        if max_output < 1:
            raise UserError(f"max_output={max_output}: at least 1 character")
        self.kinds = list(dict.fromkeys(kinds)) if kinds else list(KINDS)
        self.split, self.tolerance, self.render_mode = split, tolerance, render_mode
        self.timeout_s, self.memory_mb, self.max_output = timeout_s, memory_mb, max_output

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        given = options.get("problem")
        self.problem = self._draw() if given is None else _read(str(given))
        self._screen = ""
        return self._show(""), self.facts()

    @tool
    def python(self, code: str) -> str:
        """Runs a program and returns what it prints.

        Args:
            code: the program
        """
        ran = run_python(code, timeout_s=self.timeout_s, memory_mb=self.memory_mb, max_output=self.max_output)
        lines = [ran.output.rstrip("\n")] if ran.output.strip() else []
        if ran.cut:
            lines.append(f"[output cut after {self.max_output} characters]")
        if ran.end == "timeout":
            lines.append(f"[stopped: the program took longer than {self.timeout_s:g} s]")
        elif ran.end == "killed":
            lines.append("[the program was killed: it crashed or broke a limit]")
        return self._show("Output:\n" + ("\n".join(lines) or "[nothing was printed]"))

    @tool
    def answer(self, value: int | float) -> Step:
        """Gives the answer and ends the episode.

        Args:
            value: the number alone
        """
        right = self.problem.accepts(value, self.tolerance)
        return self._show("Correct." if right else "Wrong."), float(right), True, {**self.facts(), "success": right}

    def facts(self) -> dict[str, Any]:
        kind = next(name for name, each in KINDS.items() if each is self.problem.kind)
        return {"state_key": f"{self.problem.text}\n{self._screen}", "kind": kind}

    def _show(self, screen: str) -> str:
        self._screen = screen
        return f"Problem: {self.problem.text}\n{screen}".rstrip("\n")

    def _draw(self) -> Problem:
        while True:  # every tenth problem is a test problem: few draws
            problem = KINDS[self.kinds[int(self.np_random.integers(len(self.kinds)))]].draw(self.np_random)
            if in_split(problem.text, self.split):
                return problem


def in_split(problem: str, split: Split) -> bool:
    """Whether a problem belongs to `split`: one in `TEST_ONE_IN` is a test problem, by a hash of its text."""
    if split == "all":
        return True
    digest = hashlib.sha256(problem.encode()).digest()
    return (int.from_bytes(digest[:8], "big") % TEST_ONE_IN == 0) == (split == "test")


def _read(text: str) -> Problem:
    problem = read_problem(text)
    if problem is None or problem.text != text:
        raise UserError(f"problem={text!r:.120} is of no known kind")
    return problem
