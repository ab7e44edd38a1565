"""`BargainEnv`: agree on several issues at once with a partner whose values are private. The deal is scored by rule."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, Literal, cast, get_args

from agentrl.envs import TextEnv
from agentrl.envs.core import Step
from agentrl.errors import ActionError, UserError
from environments.social.deals import CONCESSION, Deal, Split, counter_offer, demand, draw_stakes, total_points, worth

# Both in linear time: an offer holds no second "<offer>", and a name begins where no name goes on.
_OFFER = re.compile(
    r"<offer>([^<]*(?:<(?!/?offer>)[^<]*)*)</offer>|^[^\w\n]*offer\b[: ]*([^\n]*)", re.IGNORECASE | re.MULTILINE
)
_PAIR = re.compile(r"(?<![\w-])([\w-]+)\s*=\s*([\w-]+)")
_WORD = re.compile(r"^[^\w\n]*(accept|reject|leave)[^\w\n]*$", re.IGNORECASE | re.MULTILINE)
_SAMPLE = 4000
"""Characters of an answer that are read: nobody needs more to make an offer."""

_RULES = """You are bargaining. Each option of each issue is worth points to you; the points of a deal are their sum.
Your partner has points of its own, which you do not see: what matters to you may matter little to them, and they want
the opposite end of every issue. No deal is worth nothing, and neither is a deal below your floor.
"""
_ANSWERS = {
    "text": "Say what you like, and in it one of: <offer>{example}</offer> to propose a deal, or on a line of its own "
    "accept (their standing offer), reject (and hear their next one) or leave (without a deal).",
    "short": "Answer with offer and one option for each issue, for example {example}, or accept, reject or leave.",
}


class BargainEnv(TextEnv):
    """Multi-issue bargaining with private values against a scripted partner (`environments.social.deals`).

    The partner opens with its dream deal. Each round the agent makes an offer, accepts or rejects the partner's, or
    leaves; the partner accepts what is worth enough to it, or answers with the nearest deal to the agent's last offer
    that is. What it calls enough sinks as `partner` says, down to its floor. After `rounds` rounds it leaves.

    The outcome is a *goal score* from 0 to 10, as SOTOPIA's, but by rule: the share of the attainable gain over the
    agent's floor that the deal brings; 10 is the best deal that the partner could ever agree to, no deal is 0. The
    reward is that score at the end with ``reward="score"``, and 1 for success with ``reward="success"``.

    `info` holds `success` (a score strictly above `threshold`), `valid_action`, `admissible_actions` (every offer,
    accept, reject, leave), `state_key` (what the agent sees, and the partner's hidden state) and `reward_parts`:

        score        the goal score
        points       own points of the deal
        efficient    1 for a deal that cannot be bettered for one side without loss to the other (Pareto)

    beside `bargain`, the agent's side of the table in numbers, for scripted agents.

    Args:
        issues: issues to agree on (2..4).
        options: options of each (2..5).
        rounds: actions that the agent has. Text without an offer, or with a bad one, costs a round too.
        partner: how the partner concedes: ``reciprocal`` answers movement with movement; ``steady`` and ``hard``
            concede with time, at an even pace or late; ``mixed``: one of them, drawn.
        threshold: goal score that a success exceeds.
        split: ``train`` and ``test`` never share both sides' points.
        reward: ``score`` (0..10) or ``success`` (0 or 1), at the end of the episode.
        observation: ``text``: names and sentences. ``short``: the same facts in about 50 characters, options as
            letters, for tiny models.

    Raises:
        UserError: a setting out of its range.
    """

    fast = True
    provides = {"state_keys": {}}

    def __init__(
        self,
        *,
        issues: int = 3,
        options: int = 4,
        rounds: int = 8,
        partner: Literal["reciprocal", "steady", "hard", "mixed"] = "mixed",
        threshold: float = 6.0,
        split: Split = "all",
        reward: Literal["score", "success"] = "score",
        observation: Literal["text", "short"] = "text",
        render_mode: Literal["ansi"] | None = None,
    ) -> None:
        super().__init__()
        for name, value, least, most in (
            ("issues", issues, 2, 4),
            ("options", options, 2, 5),
            ("rounds", rounds, 2, 50),
        ):
            if not least <= value <= most:
                raise UserError(f"{name}={value}: {least} to {most}")
        if not 0 <= threshold < 10:
            raise UserError(f"threshold={threshold}: from 0 to below 10, the best score")
        for name, word, known in (
            ("partner", partner, (*CONCESSION, "mixed")),
            ("split", split, get_args(Split)),
            ("reward", reward, ("score", "success")),
            ("observation", observation, ("text", "short")),
        ):
            if word not in known:
                raise UserError(f"{name}={word!r}: one of {', '.join(map(repr, known))}")
        self.issues, self.options, self.rounds = issues, options, rounds
        self.partner, self.threshold, self.split = partner, threshold, split
        self.reward, self.observation, self.render_mode = reward, observation, render_mode
        self.reward_range = (0.0, 10.0 if reward == "score" else 1.0)
        example = "offer a c b a"[: 5 + 2 * issues] if observation == "short" else "issue=option, issue=option, ..."
        self.instructions = _RULES + _ANSWERS[observation].format(example=example)

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        self._stakes = draw_stakes(self.np_random, self.issues, self.options, self.split)
        drawn = sorted(CONCESSION)[int(self.np_random.integers(len(CONCESSION)))]
        self._strategy = drawn if self.partner == "mixed" else self.partner
        self._topic = topics()[int(self.np_random.integers(len(topics())))]
        first = self._stakes.own[0][0] > 0  # the side that wants the first options
        self._role, self._other = self._topic["roles"] if first else self._topic["roles"][::-1]
        self._names = self._option_names()
        names = tuple(map(tuple, self._names))
        self._actions = [*_offers(self._labels(), names), "accept", "reject", "leave"]
        self._theirs: Deal = self._stakes.their_dream
        self._mine: Deal | None = None
        self._deal: Deal | None = None
        self._left, self._moves, self._done = self.rounds, 0, False
        self._given = sum(map(min, self._stakes.theirs))
        return self._show(), self._info()

    def parse_action(self, text: str) -> Deal | Literal["accept", "reject", "leave"]:
        """Returns the deal that is offered in `text` (option numbers), or ``accept``, ``reject`` or ``leave``.

        An offer stands in ``<offer>...</offer>`` or after the word offer at the head of a line, as ``issue=option``
        pairs or as options alone in the order of the issues; the last offer counts. The other three stand alone on a
        line; they count only where there is no offer.

        Raises:
            ActionError: no offer in it, or one that lacks an issue or names an unknown option.
        """
        text = text[-_SAMPLE:]
        if offers := _OFFER.findall(text):
            return self._read_offer(offers[-1][0] or offers[-1][1])
        if words := _WORD.findall(text):
            return cast(Literal["accept", "reject", "leave"], words[-1].lower())
        raise ActionError(f"no offer in it; for example: {self._worded(self._theirs)}; or accept, reject, leave")

    def _read_offer(self, text: str) -> Deal:
        issues = self._issue_names()
        given = {name.lower(): option.lower() for name, option in _PAIR.findall(text)}
        if not given:
            words = text.lower().replace(",", " ").split()
            words = words[1:] if words[:1] == ["offer"] else words
            if len(words) != len(issues):
                raise ActionError(f"an offer has {len(issues)} options, this one {len(words)}")
            given = dict(zip(issues, words, strict=True))
        if unknown := sorted({*given} - {*issues}):
            raise ActionError(f"no issue {unknown[0][:40]!r}; issues: {', '.join(issues)}")
        deal = []
        for issue, names in zip(issues, self._names, strict=True):
            if issue not in given:
                raise ActionError(f"the offer lacks {issue}; name one option for each issue")
            if given[issue] not in names:
                raise ActionError(f"no option {given[issue][:40]!r} for {issue}; options: {', '.join(names)}")
            deal.append(names.index(given[issue]))
        return tuple(deal)

    def play(self, action: Deal | Literal["accept", "reject", "leave"]) -> Step:
        if action == "accept":
            self._deal, self._done = self._theirs, True
        elif action == "leave":
            self._done = True
        else:
            self._reply(None if action == "reject" else action)
        info = self._info()
        return self._show(), self._pay(info), self._done, info

    def on_invalid(self, error: ActionError) -> Step:
        self._pass_round()
        info = self._info()
        return f"Invalid action: {error}\n{self._show()}", self._pay(info), self._done, info

    def _reply(self, offer: Deal | None) -> None:
        """The partner accepts `offer`, or makes one of its own; None asks for the latter."""
        stakes = self._stakes
        if offer is not None:
            self._mine, worth_to_them = offer, worth(stakes.theirs, offer)
            self._moves += worth_to_them > self._given
            self._given = max(self._given, worth_to_them)
        time = min(1.0, (self.rounds - self._left + 1) / (self.rounds - 1))
        least = demand(stakes, self._strategy, time, self._moves)
        if offer is not None and worth(stakes.theirs, offer) >= least:
            self._deal, self._done = offer, True
        else:
            self._theirs = counter_offer(stakes, least, self._mine or self._theirs)
            self._pass_round()

    def _pass_round(self) -> None:
        self._left -= 1
        self._done = self._left == 0

    def _pay(self, info: dict[str, Any]) -> float:
        if not self._done:
            return 0.0
        return float(info["reward_parts"]["score"] if self.reward == "score" else info["success"])

    def _info(self) -> dict[str, Any]:
        stakes, deal = self._stakes, self._deal
        score = stakes.score(deal)
        parts = {
            "score": score,
            "points": 0.0 if deal is None else float(worth(stakes.own, deal)),
            "efficient": float(deal is not None and stakes.efficient(deal)),
        }
        hidden = (stakes.theirs, stakes.their_floor, self._strategy, self._moves, self._given, deal, self._done)
        topic = f"{self._topic['codename']} " if self.observation == "text" else ""
        return {
            "success": score > self.threshold,
            "admissible_actions": self._actions,
            "state_key": f"{topic}{self._short()} {hidden}",
            "reward_parts": parts,
            "bargain": {
                "own": [list(options) for options in stakes.own],
                "floor": stakes.floor,
                "their_offer": list(self._theirs),
                "my_offer": None if self._mine is None else list(self._mine),
                "rounds": self.rounds,
                "rounds_left": self._left,
                "options": self._names,
            },
        }

    def _issue_names(self) -> list[str]:
        if self.observation == "short":
            return [f"issue{number}" for number in range(1, self.issues + 1)]
        return [issue["name"] for issue in self._topic["issues"][: self.issues]]

    def _option_names(self) -> list[list[str]]:
        """Names of the options of each issue: letters, or words spread evenly over the topic's own."""
        if self.observation == "short":
            return [list("abcde"[: self.options]) for _ in range(self.issues)]
        chosen = [round(i * 4 / (self.options - 1)) for i in range(self.options)]
        return [[issue["options"][i] for i in chosen] for issue in self._topic["issues"][: self.issues]]

    def _worded(self, deal: Deal) -> str:
        options = [names[choice] for names, choice in zip(self._names, deal, strict=True)]
        return " ".join(["offer", *map(str.__add__, self._labels(), options)])

    def _labels(self) -> tuple[str, ...]:
        """What stands before the option of each issue where an offer is worded."""
        return tuple("" if self.observation == "short" else f"{name}=" for name in self._issue_names())

    def _show(self) -> str:
        return self._short() if self.observation == "short" else self._long()

    def _short(self) -> str:
        """Points by issue and option, floor, their offer and what it brings, own last offer, rounds left."""
        own = "/".join("".join(map(str, options)) for options in self._stakes.own)
        letters = [" ".join("abcde"[choice] for choice in deal) for deal in (self._theirs, self._mine or ())]
        theirs = f"they {letters[0]} = {worth(self._stakes.own, self._theirs)}"
        return f"{own} floor {self._stakes.floor} {theirs} you {letters[1] or 'none'} left {self._left}"

    def _long(self) -> str:
        stakes, scenario = self._stakes, self._topic["scenario"]

        def priced(deal: Deal) -> str:
            return f"{self._worded(deal).removeprefix('offer ')} ({worth(stakes.own, deal)} points to you)"

        if self._done:
            return "No deal." if self._deal is None else f"Deal: {priced(self._deal)}"
        lines = [f"{scenario} Your side: {self._role}. Your partner: {self._other}. Your points:"]
        for name, names, points in zip(self._issue_names(), self._names, stakes.own, strict=True):
            lines.append(f"  {name}: " + ", ".join(f"{n} {p}" for n, p in zip(names, points, strict=True)))
        lines.append(f"At most {total_points(self.issues)}; your floor is {stakes.floor}.")
        if self._mine is not None:
            lines.append(f"You offered: {priced(self._mine)}")
        lines.append(f"Standing offer of your partner: {priced(self._theirs)}")
        lines.append(f"Rounds left: {self._left}")
        return "\n".join(lines)


@lru_cache(maxsize=64)
def _offers(labels: tuple[str, ...], names: tuple[tuple[str, ...], ...]) -> list[str]:
    """Returns the wording of every offer, sorted. Most of a reset's time, and the same in each episode on a topic."""
    options = ([label + name for name in each] for label, each in zip(labels, names, strict=True))
    return sorted(" ".join(["offer", *choice]) for choice in itertools.product(*options))


@cache
def topics() -> list[dict[str, Any]]:
    """What is bargained about: scenario, two roles, and issues whose options run from what the first role wants to
    what the second wants."""
    text = files("environments.social").joinpath("data/bargains.json").read_text(encoding="utf-8")
    found: list[dict[str, Any]] = json.loads(text)["bargains"]
    return found
