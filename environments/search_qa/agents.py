"""Scripted agents for SearchQA. They read observations alone, as a model would, and no hidden state.

The wordings of relations are known to them, as English is to a model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from agentrl.envs.calls import ToolCall
from agentrl.policy import FunctionPolicy, Policy, PolicyAction, PolicyRequest
from agentrl.types import text_of
from environments.search_qa.world import RELATIONS, Relation

_KINDS = "|".join(sorted(RELATIONS, key=len, reverse=True))
_MENTION = re.compile(rf"the ({_KINDS}) ((?:The )?[A-Z].*)")
_HIT = re.compile(rf"^\d+\. (.+ \((?:{_KINDS})\)): ", re.M)
_PAGE = re.compile(r"^Page: (.+)\n(.+)$", re.M)
_BY_NOUN = {relation.noun: relation for relations in RELATIONS.values() for relation in relations}


def read_question(observation: str) -> tuple[str, list[Relation]]:
    """Returns the mention that the question starts from and its relations in the order of the hops."""
    text = observation[observation.index("Question: ") :].partition("\n")[0].removesuffix("?")
    head = text.partition(" is ")[2]
    relations: list[Relation] = []
    while True:
        noun, of, rest = head.removeprefix("the ").partition(" of ")
        if not of or noun not in _BY_NOUN:
            return head, relations[::-1]
        relations.append(_BY_NOUN[noun])
        head = rest


def read_fact(page: str, relation: Relation) -> str | None:
    """Returns what a page says about a relation: a mention or a value; None where it says nothing."""
    for wording in relation.wordings:
        before, after = wording.split("{}")
        value = r"\w+" if relation.target is None else rf"[Tt]he (?:{_KINDS}) [^.]+?"
        if found := re.search(rf"(?:^|(?<=\. )){re.escape(before)}({value}){re.escape(after)}", page):
            return found[1][0].lower() + found[1][1:] if relation.target else found[1]
    return None


def title_of(mention: str) -> str:
    """Returns the title of what a text mentions: ``the city Arlen`` -> ``Arlen (city)``."""
    found = _MENTION.fullmatch(mention)
    return f"{found[2]} ({found[1]})" if found else mention


def name_of(mention: str) -> str:
    """Returns the name alone; a plain value as it is."""
    found = _MENTION.fullmatch(mention)
    return found[2] if found else mention


class ExpertPolicy(Policy):
    """Follows the hops: searches each thing, opens its page, reads on, and answers. Remembers what it has seen."""

    name = "search-qa-expert"

    def __init__(self) -> None:
        self._seen: dict[str, list[str]] = {}

    async def act(self, requests: Sequence[PolicyRequest]) -> list[PolicyAction]:
        return [PolicyAction(text=str(self._next(request))) for request in requests]

    def release(self, episode: str) -> None:
        self._seen.pop(episode, None)

    def _next(self, request: PolicyRequest) -> ToolCall:
        if request.turn == 0:
            self._seen[request.episode] = []
        seen = self._seen.setdefault(request.episode, [])
        seen.append(text_of(request.observation))
        at, relations = read_question(seen[-1])
        for observation in seen:
            page = _PAGE.search(observation)
            if page and relations and page[1] == title_of(at) and (fact := read_fact(page[2], relations[0])):
                at, relations = fact, relations[1:]
        if not relations:
            return ToolCall("answer", {"text": name_of(at)})
        title = title_of(at)
        if title in _HIT.findall(seen[-1]):
            return ToolCall("open", {"title": title})
        # Results on screen without the title: look further down.
        return ToolCall("search", {"query": title, "top": 20 if _HIT.search(seen[-1]) else 5})


def _naive(request: PolicyRequest) -> str:
    shown = text_of(request.observation)
    _, relations = read_question(shown)
    if page := _PAGE.search(shown):
        wanted = relations[-1]
        return str(ToolCall("answer", {"text": name_of(read_fact(page[2], wanted) or page[1].rpartition(" (")[0])}))
    if hits := _HIT.findall(shown):
        return str(ToolCall("open", {"title": hits[0]}))
    return str(ToolCall("search", {"query": shown.partition("\n")[0].removeprefix("Question: ")}))


def _random(request: PolicyRequest) -> str:
    rng, shown = random.Random(request.seed), text_of(request.observation)
    words = [word.strip("?.,():") for word in shown.split()]
    hits = _HIT.findall(shown)
    tool = rng.choice(["search", "open", "answer"] if hits else ["search", "answer"])
    if tool == "open":
        return str(ToolCall("open", {"title": rng.choice(hits)}))
    given = rng.choice([word for word in words if word[:1].isupper() or word.isdigit()])
    return str(ToolCall("search", {"query": given}) if tool == "search" else ToolCall("answer", {"text": given}))


def expert_policy() -> Policy:
    """Returns an `ExpertPolicy`."""
    return ExpertPolicy()


def naive_policy() -> Policy:
    """Returns the policy that searches the question, opens the first hit and answers from that page."""
    return FunctionPolicy(_naive, name="search-qa-naive")


def random_policy() -> Policy:
    """Returns the policy that searches, opens or answers at random, with words and titles on screen."""
    return FunctionPolicy(_random, name="search-qa-random")
