"""`ScienceWorldEnv`: the experiments of ScienceWorld (Wang et al., arXiv 2203.07540), each env with a Java VM.

The package's own `step` asks the simulator for six further texts each turn; here one question is one answer, which is
several times faster.
"""

from __future__ import annotations

import os
import threading
from typing import Any, ClassVar, Literal, get_args

from agentrl.envs.core import Step
from agentrl.errors import ActionError, EnvironmentFailure, UserError, unknown_name
from environments.adapters.base import LONGEST_ACTION, Adapter, end_java, require, require_java

ENV_ID = "ScienceWorld-v0"
Fold = Literal["train", "dev", "test"]

_STABLE_HASHES = "-XX:+UnlockExperimentalVMOptions -XX:hashCode=2"
"""The simulator orders objects by their identity hash; with constant ones a variation is the same in every VM."""
_UNKNOWN = "No known action matches that input."
_STARTING = threading.Lock()


class ScienceWorldEnv(Adapter):
    """An elementary-school science task in a house of ten rooms. The seed chooses a variation of the task.

    `info` holds `success`, `valid_action`, `score` (0 to 1; negative after a mistake that ends the task), `variation`,
    while play follows the simulator's own solution `expert_action`, and with `list_actions` also `admissible_actions`
    (sorted). There is no `state_key`. The reward of a turn is the change of the score.

    ``reset(options={"variation": 3})`` chooses the variation, whatever the fold.

    Args:
        task: one of 30, e.g. ``boil``, ``find-plant``, ``mendelian-genetics-known-plant``.
        fold: ``train``, ``dev`` or ``test``; no variation is in two.
        simplification: comma-separated, e.g. ``easy`` or ``openDoors,teleportAction``.
        expert: have the simulator make its solution at every reset.
        list_actions: ask at every turn what may be done; 10 to 100 ms each.

    Raises:
        UserError: the package or Java is missing, or an unknown fold; an unknown task or simplification shows at the
            first `reset`, which starts the Java VM.
    """

    provides = {"turn_rewards": {}}
    live: ClassVar[tuple[str, ...]] = ("_java",)
    _java: Any = None

    def __init__(
        self,
        *,
        task: str = "find-plant",
        fold: Fold = "train",
        simplification: str = "easy",
        expert: bool = True,
        list_actions: bool = False,
        render_mode: Literal["ansi"] | None = None,
    ) -> None:
        super().__init__()
        if fold not in get_args(Fold):
            raise UserError(f"fold={fold!r}: one of 'train', 'dev', 'test'")
        require("scienceworld", ENV_ID, "scienceworld")
        require_java(ENV_ID)
        self.task, self.fold, self.simplification = task, fold, simplification
        self.expert, self.list_actions, self.render_mode = expert, list_actions, render_mode
        self.instructions = "You are in a house with a laboratory. Answer with one action."

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        java = self._started()
        variation = options.get("variation")
        if variation is None:
            variation = self._variations[int(self.np_random.integers(len(self._variations)))]
        if not 0 <= int(variation) < self._total:
            raise UserError(f"variation={variation}: task {self.task!r} has 0 to {self._total - 1}")
        java.load(self.task, int(variation), self.simplification, self.expert)
        java.server.reset()
        self._variation, self._score = int(variation), 0.0
        self._solution = list(java.server.getGoldActionSequence()) if self.expert else []
        kinds = ", ".join(action for action in java.server.getPossibleActions() if action != "reset task")
        self.instructions = (
            f"You are in a house with a laboratory. {java.server.getTaskDescription()}\n"
            f"Answer with one action; put names of things for OBJ: {kinds}."
        )
        return str(java.server.step("look around")), self._info()

    def parse_action(self, text: str) -> str:
        """Returns `text` on one line. The simulator says what it understands; it also knows synonyms.

        Raises:
            ActionError: nothing, too much, or the simulator's own command to begin again.
        """
        action = " ".join(text[: LONGEST_ACTION + 1].split())
        if not action or len(text) > LONGEST_ACTION or action.lower() == "reset task":
            raise ActionError("answer with one action")
        return action.encode(errors="replace").decode()

    def play(self, action: str) -> Step:
        server = self._started().server
        said = str(server.step(action)).strip()
        self._solution = self._solution[1:] if self._solution[:1] == [action] else []
        before, self._score = self._score, float(server.getScore())
        ended = bool(server.getCompleted()) or self._score < 0
        info = {**self._info(), "success": self._score >= 1, "valid_action": not said.startswith(_UNKNOWN)}
        return said, self._score - before, ended, info

    def on_invalid(self, error: ActionError) -> Step:
        observation, reward, terminated, _ = super().on_invalid(error)
        return observation, reward, terminated, self._info()

    def close(self) -> None:
        """Ends the Java VM and waits for it."""
        java, self._java = self._java, None
        if java is not None:
            end_java(java)
        super().close()

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = {"score": self._score, "variation": self._variation}
        if self._solution:
            info["expert_action"] = self._solution[0]
        if self.list_actions:
            info["admissible_actions"] = sorted(self._java.server.getValidActionObjectCombinations())
        return info

    def _started(self) -> Any:
        """Returns the package's environment, its VM started on first use.

        Raises:
            UserError: an unknown task or simplification.
            EnvironmentFailure: the Java VM did not start.
        """
        if self._java is None:
            package = require("scienceworld", ENV_ID, "scienceworld")
            with _STARTING:  # the package passes no options on: they go through the process's environment
                before = os.environ.get("JAVA_TOOL_OPTIONS")
                os.environ["JAVA_TOOL_OPTIONS"] = f"{before or ''} {_STABLE_HASHES}".strip()
                try:
                    java = package.ScienceWorldEnv()
                except Exception as error:
                    raise EnvironmentFailure(f"Java did not start: {type(error).__name__}: {error}") from error
                finally:
                    if before is None:
                        del os.environ["JAVA_TOOL_OPTIONS"]
                    else:
                        os.environ["JAVA_TOOL_OPTIONS"] = before
            try:
                if self.task not in (tasks := java.get_task_names()):
                    raise UserError(f"{ENV_ID}: {unknown_name('task', self.task, tasks)}")
                java.load(self.task, 0, self.simplification)
            except (UserError, ValueError) as error:
                end_java(java)
                raise error if isinstance(error, UserError) else UserError(f"{ENV_ID}: {error}") from error
            folds = {"train": "getVariationsTrain", "dev": "getVariationsDev", "test": "getVariationsTest"}
            self._variations = list(getattr(java.server, folds[self.fold])())
            self._total = int(java.get_max_variations(self.task))
            self._java = java
        return self._java
