"""Scripted shoppers. They read the page, its buttons (``info["available_actions"]``) and their own last actions only.

The expert takes the goal apart as it is worded: ``... red mug with color: red, and size: large, and price lower than
40.00 dollars``; of instructions that people wrote, it takes the options whose values they mention.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from agentrl.errors import UserError
from agentrl.policy import FunctionPolicy, Policy, PolicyAction, PolicyRequest
from agentrl.types import text_of
from environments.webshop.goods import listed

_BUTTONS = {"back to search", "< prev", "next >", "description", "features", "reviews", "attributes", "buy now"}
_LONG_NAMES = {"prev": "< prev", "next": "next >", "back": "back to search", "buy": "buy now"}
_TELLING = ("attributes", "features", "description")
"""Pages that tell a product's attributes, the surest first."""
_LIMIT = re.compile(r",? and price lower than ([\d.]+) dollars")
_OPTION = re.compile(r"(?:with|, and) ([\w ]+?): (.+?)(?=, and [\w ]+?: |$)")
_MONEY = re.compile(r"\$([\d.]+)")
_FILLER = frozenset(
    listed(
        "a, am, an, and, are, at, buy, can, find, for, i, i'd, i'm, im, in, is, it, like, looking, me, "
        "need, of, on, or, please, that, the, to, want, with, would"
    )
)


@dataclass
class Goal:
    """What an instruction asks for, as read."""

    words: list[str]
    """Of kind and attributes."""
    options: dict[str, str]
    """Option name -> value, as far as the instruction names them; with short pages the names are the values."""
    limit: float
    text: str


@dataclass
class Page:
    """What a page shows. `kind` is search, results, item or sub (description, features, ...)."""

    kind: str
    goal: Goal
    text: str = ""
    items: list[tuple[str, str, float]] = field(default_factory=list)
    """Results: what to click, the text beside it, the highest price."""
    options: list[tuple[str, list[str]]] = field(default_factory=list)
    more: bool = False
    """Whether there is a next page of results."""
    short: bool = False
    """Whether it is a short page, with its short names of buttons."""

    def button(self, name: str) -> str:
        """Returns what the page calls the button that is `name` on short pages."""
        return name if self.short else _LONG_NAMES[name]


@dataclass
class _Memory:
    """Of one episode: what was bought or seen cannot be read off the current page."""

    rejected: set[tuple[int, str]] = field(default_factory=set)
    """(page of results, what to click) of the products looked at in vain."""
    results: int = 0
    current: tuple[int, str] = (0, "")
    text: str = ""
    """All that was read about the current product."""
    read: set[str] = field(default_factory=set)
    chosen: set[str] = field(default_factory=set)


def read_page(observation: str, buttons: Sequence[str]) -> Page:
    """Returns what a page shows, in whichever of the three forms.

    Args:
        observation: the environment's text, perhaps below an error line.
        buttons: what can be clicked, in lower case.
    """
    if observation.startswith("Invalid action:"):
        observation = observation.partition("\n")[2]
    if observation.startswith("want "):
        return _read_short(observation)
    if " [SEP] " in observation:
        parts = observation.split(" [SEP] ")
    else:
        lines = [line.strip() for line in observation.splitlines() if not line.startswith("You have clicked")]
        parts = [
            re.sub(r"^\[(?:clicked )?button\] (.*) \[(?:clicked )?button_\]$", r"\1", line) for line in lines if line
        ]
    parts = parts[parts.index("Instruction:") + 1 :]
    goal, body = _goal(parts[0]), parts[1:]
    if body[-1] == "Search" and len(body) == 1:
        return Page("search", goal)
    if len(body) > 1 and re.match(r"Page \d+ \(Total results: \d+\)", body[1]):
        rest = [part for part in body[2:] if part not in ("< Prev", "Next >")]
        items = [(rest[i].lower(), rest[i + 1], _highest(rest[i + 2])) for i in range(0, len(rest) - 2, 3)]
        return Page("results", goal, items=items, more="Next >" in body[2:4])
    if body[-1] == "Buy Now":
        prices = [i for i, part in enumerate(body) if part.startswith("Price: ")]
        return Page("item", goal, " ".join(body[2 : prices[0]]), options=_options(body[2 : prices[0] - 1], buttons))
    return Page("sub", goal, " ".join(body[2:]))


def _read_short(observation: str) -> Page:
    first, *lines = observation.splitlines()
    goal = Goal(first.split()[1:], {}, float("inf"), "")
    if lines and lines[0].startswith("with "):
        lines.pop(0)
    if lines and lines[0].startswith("under "):
        goal.limit = float(lines.pop(0).split()[1])
    if not lines:
        return Page("search", goal, short=True)
    if lines[-1].startswith("page "):
        rows = [line.split() for line in lines[:-1] if not line.endswith(" seen")]
        items = [(row[0], " ".join(row[1:-1]), float(row[-1])) for row in rows]
        return Page("results", goal, items=items, more=lines[-1].endswith("more"), short=True)
    goal.options = {value: value for value in re.findall(r"\[(.*?)\]", lines[-1])}
    return Page("item", goal, lines[0], short=True)


def _goal(instruction: str) -> Goal:
    limit = _LIMIT.search(instruction)
    text = _LIMIT.sub("", instruction)
    options = dict(_OPTION.findall(text)) if ": " in text else {}
    head = _OPTION.sub("", text) if options else text
    words = [word for word in re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", head.lower()) if word not in _FILLER]
    return Goal(words, options, float(limit[1]) if limit else float("inf"), text)


def _options(parts: Sequence[str], buttons: Sequence[str]) -> list[tuple[str, list[str]]]:
    values, found = {*buttons} - _BUTTONS, list[tuple[str, list[str]]]()
    for part in parts:
        if " ".join(part.lower().split()) in values and found:
            found[-1][1].append(part)
        else:
            found.append((part, []))
    return found


def _highest(tag: str) -> float:
    return max(map(float, _MONEY.findall(tag)), default=float("inf"))


def _mentions(text: str, word: str) -> bool:
    """Whether `text` has `word`, in singular or plural."""
    stem = word[:-1] if word.endswith("s") and not word.endswith("ss") else word
    return re.search(rf"(?<!\w){re.escape(stem)}s?(?!\w)", text.lower()) is not None


class ExpertPolicy(Policy):
    """Looks for a product that has everything asked for, chooses its options, and buys it.

    A page of results is read from the top; a product that is too dear, lacks an option, or lacks an attribute on
    title, attributes page, features and description is left for the next. Towards the turn limit it checks less.

    Args:
        skill: probability of such an action at each turn; else one of the admissible ones, uniformly.
        max_turns: the environment's turn limit.

    Raises:
        UserError: `skill` outside [0, 1].
    """

    def __init__(self, skill: float = 1.0, max_turns: int = 15) -> None:
        if not 0 <= skill <= 1:
            raise UserError(f"skill={skill}: a probability between 0 and 1")
        self.skill, self.max_turns = skill, max_turns
        self.name = "webshop-expert" if skill == 1 else f"webshop-noisy-expert(skill={skill:g})"
        self._memories: dict[str, _Memory] = {}

    async def act(self, requests: Sequence[PolicyRequest]) -> list[PolicyAction]:
        return [PolicyAction(text=self._act(request)) for request in requests]

    def release(self, episode: str) -> None:
        self._memories.pop(episode, None)

    def _act(self, request: PolicyRequest) -> str:
        if request.turn == 0:
            self._memories[request.episode] = _Memory()
        memory, rng = self._memories.setdefault(request.episode, _Memory()), random.Random(request.seed)
        buttons = request.info.get("available_actions", {}).get("clickables", [])
        page = read_page(text_of(request.observation), buttons)
        what = self._decide(page, memory, buttons, self.max_turns - request.turn)
        if page.kind == "search":
            action = "search" if page.short else f"search[{' '.join([*page.goal.words, *page.goal.options.values()])}]"
        else:
            action = what if page.short else f"click[{what}]"
        if rng.random() >= self.skill:
            action = rng.choice(request.info.get("admissible_actions") or [action])
        self._remember(page, memory, action.removeprefix("click[").removesuffix("]").lower())
        return action

    def _decide(self, page: Page, memory: _Memory, buttons: Sequence[str], left: int) -> str:
        """Returns what to click, with `left` turns to go; notes what is learnt from the page."""
        if page.kind == "results":
            return self._pick(page, memory, left)
        memory.text = f"{memory.text} {page.text}"
        if page.kind != "item":
            return page.button("prev")
        wanted, lacking = self._wanted(page, buttons)
        missing = [word for word in page.goal.words if not _mentions(memory.text, word)]
        hurried = left < len(wanted) + 4
        if lacking and not hurried:
            return self._reject(page, memory)
        if missing and not hurried and not page.short:
            unread = [name for name in _TELLING if name in buttons and name not in memory.read]
            return unread[0] if unread and "attributes" not in memory.read else self._reject(page, memory)
        return next((value for value in wanted if value not in memory.chosen), page.button("buy"))

    @staticmethod
    def _pick(page: Page, memory: _Memory, left: int) -> str:
        """Returns the best result that was not yet looked at in vain, else the way to the next page."""
        goal, enough = page.goal, all if page.short else any  # short pages list attributes, titles the kind alone
        fresh = [item for item in page.items if (memory.results, item[0]) not in memory.rejected]
        fit = [item for item in fresh if item[2] <= goal.limit and enough(_mentions(item[1], w) for w in goal.words)]
        if fit or (left < 5 and page.items):
            return (fit or fresh or page.items)[0][0]
        if page.more:
            return page.button("next")
        return page.items[0][0] if page.items else page.button("back")

    @staticmethod
    def _reject(page: Page, memory: _Memory) -> str:
        memory.rejected.add(memory.current)
        return page.button("prev")

    @staticmethod
    def _wanted(page: Page, buttons: Sequence[str]) -> tuple[list[str], bool]:
        """Returns the values to choose, and whether one that the instruction names is not to be had."""
        goal = page.goal
        if page.short:
            # The last one first: next to the answer, it is what a small model finds soonest.
            wanted = [value for value in reversed(goal.options) if value in buttons]
            return wanted, len(wanted) < len(goal.options)
        wanted = []
        for name, values in page.options:
            if name in goal.options:
                wanted += [value for value in values if value == goal.options[name]]
            elif not goal.options:
                wanted += sorted((value for value in values if _mentions(goal.text, value)), key=len)[-1:]
        return [" ".join(value.split()) for value in wanted], len(wanted) < len(goal.options)

    @staticmethod
    def _remember(page: Page, memory: _Memory, clicked: str) -> None:
        if page.kind == "search":
            memory.results, memory.rejected = 1, set()
        elif page.kind == "results":
            memory.results += {"next >": 1, "next": 1, "< prev": -1, "prev": -1}.get(clicked, 0)
            beside = {item[0]: item[1] for item in page.items}
            if clicked in beside:
                memory.current, memory.text = (memory.results, clicked), beside[clicked]
                memory.read, memory.chosen = set(), set()
        elif page.kind == "item":
            memory.read.add(clicked)
            memory.chosen.add(clicked)


def expert_policy(max_turns: int = 15) -> Policy:
    """Returns the policy that buys what the instruction asks for (see `ExpertPolicy`)."""
    return ExpertPolicy(1.0, max_turns)


def noisy_expert_policy(skill: float = 0.5, max_turns: int = 15) -> Policy:
    """Returns `ExpertPolicy`: the expert with probability `skill` at each turn, else a random admissible action.

    Raises:
        UserError: `skill` outside [0, 1].
    """
    return ExpertPolicy(skill, max_turns)


def naive_policy() -> Policy:
    """Returns the one-shot shopper: searches for the instruction, opens the first result, buys it as it is."""

    def act(request: PolicyRequest) -> str:
        actions = request.info["admissible_actions"]
        if request.info["available_actions"]["has_search_bar"]:
            return str(actions[0])
        page = read_page(text_of(request.observation), request.info["available_actions"]["clickables"])
        if page.kind == "results":
            what = page.items[0][0] if page.items else page.button("back")
        else:
            what = page.button("buy")
        return what if page.short else f"click[{what}]"

    return FunctionPolicy(act, name="webshop-naive")
