"""`BabyAIEnv`: the grid missions of MiniGrid and BabyAI (arXiv 1810.08272, 2306.13831), the view put into words.

Left out: the package's step limit (turn limits are Gymnasium's) and its reward, which shrinks with the steps taken.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar, Literal

import gymnasium as gym

from agentrl.envs.core import Step
from agentrl.errors import ActionError, UserError, unknown_name
from environments.adapters.base import Adapter, choose, draw_seed, require

ENV_ID = "BabyAI-v0"
ACTIONS = ("turn left", "turn right", "go forward", "pick up", "drop", "toggle")
"""In the order of the package's own numbers."""

_INSTRUCTIONS = (
    "You are in a grid world and see up to 6 cells ahead and 3 to each side. Places are given as seen from you, in "
    "cells ahead and to the left or right. To pick up an object, or to toggle a door or a box, face it from the cell "
    f"before it.\nAnswer with one action: {', '.join(ACTIONS)}."
)


class BabyAIEnv(Adapter):
    """A mission in a grid world that is seen in part. The reward is 1 when it is done.

    `info` holds `success`, `valid_action`, `admissible_actions` (always the six) and, as long as the package's bot has
    a plan, `expert_action`. There is no `state_key`: most of the grid is out of sight.

    Args:
        level: an id of the package, e.g. ``BabyAI-BossLevel-v0`` or ``MiniGrid-DoorKey-6x6-v0``.
        expert: ask the package's bot for its action at every turn (BabyAI levels only).

    Raises:
        UserError: the package is missing, or no such level.
    """

    provides: ClassVar[dict[str, dict[str, Any]]] = {}
    live: ClassVar[tuple[str, ...]] = ("_world", "_bot")
    _world: Any = None
    _bot: Any = None

    def __init__(
        self,
        *,
        level: str = "BabyAI-GoToLocal-v0",
        expert: bool = True,
        render_mode: Literal["ansi"] | None = None,
    ) -> None:
        super().__init__()
        self.level, self.expert, self.render_mode = level, expert, render_mode
        self.instructions = _INSTRUCTIONS
        self._load()

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if self._world is None:
            self._load()
        self._world.reset(seed=draw_seed(self.np_random))
        self._bot = None
        if self.expert and hasattr(self._world, "instrs"):
            self._bot = importlib.import_module("minigrid.utils.baby_ai_bot").BabyAIBot(self._world)
        self._advise(None)
        return self._show(), self._info(False)

    def parse_action(self, text: str) -> int:
        """Returns the number of the action that `text` names.

        Raises:
            ActionError: none of the six.
        """
        return ACTIONS.index(choose(text, list(ACTIONS)))

    def play(self, action: int) -> Step:
        _, reward, terminated, _, _ = self._world.step(action)
        success = bool(terminated and reward > 0)
        if not terminated:
            self._advise(action)
        return self._show(), float(success), bool(terminated), self._info(success)

    def on_invalid(self, error: ActionError) -> Step:
        observation, reward, terminated, _ = super().on_invalid(error)
        return observation, reward, terminated, self._info(False)

    def close(self) -> None:
        if self._world is not None:
            self._world.close()
        super().close()

    def _load(self) -> None:
        require("minigrid", ENV_ID, "minigrid")
        levels = [name for name in gym.registry if name.startswith(("BabyAI-", "MiniGrid-")) and name != ENV_ID]
        if self.level not in levels:
            raise UserError(f"{ENV_ID}: {unknown_name('level', self.level, levels)}")
        self._world = gym.make(self.level, disable_env_checker=True).unwrapped
        self._world.max_steps = 2**31

    def _advise(self, action: int | None) -> None:
        """Asks the bot what to do after `action`; one that is lost is not asked again."""
        self._advice = None
        if self._bot is None:
            return
        try:
            advice = self._bot.replan(None if action is None else self._world.actions(action))
        except Exception:  # assertions of the bot, after moves that it would not have made
            self._bot = None
            return
        self._advice = ACTIONS[advice] if advice < len(ACTIONS) else None

    def _info(self, success: bool) -> dict[str, Any]:
        info: dict[str, Any] = {"success": success, "admissible_actions": list(ACTIONS)}
        if self._advice is not None and not success:
            info["expert_action"] = self._advice
        return info

    def _show(self) -> str:
        carried = self._world.carrying
        hands = f"You carry {_named(carried)}." if carried is not None else "You carry nothing."
        return f"Mission: {self._world.mission}\nYou see {'; '.join(describe(*self._world.gen_obs_grid()))}. {hands}"


def describe(grid: Any, visible: Any) -> list[str]:
    """Returns what stands in a view, the nearest first; of the walls only the one straight ahead.

    Args:
        grid: the view as the package makes it: the agent in the middle of the last row, looking up.
        visible: (width, height) bool: the cells that the agent can see.
    """
    middle, last = grid.width // 2, grid.height - 1
    seen = []
    for x in range(grid.width):
        for y in range(grid.height):
            thing = grid.get(x, y)
            if (x, y) == (middle, last) or not visible[x, y] or thing is None or thing.type in ("floor", "wall"):
                continue
            seen.append((last - y + abs(x - middle), f"{_named(thing)} {_place(last - y, x - middle)}"))
    column = [(last - y, grid.get(middle, y)) for y in range(last - 1, -1, -1) if visible[middle, y]]
    wall = next((ahead for ahead, thing in column if thing is not None and thing.type == "wall"), None)
    if wall is not None:
        seen.append((wall, f"a wall {_place(wall, 0)}"))
    return [text for _, text in sorted(seen)] or ["nothing"]


def _named(thing: Any) -> str:
    state = ""
    if thing.type == "door":
        state = "open " if thing.is_open else "locked " if thing.is_locked else "closed "
    words = f"{state}{thing.color} {thing.type}"
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _place(ahead: int, side: int) -> str:
    parts = [f"{ahead} ahead"] if ahead else []
    if side:
        parts.append(f"{abs(side)} {'right' if side > 0 else 'left'}")
    return " and ".join(parts)
