"""An environment of two tools in one file: guess a hidden number."""

from typing import Any

from agentrl.envs import register
from agentrl.envs.core import Step
from agentrl.envs.tools import ToolEnv, tool


class Mastermind(ToolEnv):
    """Three digits are hidden; each probe says how many of its digits stand right."""

    instructions = "Find the hidden number. It has three digits, each from 1 to 4."

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        self.secret = "".join(str(digit) for digit in self.np_random.integers(1, 5, size=3))
        self.probed: list[str] = []
        return "A number is hidden.", self.facts()

    @tool
    def probe(self, number: str) -> str:
        """Says how many digits of a number stand right.

        Args:
            number: three digits
        """
        right = sum(map(str.__eq__, number, self.secret))
        self.probed.append(f"{number[:3]}: {right} right")
        return "\n".join(self.probed)

    @tool
    def answer(self, number: str) -> Step:
        """Ends the game with a number."""
        right = number == self.secret
        return f"It was {self.secret}.", float(right), True, {"success": right}

    def facts(self) -> dict[str, Any]:
        return {"state_key": f"{self.secret} {'; '.join(self.probed)}"}


register("Mastermind-v0", Mastermind, max_turns=8, summary="guess a hidden number")
