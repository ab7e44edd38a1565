"""`SearchQAEnv`: a question whose answer lies a few pages away, and three tools: search, open, answer."""

from __future__ import annotations

import hashlib
import re
import string
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from agentrl.envs.core import Step
from agentrl.envs.tools import ToolEnv, tool
from agentrl.errors import UserError
from environments.search_qa.index import build_index
from environments.search_qa.world import Question, build_world

Split = Literal["all", "train", "test"]
TEST_ONE_IN = 10
MAX_HOPS = 3
_SNIPPET = 60


class SearchQAEnv(ToolEnv):
    """Multi-hop questions over a synthetic encyclopedia.

    ``Who is the mayor of the birthplace of the author of the novel The Silent Harbour?`` takes three pages. The world
    follows from `world` and `pages`; the episode's seed draws the question. Reward: 1 for the right answer, after
    SQuAD's normalisation; the episode ends with the answer.

    `info` holds `success`, `valid_action`, `state_key` (the question and what is on screen) and `hops`.
    ``reset(options={"question": text})`` asks a question of the world, as `info` and observations write it.

    Args:
        hops: least and largest number of hops of a question (1..3); each number is drawn equally often.
        world: seed of the encyclopedia.
        pages: about how many pages it has (200..20,000).
        split: ``train`` and ``test`` never share a question.

    Raises:
        UserError: a setting out of its range, or the extra ``search`` is not installed.
    """

    provides = {"state_keys": {}}
    reward_range = (0.0, 1.0)
    local_arguments = frozenset({"world", "pages"})  # an encyclopedia of its own costs seconds and megabytes
    instructions = (
        "Answer the question from the encyclopedia: search for pages, open them by their exact title, and follow what "
        "they say until you know the answer. Several things may share a name; the title says which is meant."
    )

    def __init__(
        self,
        *,
        hops: tuple[int, int] = (1, MAX_HOPS),
        world: int = 0,
        pages: int = 3000,
        split: Split = "all",
        render_mode: Literal["ansi"] | None = None,
    ) -> None:
        super().__init__()
        least, most = hops
        if not 1 <= least <= most <= MAX_HOPS:
            raise UserError(f"hops={tuple(hops)}: least and largest number, from 1 to {MAX_HOPS}")
        if split not in get_args(Split):
            raise UserError(f"split={split!r}: one of 'all', 'train', 'test'")
        self.hops, self.split, self.render_mode = (least, most), split, render_mode
        self._origin = world, pages
        self.world, self.index = build_world(world, pages), build_index(world, pages)
        self._title_of = {title.lower(): title for title in self.world.titles}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("world", "index")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.world, self.index = build_world(*self._origin), build_index(*self._origin)

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        given = options.get("question")
        self.question = self._draw() if given is None else self._find(str(given))
        self._screen = ""
        return self._show("Nothing is open yet."), self.facts()

    @tool
    def search(self, query: str, top: Annotated[int, Field(ge=1, le=20)] = 5) -> str:
        """Lists the pages that match a query best.

        Args:
            query: words to look for
            top: number of pages
        """
        titles = [self.world.titles[number] for number in self.index.search(query, top)]
        self._screen = "; ".join(titles)
        lines = [f"{i}. {title}: {_shortened(self.world.pages[title])}" for i, title in enumerate(titles, 1)]
        return self._show("\n".join(["Results:", *lines]) if lines else "No page matches.")

    @tool
    def open(self, title: str) -> str:
        """Shows a page.

        Args:
            title: exact title, as search lists it
        """
        found = self._title_of.get(title.strip().lower())
        if found is None:
            self._screen = ""
            return self._show(f"No page has the title {title[:60]!r}; use a title that search lists.")
        self._screen = f"page {found}"
        return self._show(f"Page: {found}\n{self.world.pages[found]}")

    @tool
    def answer(self, text: str) -> Step:
        """Gives the answer and ends the episode.

        Args:
            text: the answer alone, in as few words as it takes
        """
        right = normalised(text) in map(normalised, self.question.golds)
        self._screen = "answered"
        return self._show("Correct." if right else "Wrong."), float(right), True, {"success": right}

    def facts(self) -> dict[str, Any]:
        return {"state_key": f"{self.question.text}\n{self._screen}", "hops": len(self.question.relations)}

    def _show(self, text: str) -> str:
        return f"Question: {self.question.text}\n{text}"

    def _draw(self) -> Question:
        hops = int(self.np_random.integers(self.hops[0], self.hops[1] + 1))
        while True:  # every kind but river has chains of all lengths, every tenth question is a test question
            start = self.world.everything[int(self.np_random.integers(len(self.world.everything)))]
            chains = self.world.chains(start, hops)
            if chains:
                question = chains[int(self.np_random.integers(len(chains)))]
                if in_split(question.text, self.split):
                    return question

    def _find(self, text: str) -> Question:
        """Returns the question of this world that reads `text`."""
        for start in self.world.everything:
            if text.endswith(f" {start.mention}?"):
                for hops in range(1, MAX_HOPS + 1):
                    for question in self.world.chains(start, hops):
                        if question.text == text:
                            return question
        raise UserError(f"question={text!r:.120} is no question of this world")


def in_split(question: str, split: Split) -> bool:
    """Whether a question belongs to `split`: one in `TEST_ONE_IN` is a test question, by a hash of its text."""
    if split == "all":
        return True
    digest = hashlib.sha256(question.encode()).digest()
    return (int.from_bytes(digest[:8], "big") % TEST_ONE_IN == 0) == (split == "test")


_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """Returns an answer as SQuAD's evaluation compares it: lower case, no punctuation, articles or extra space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _shortened(text: str) -> str:
    return text if len(text) <= _SNIPPET else text[:_SNIPPET].rsplit(" ", 1)[0] + " ..."
