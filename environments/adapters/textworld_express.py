"""`TextWorldExpressEnv`: the games of TextWorldExpress (Jansen and Cote, arXiv 2208.01174), each env with a Java VM.

Left out: the package's own step limit (turn limits are Gymnasium's) and its run history, which grows without end.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal, get_args

from agentrl.envs.core import Step
from agentrl.errors import ActionError, EnvironmentFailure, UserError
from environments.adapters.base import Adapter, choose, end_java, require, require_java

ENV_ID = "TextWorldExpress-v0"
Fold = Literal["train", "dev", "test"]
_GAMES = ("arithmetic", "coin", "cookingworld", "mapreader", "peckingorder", "simonsays", "sorting", "twc")


class TextWorldExpressEnv(Adapter):
    """A text game of rooms, objects and tasks. The seed chooses one of the 1,000 games of a fold.

    `info` holds `success`, `valid_action`, `admissible_actions` (sorted: the game's own order is arbitrary), `score`
    (the game's, 0 to 1; -1 after a mistake that ends it) and, while play follows the game's own solution,
    `expert_action`, its next step. There is no `state_key`: what a room shows does not tell closed containers and
    progress apart. The reward of a turn is the change of the score.

    ``reset(options={"game_seed": 10007})`` chooses the game, whatever the fold.

    Args:
        game: one of arithmetic, coin, cookingworld, mapreader, peckingorder, simonsays, sorting, twc.
        game_params: settings of the game, e.g. ``{"numLocations": 5, "includeDoors": 0}``; see the package.
        fold: ``train``, ``dev`` or ``test``; no game is in two.
        view: ``game``: what the game answers. ``full``: the room, the inventory and the possible actions under it.
        expert: have the game make its solution at every reset; costs 1 to 50 ms.

    Raises:
        UserError: the package or Java is missing, or an unknown game, fold or view; settings that the game refuses
            show at the first `reset`, which starts the Java VM.
    """

    provides = {"turn_rewards": {}}
    live: ClassVar[tuple[str, ...]] = ("_java",)
    _java: Any = None

    def __init__(
        self,
        *,
        game: str = "coin",
        game_params: dict[str, int] | None = None,
        fold: Fold = "train",
        view: Literal["game", "full"] = "game",
        expert: bool = True,
        render_mode: Literal["ansi"] | None = None,
    ) -> None:
        super().__init__()
        if game not in _GAMES:
            raise UserError(f"game={game!r}: one of {', '.join(_GAMES)}")
        if fold not in get_args(Fold):
            raise UserError(f"fold={fold!r}: one of 'train', 'dev', 'test'")
        if view not in ("game", "full"):
            raise UserError(f"view={view!r}: 'game' or 'full'")
        require("textworld_express", ENV_ID, "textworld-express")
        require_java(ENV_ID)
        self.game, self.fold, self.view, self.expert = game, fold, view, expert
        self.game_params = ",".join(f"{name}={int(value)}" for name, value in (game_params or {}).items())
        self.render_mode = render_mode
        self.instructions = "You are playing a text game. Answer with one action."

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        server = self._server()
        seed = options.get("game_seed")
        if seed is None:
            seed = self._seeds[int(self.np_random.integers(len(self._seeds)))]
        state = json.loads(server.generateNewGameJSON(int(seed), self.fold, self.expert))
        if "observation" not in state:
            raise UserError(f"{ENV_ID}: game {self.game!r} with seed {seed}: {state}")
        self._solution = list(server.getGoldActionSequence()) if self.expert else []
        self._score = 0.0
        self.instructions = f"You are playing a text game. {server.getTaskDescription()}\nAnswer with one action."
        self._take(state)
        return self._show(state), self._info(state)

    def parse_action(self, text: str) -> str:
        """Returns the admissible action that `text` is.

        Raises:
            ActionError: none. The game would only say that it does not understand.
        """
        return choose(text, self._admissible)

    def play(self, action: str) -> Step:
        state = json.loads(self._server().stepJSON(action))
        self._solution = self._solution[1:] if self._solution[:1] == [action] else []
        before, self._score = self._score, float(state["score"])
        self._take(state)
        ended = bool(state["tasksuccess"] or state["taskfailure"])
        return self._show(state), self._score - before, ended, self._info(state)

    def on_invalid(self, error: ActionError) -> Step:
        observation, reward, terminated, _ = super().on_invalid(error)
        return observation, reward, terminated, self._info(self._state)

    def close(self) -> None:
        """Ends the Java VM and waits for it."""
        java, self._java = self._java, None
        if java is not None:
            end_java(java)
        super().close()

    def _take(self, state: dict[str, Any]) -> None:
        self._state, self._admissible = state, sorted(state["validActions"])
        while self._solution and self._solution[0] not in self._admissible:
            del self._solution[0]  # solutions hold actions without effect, such as opening what is open

    def _show(self, state: dict[str, Any]) -> str:
        said = str(state["observation"]).strip()
        if self.view == "game":
            return said
        parts = [said, str(state["look"]).strip(), str(state["inventory"]).strip()]
        parts = [part for i, part in enumerate(parts) if part and part not in parts[:i]]
        return "\n".join([*parts, "Possible actions: " + ", ".join(self._admissible)])

    def _info(self, state: dict[str, Any]) -> dict[str, Any]:
        info = {
            "success": bool(state["tasksuccess"]),
            "admissible_actions": self._admissible,
            "score": float(state["score"]),
        }
        if self._solution:
            info["expert_action"] = self._solution[0]
        return info

    def _server(self) -> Any:
        """Returns the Java side, started on first use.

        Raises:
            UserError: the game refuses its settings.
            EnvironmentFailure: the Java VM did not start.
        """
        if self._java is None:
            package = require("textworld_express", ENV_ID, "textworld-express")
            try:
                java = package.TextWorldExpressEnv()
            except Exception as error:
                raise EnvironmentFailure(f"Java did not start: {type(error).__name__}: {error}") from error
            try:
                java.load(self.game, self.game_params)
            except ValueError as error:
                end_java(java)
                raise UserError(f"{ENV_ID}: game {self.game!r} refuses {self.game_params!r}: {error}") from error
            seeds = {"train": "getSeedsTrain", "dev": "getSeedsDev", "test": "getSeedsTest"}[self.fold]
            self._seeds = list(getattr(java.server, seeds)())
            self._java = java
        return self._java.server
