"""`ReasoningGymEnv`: the task generators of reasoning-gym (arXiv 2505.24760): a question, an answer, a verifier."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, ClassVar, Literal

from agentrl.envs.core import Step
from agentrl.errors import UserError, unknown_name
from environments.adapters.base import Adapter, BorrowedRandom, require
from environments.adapters.scorer import Scorer, generated

ENV_ID = "ReasoningGym-v0"
Split = Literal["all", "train", "test"]
TEST_ONE_IN = 10

_INSTRUCTIONS = (
    "Answer the question. Reason first if you like, then give the final answer, and nothing else, between "
    "<answer> and </answer>."
)


class ReasoningGymEnv(Adapter):
    """One question; the last ``<answer>...</answer>`` in the text, or the text itself without one, is the answer.

    `info` holds `success` (a score of 1), `valid_action` (something was answered), `score` (0 to 1, also the reward),
    `item` (which question of the data set), `expert_action` (the right answer, where there is only one) and, where the
    scorer raised or ran out of time, `scoring_error`: a wrong answer. There is no `state_key`: nothing outlives a turn.

    ``reset(options={"item": 17})`` chooses the question, whatever the split.

    Args:
        dataset: name of the generator, e.g. ``chain_sum``, ``countdown``, ``mini_sudoku``, ``zebra_puzzles``.
        config: settings of the generator, e.g. ``{"min_terms": 3}``.
        size: questions of the data set; a few generators make them all at the start and want it smaller.
        data_seed: seed of the data set. Question i depends on ``data_seed + i`` alone.
        split: one question in `TEST_ONE_IN` is a test question, by its number. Small generators repeat themselves:
            equal questions may then stand in both.
        attempts: answers that may be given; after a wrong one the agent is asked again.
        scoring_s: seconds for scoring one answer.

    Raises:
        UserError: the package is missing, no such generator, or it refuses its settings.
    """

    live: ClassVar[tuple[str, ...]] = ("_dataset", "_scorer", "_entry")
    _dataset: Any = None
    _scorer: Scorer | None = None
    _entry: Any = None

    def __init__(
        self,
        *,
        dataset: str = "chain_sum",
        config: dict[str, Any] | None = None,
        size: int = 100_000,
        data_seed: int = 0,
        split: Split = "all",
        attempts: int = 1,
        scoring_s: float = 5.0,
        render_mode: Literal["ansi"] | None = None,
    ) -> None:
        super().__init__()
        if split not in ("all", "train", "test"):
            raise UserError(f"split={split!r}: one of 'all', 'train', 'test'")
        if size < TEST_ONE_IN:
            raise UserError(f"size={size}: at least {TEST_ONE_IN} questions")
        if attempts < 1 or scoring_s <= 0:
            raise UserError(f"attempts={attempts}, scoring_s={scoring_s}: at least one answer, and time to score it")
        self.dataset, self.config, self.size, self.data_seed = dataset, dict(config or {}), size, data_seed
        self.split, self.attempts, self.scoring_s = split, attempts, scoring_s
        self.render_mode = render_mode
        self.instructions = _INSTRUCTIONS
        self._load()

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if self._dataset is None:
            self._load()
        item = options.get("item")
        item = self._draw() if item is None else int(item)
        if not 0 <= item < self.size:
            raise UserError(f"item={item}: the data set has questions 0 to {self.size - 1}")
        self._entry = generated(self._dataset, item)
        self._item, self._left = item, self.attempts
        return str(self._entry["question"]), self._info()

    def parse_action(self, text: str) -> str:
        """Returns the answer in `text`; everything is one, the empty one too."""
        if "<answer>" in text:
            text = text.rpartition("<answer>")[2].partition("</answer>")[0]
        return text.strip()

    def play(self, action: str) -> Step:
        assert self._scorer is not None
        score, error = self._scorer.score(action, self._item, self._entry)
        success = score >= 1.0 - 1e-9
        self._left -= 1
        info = {**self._info(), "success": success, "valid_action": bool(action), "score": score}
        if error:
            info["scoring_error"] = error
        if success or not self._left:
            return "Correct." if success else "Wrong.", score, True, info
        return f"Wrong. Answers left: {self._left}.\n{self._entry['question']}", 0.0, False, info

    def close(self) -> None:
        """Ends the process that scores, unless other instances use it."""
        if self._scorer is not None:
            self._scorer.close()
        super().close()

    def _info(self) -> dict[str, Any]:
        answer = self._entry["answer"]
        return {"item": self._item} | ({} if answer is None else {"expert_action": str(answer)})

    def _draw(self) -> int:
        while True:
            item = int(self.np_random.integers(self.size))
            if self.split == "all" or (item % TEST_ONE_IN == 0) == (self.split == "test"):
                return item

    def _load(self) -> None:
        require("reasoning_gym", ENV_ID, "reasoning-gym")
        factory = importlib.import_module("reasoning_gym.factory")
        if self.dataset not in factory.DATASETS:
            raise UserError(f"{ENV_ID}: {unknown_name('dataset', self.dataset, factory.DATASETS)}")
        settings = {**self.config, "size": self.size, "seed": self.data_seed}
        try:
            with BorrowedRandom(self.data_seed % 2**32).lend():
                self._dataset = factory.create_dataset(self.dataset, **settings)
        except Exception as error:
            fields = ", ".join(field.name for field in dataclasses.fields(factory.DATASETS[self.dataset][1]))
            raise UserError(
                f"{ENV_ID}: dataset {self.dataset!r} refuses {settings}: {error or type(error).__name__}; "
                f"its settings: {fields}"
            ) from error
        self._scorer = Scorer(self.dataset, settings, self._dataset, self.scoring_s)
