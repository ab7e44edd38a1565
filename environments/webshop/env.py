"""`WebShopEnv`: search, compare, choose options, buy. Protocol, texts and reward are those of Yao et al. 2022."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from agentrl.envs import TextEnv
from agentrl.envs.core import Step
from agentrl.errors import ActionError, UserError
from environments.webshop import pages
from environments.webshop.goods import Goal, Product
from environments.webshop.pages import BACK, BUY, LETTERS, NEXT, PREV, SUB_PAGES, Observation, Segment
from environments.webshop.reward import purchase_reward
from environments.webshop.shop import Shop, ShopSettings, Split, check_split, load_shop

MOST_RESULTS = 50
"""Hits of one search, as in the original."""
_LONGEST_QUERY, _LONGEST_ACTION = 500, 2000
_ACTION = re.compile(r"(search|click)\s*\[(.+)\]", re.DOTALL | re.IGNORECASE)
_PARTS = (
    *("r_type", "query_match", "category_match", "title_score"),
    *("r_att", "w_att", "r_option", "w_option", "r_price", "w_price"),
)

_RULES = """You are shopping on the web: find the product that the instruction asks for, choose its options, and buy it.
Actions: search[words] where there is a search bar, click[text] for anything clickable on the page.
"Buy Now" ends the episode. What counts: kind of product, attributes, options, price.
Answer with one action."""

_SHORT_RULES = """Find the wanted product, choose the wanted options, and buy it. Prices are in tens of dollars.
Answer: search, perhaps with words of your own; the letter of a result; an option; next, prev, back or buy."""


class WebShopEnv(TextEnv):
    """The web shop in text.

    `info` holds `success` (a reward of exactly 1), `valid_action`, `available_actions` (the original's
    ``has_search_bar`` and ``clickables``), `admissible_actions` (the clicks; on the search page, a search for the whole
    instruction, out of all there are), `state_key` (goal, page, query, page number, product, chosen options) and
    `reward_parts` (see `environments.webshop.reward.purchase_reward`; zeros until something is bought).

    ``reset(options={"goal": 3})`` plays the split's goal 3 instead of a drawn one.

    Args:
        products: size of the synthetic catalogue (default 5,000), or the number of entries of `items` to read.
        kinds: how many kinds of products the synthetic catalogue has, at most (default: all).
        catalogue_seed: another one, another synthetic catalogue.
        items: the original's ``items_shuffle*.json``; None: the synthetic catalogue.
        attributes: its ``items_ins_v2*.json``; needed with `items`.
        human_goals: its ``items_human_ins.json``; None: goals are made from `attributes`.
        reviews: its review file.
        cache_dir: folder where products and index of the files are kept on disk and memory-mapped: built once, opened
            in seconds ever after, also with 1.18 M products.
        split: ``train`` and ``test`` never share a goal. Of files, the test goals are the original's: the first 500
            (at most a tenth) of its shuffled order; of the synthetic catalogue, every tenth by a hash of the
            instruction.
        observation: ``text`` and ``text_rich``: the original's. ``short``: a few lower-case lines with the goal in
            fields and a result's attributes beside it, and answers of one word: for tiny models.
        page_size: results on a page (1..26).
        show_attributes: whether product pages have the original's attributes page.

    Raises:
        UserError: a setting out of range, or the libraries of ``agentrl[webshop]`` are not installed.
        DataError: a broken file.
    """

    provides = {"state_keys": {}}
    reward_range = (0.0, 1.0)

    _goal: Goal
    _page: str
    """``search``, ``results``, ``item``, or the name of a sub page."""
    _query: str
    _hits: list[int]
    """Positions of the products found."""
    _at: int
    """Page of results, from 1."""
    _item: int
    """Position of the product on show, -1 where there is none."""
    _chosen: dict[str, str]
    _product: Product
    _visited: set[str]

    # The last three: a catalogue of its own costs seconds and megabytes, and few are kept.
    local_arguments = frozenset(
        {"items", "attributes", "human_goals", "reviews", "cache_dir", "products", "kinds", "catalogue_seed"}
    )

    def __init__(
        self,
        *,
        products: int | None = None,
        kinds: int | None = None,
        catalogue_seed: int = 0,
        items: str | Path | None = None,
        attributes: str | Path | None = None,
        human_goals: str | Path | None = None,
        reviews: str | Path | None = None,
        cache_dir: str | Path | None = None,
        split: Split = "all",
        observation: Observation = "text",
        page_size: int = 10,
        show_attributes: bool = True,
        render_mode: Literal["ansi"] | None = None,
    ) -> None:
        super().__init__()
        check_split(split)
        if observation not in get_args(Observation):
            raise UserError(f"observation={observation!r}: one of {', '.join(map(repr, get_args(Observation)))}")
        if not 1 <= page_size <= len(LETTERS):
            raise UserError(f"page_size={page_size}: 1 to {len(LETTERS)} results on a page")
        paths = (None if path is None else str(path) for path in (items, attributes, human_goals, reviews, cache_dir))
        self.settings = ShopSettings(products, kinds, catalogue_seed, *paths)
        if not self.shop.splits[split]:
            raise UserError(f"split={split!r} of {len(self.shop.goals)} goals is empty; raise products=")
        self.split, self.observation, self.page_size = split, observation, page_size
        self.show_attributes, self.render_mode = show_attributes, render_mode
        # Of a large file, a search takes longer and may wait for the disk.
        self.fast = items is None  # type: ignore[misc]
        self.instructions = _SHORT_RULES if observation == "short" else _RULES

    @property
    def shop(self) -> Shop:
        """What the episodes of this process share; not part of a pickled environment."""
        return load_shop(self.settings)

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        goals = self.shop.splits[self.split]
        number = options.get("goal")
        if number is None:
            number = int(self.np_random.integers(len(goals)))
        elif not isinstance(number, int) or not 0 <= number < len(goals):
            raise UserError(f"goal={number!r}: split={self.split!r} has goals 0 to {len(goals) - 1}")
        self._number = goals[number]
        self._goal = self.shop.goals[self._number]
        self._visited = set()
        self._parts = dict.fromkeys(_PARTS, 0.0)
        self._success = False
        self._to_search()
        return self._show(), self._info()

    def parse_action(self, text: str) -> tuple[str, str]:
        """Returns (``search``, words) or (``click``, what): of ``search[red mug]``, ``Action: click[buy now]``,
        ``<answer>click[buy now]</answer>``; with short observations also of ``search red mug``, ``buy``.

        Raises:
            ActionError: anything else, a search without search bar, or a click on what is not there.
        """
        bare = _unwrapped(text).strip()
        if match := _ACTION.fullmatch(bare[:_LONGEST_ACTION]):
            name, argument = match[1].lower(), match[2].strip()
        elif self.observation == "short":
            first, _, rest = bare.partition(" ")
            name, argument = ("search", rest or pages.short_query(self._goal)) if first == "search" else ("click", bare)
        else:
            raise ActionError("answer with search[words] or click[text]")
        if name == "search":
            if self._page != "search":
                raise ActionError(f"there is no search bar here; {self._name(BACK)} leads to it")
            if not argument or len(argument) > _LONGEST_QUERY:
                raise ActionError(f"search for 1 to {_LONGEST_QUERY} characters")
            return "search", _plain(argument)
        targets = self._targets()
        if (target := targets.get(_plain(argument))) is None:
            listed = ", ".join([*targets][:40]) or "only a search"
            raise ActionError(f"{argument[:40]!r} cannot be clicked here; possible: {listed}")
        return "click", target

    def play(self, action: tuple[str, str]) -> Step:
        name, what = action
        reward = 0.0
        if name == "search":
            self._query, self._hits = what, self.shop.index.search(what, MOST_RESULTS)
            self._to_results(1)
        elif what == BUY:
            reward, self._parts = purchase_reward(self._product, self._goal, self._chosen)
            self._success = reward == 1
            return "You bought it. The episode is over.", reward, True, self._info(over=True)
        else:
            self._click(what)
        return self._show(), reward, False, self._info()

    def on_invalid(self, error: ActionError) -> Step:
        observation, reward, terminated, _ = super().on_invalid(error)
        if self.observation == "short":  # an error line is more than a tiny model has learnt to read
            observation = self._last
        return observation, reward, terminated, self._info()

    def _click(self, what: str) -> None:
        if what == BACK:
            self._to_search()
        elif what == NEXT:
            self._to_results(self._at + 1)
        elif what == PREV:
            if self._page == "results":
                self._to_results(self._at - 1)
            elif self._page == "item":
                self._to_results(self._at)
            else:
                self._page = "item"
        elif self._page == "item" and what in SUB_PAGES:
            self._page = what
        elif self._page == "results":
            [self._item] = [hit for hit in self._shown_hits() if self.shop.products[hit].asin == what]
            self._product = self.shop.products[self._item]
            self._page = "item"
            self._visited.add(what)
        else:
            # A value may stand under two names; as in the original the last one takes it.
            name = [name for name, values in self._product.options.items() if what in values][-1]
            self._chosen[name] = what

    def _to_search(self) -> None:
        self._page = "search"
        self._query = ""
        self._hits = []
        self._at = 0
        self._item = -1
        self._chosen = {}

    def _to_results(self, number: int) -> None:
        self._page, self._at, self._item, self._chosen = "results", number, -1, {}

    def _shown_hits(self) -> list[int]:
        return self._hits[(self._at - 1) * self.page_size : self._at * self.page_size]

    def _segments(self) -> list[Segment]:
        instruction = self._goal.instruction_text
        if self._page == "search":
            return pages.search_page(instruction)
        if self._page == "results":
            products = [self.shop.products[hit] for hit in self._shown_hits()]
            total = len(self._hits)
            return pages.results_page(instruction, products, self._at, self.page_size, total, self._visited)
        if self._page == "item":
            return pages.item_page(instruction, self._product, self._chosen, self.show_attributes)
        return pages.sub_page(instruction, self._product, self._page)

    def _targets(self) -> dict[str, str]:
        """Returns what can be clicked: as the agent writes it, in lower case -> its text on the page."""
        segments = [segment for segment in self._segments() if segment.clickable]
        if self.observation != "short":
            return {_plain(segment.text): segment.text for segment in segments}
        letters = iter(LETTERS)
        shown = [segment for segment in segments if segment.text not in SUB_PAGES or segment.kind == "option"]
        return {next(letters) if s.kind == "link" else _plain(self._name(s.text)): s.text for s in shown}

    def _name(self, text: str) -> str:
        """Returns what the agent writes for a button."""
        if self.observation != "short":
            return text
        return {BACK: "back", PREV: "prev", NEXT: "next", BUY: "buy"}.get(text, text)

    def _show(self) -> str:
        if self.observation == "text":
            return pages.to_text(self._segments())
        if self.observation == "text_rich":
            return pages.to_rich_text(self._segments())
        lines = pages.short_goal(self._goal)
        if self._page == "results":
            products = [self.shop.products[hit] for hit in self._shown_hits()]
            last = self._at * self.page_size >= len(self._hits)
            lines += pages.short_results(products, self._at, last, self._visited)
        elif self._page == "item":
            lines += pages.short_item(self._product, self._goal, self._chosen.values())
        return "\n".join(lines)

    def _info(self, *, over: bool = False) -> dict[str, Any]:
        clickables = [] if over else [*self._targets()]
        searching = self._page == "search"
        if self.observation == "short":
            actions = ["search"] if searching else clickables
        else:
            clicks = [f"click[{what}]" for what in clickables]
            actions = [f"search[{self._goal.instruction_text[:_LONGEST_QUERY]}]"] if searching else clicks
        asin = self.shop.products[self._item].asin if self._item >= 0 else ""
        chosen = sorted(self._chosen.items())
        visited = sorted(self._visited) if self.observation != "text" else []
        page = "over" if over else self._page
        return {
            "success": self._success,
            "admissible_actions": actions,
            "available_actions": {"has_search_bar": searching, "clickables": clickables},
            "state_key": repr((self._number, page, self._query, self._at, asin, chosen, visited)),
            "reward_parts": dict(self._parts),
        }


def _plain(text: str) -> str:
    """Returns `text` in lower case with single spaces: how clicks are compared."""
    return " ".join(text.lower().split())


def _unwrapped(text: str) -> str:
    """Returns the action inside ``<answer>``, ``<action>`` or after ``Action:``, where there is one."""
    for start, end in (("<answer>", "</answer>"), ("<action>", "</action>"), ("Action:", "\n")):
        if start in text:
            return text.rpartition(start)[2].strip().partition(end)[0]
    return text
