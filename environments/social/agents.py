"""Scripted agents of the bargain and of the dialogue. Random draws come from the request's seed alone."""

from __future__ import annotations

import itertools
import random
from typing import Any

from agentrl.errors import UserError
from agentrl.policy import FunctionPolicy, Policy, PolicyRequest
from agentrl.types import text_of
from environments.social.deals import Deal, worth

CERTAIN = 0.6
"""Share of the way from floor to dream deal above which a deal scores over 6, whatever the partner's floor."""
LAST_DEMAND = 0.55
"""Share that the expert demands in its last round."""


def noisy_bargainer_policy(skill: float = 0.5) -> Policy:
    """Returns a policy that bargains well with probability `skill`, anew each round, and else picks any answer.

    Well means: accept what is a success for certain. Else offer, of the deals that bring as much as one still demands,
    the one nearest to the partner's last offer; the demand sinks slowly from the dream deal. Take any gain in the last
    round. It sees what the agent sees, in numbers (``info["bargain"]``).

    Args:
        skill: 1 never errs, 0 is the random agent.

    Raises:
        UserError: `skill` outside [0, 1].
    """
    if not 0 <= skill <= 1:
        raise UserError(f"skill={skill}: a probability between 0 and 1")

    def act(request: PolicyRequest) -> str:
        rng = random.Random(request.seed)
        if rng.random() < skill:
            return _well(request)
        return str(rng.choice(request.info["admissible_actions"]))

    return FunctionPolicy(act, name=f"bargain-noisy-expert(skill={skill:g})")


def bargainer_policy() -> Policy:
    """Returns the policy that always bargains well (`noisy_bargainer_policy` with skill 1)."""
    policy = noisy_bargainer_policy(1.0)
    policy.name = "bargain-expert"
    return policy


def agreeable_policy() -> Policy:
    """Returns the policy that offers the middle of every issue, then accepts the first offer above its floor."""

    def act(request: PolicyRequest) -> str:
        table = request.info["bargain"]
        own, theirs = table["own"], tuple(table["their_offer"])
        if table["my_offer"] is not None and worth(own, theirs) > table["floor"]:
            return "accept"
        return _offer(request, tuple(len(options) // 2 for options in own))

    return FunctionPolicy(act, name="bargain-agreeable")


def _well(request: PolicyRequest) -> str:
    """The time-dependent tactic with offers by similarity (Faratin, Sierra and Jennings 1998, 2002)."""
    table: dict[str, Any] = dict(request.info["bargain"])
    floor: int = table["floor"]
    own, theirs, left = table["own"], tuple(table["their_offer"]), table["rounds_left"]
    dream: int = sum(map(max, own))

    def gain(deal: Deal) -> float:
        return (worth(own, deal) - floor) / (dream - floor)

    if gain(theirs) > CERTAIN or (left == 1 and gain(theirs) > 0):
        return "accept"
    over = 1 - (left - 1) / (table["rounds"] - 1)
    least = 1 - (1 - LAST_DEMAND) * over
    deals = itertools.product(*(range(len(options)) for options in own))
    fresh = [deal for deal in deals if gain(deal) >= least and list(deal) != table["my_offer"]]
    if not fresh:
        return "reject"
    near = min(fresh, key=lambda deal: (sum(abs(a - b) for a, b in zip(deal, theirs, strict=True)), -worth(own, deal)))
    return _offer(request, near)


def _offer(request: PolicyRequest, deal: Deal) -> str:
    """The text of an offer: all offers stand in the admissible actions, and only one has these options."""
    names = [options[choice] for options, choice in zip(request.info["bargain"]["options"], deal, strict=True)]
    for action in request.info["admissible_actions"]:
        words = str(action).split()[1:]
        if [word.rpartition("=")[2] for word in words] == names:
            return str(action)
    raise UserError(f"{names} is no offer of this environment")


_OPENING = (
    "Hello, good to see you. Do you have a moment?",
    "Hi. I would like to talk something over with you.",
    "Good that we meet. There is something on my mind.",
)
_MIDDLE = (
    "I see. What matters most to you here?",
    "Let me be open: this is important to me. Could we find a way that suits us both?",
    "I could meet you halfway, if you tell me what you need.",
    "That is fair. And what would you think of sharing it evenly?",
    "[non-verbal] nods and listens",
)
_CLOSING = "Then let us leave it at that. Thank you for hearing me out."


def talker_policy() -> Policy:
    """Returns a polite character of few words, for either seat: opens, asks, offers a compromise, thanks and leaves.

    It knows no goal and pursues none: a partner that is always there, and a floor for agents.
    """

    def act(request: PolicyRequest) -> str:
        rng, text = random.Random(request.seed), text_of(request.observation)
        left = int(text.rpartition("Turns left: ")[2].partition(".")[0])
        if left <= 2:
            return "[leave]"
        if left <= 4:
            return _CLOSING
        return rng.choice(_OPENING if "Nobody has spoken yet." in text else _MIDDLE)

    return FunctionPolicy(act, name="social-talker")


def random_talker_policy() -> Policy:
    """Returns a character that does anything: speaks, gestures, acts, stays silent, or one time in ten leaves."""

    def act(request: PolicyRequest) -> str:
        rng = random.Random(request.seed)
        if rng.random() < 0.1:
            return "[leave]"
        return rng.choice((*_OPENING, *_MIDDLE, _CLOSING, "[action] looks out of the window", "[none]"))

    return FunctionPolicy(act, name="social-random")
