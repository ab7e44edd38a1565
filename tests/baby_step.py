"""A slow environment that worker processes can import: `baby_step:BabyStep-v0`."""

from __future__ import annotations

from typing import Any

from toys import register

from agentrl.envs import TextEnv


class BabyStep(TextEnv):
    """Counts; ``fail`` fails."""

    local_arguments = frozenset({"delay"})

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__()

    def begin(self, options: dict[str, Any]) -> Any:
        self.count = 0
        return "0", {}

    def parse_action(self, text: str) -> str:
        return text

    def play(self, action: str) -> Any:
        if action == "fail":
            raise RuntimeError("as told")
        self.count += 1
        return str(self.count), 0.0, False, {}


register("BabyStep-v0", BabyStep)
