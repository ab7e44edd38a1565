"""Texts of a megabyte: what reads an agent's or a model's answer takes time in proportion to its length, or less.

Ten times the text may take ten times the time; a pattern that backtracks takes a hundred times. The ratio is compared,
and with an allowance for the clock's grain, so that a busy machine does not matter.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from agentrl.envs import make
from agentrl.envs.calls import parse_call
from agentrl.errors import ActionError, UserError
from environments.adapters import textarena
from environments.social import actions, judge, profiles
from environments.social.bargain import _OFFER, _PAIR, _WORD

SHORT, LONG = 100_000, 1_000_000
RATIO = 50
GRAIN_S = 3e-3
"""Seconds below which a time is noise."""
SHAPES = {
    "spaces": " ",
    "lines": "\n",
    "space-lines": " \n",
    "no-break-spaces": "\u00a0",
    "letters": "a",
    "words": "a ",
    "pairs": "a=",
    "dots": ". ",
    "dashes": "-",
    "offers": "<offer>",
    "offer-words": "offer ",
    "accepts": "accept x\n",
    "brackets": "[",
    "closed": "] ",
    "parentheses": "(",
    "braces": '{"',
    "quotes": '"',
    "backslashes": "\\",
    "fences": "```\n",
    "answers": "<answer>",
    "actions": "action: ",
    "calls": "<function=a>",
    "parameters": "<parameter=a>",
    "searches": "search[a ",
    "moves": "up, ",
    "viewers": '<p viewer="agent_1">',
    "available": "available moves ",
}
ENVIRONMENTS = ["Bargain-v0", "Lock-v0", "PythonTool-v0", "SearchQA-v0", "Sokoban-v0", "WebShop-v0"]


def seconds(read: Callable[[str], object], text: str) -> float:
    """The processor time of one reading; of a slow one, the lesser of two."""
    times = []
    while not times or (len(times) < 2 and GRAIN_S < times[-1] < 1):
        started = time.process_time()
        with contextlib.suppress(ActionError, ValueError):
            read(text)
        times.append(time.process_time() - started)
    return min(times)


def assert_linear(read: Callable[[str], object], shapes: dict[str, str], start: str = "") -> None:
    for name, piece in shapes.items():
        short, long = ((start + piece * (size // len(piece)))[:size] for size in (SHORT, LONG))
        before, after = seconds(read, short), seconds(read, long)
        assert after <= RATIO * max(before, GRAIN_S), f"{name}: {before:.4f} s for 100 kB, {after:.4f} s for 1 MB"


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_a_step_takes_time_in_proportion_to_the_text(env_id: str) -> None:
    try:
        env = make(env_id)
    except UserError as error:
        pytest.skip(str(error))

    def read(text: str) -> None:
        env.reset(seed=0)
        env.step(text)

    assert_linear(read, SHAPES)
    env.close()


SCHEMAS: list[dict[str, Any]] = [
    {"name": "search", "parameters": {"properties": {"query": {"type": "string"}, "top": {"type": "integer"}}}}
]
READERS: dict[str, tuple[Callable[[str], object], list[str]]] = {
    "calls": (lambda text: parse_call(text, SCHEMAS), ["", "search("]),
    "dialogue": (actions.parse, ["", "[speak]", '{"action_type": "']),
    "verdicts": (judge._read, ["", "```"]),
    "profiles": (lambda text: profiles.shown_to(text, 0), ["", "<p "]),
    "listed-moves": (textarena._LISTED.findall, ["", "available moves"]),
}


@pytest.mark.parametrize("name", READERS)
def test_readers_take_time_in_proportion_to_the_text(name: str) -> None:
    read, starts = READERS[name]
    for start in starts:
        assert_linear(read, SHAPES, start)


@pytest.mark.parametrize("pattern", [_OFFER, _PAIR, _WORD], ids=["offer", "pair", "word"])
def test_patterns_of_offers_are_linear_by_themselves(pattern: re.Pattern[str]) -> None:
    for start in ("<offer>", "x"):
        assert_linear(pattern.findall, SHAPES, start)


def test_calls_below_the_limit_are_read_in_proportion() -> None:
    for start in ("", "search(", "search[", "<search>", '{"name": '):
        for name, piece in SHAPES.items():
            short, long = ((start + piece * 65_536)[:size] for size in (6_553, 65_530))
            before, after = (seconds(READERS["calls"][0], text) for text in (short, long))
            assert after <= RATIO * max(before, GRAIN_S), f"{start}{name}: {before:.4f} s, {after:.4f} s"


def test_an_offer_is_the_innermost_and_names_are_whole() -> None:
    assert _OFFER.findall("Take <offer>a=b <offer>c=d</offer>") == [("c=d", "")]
    assert _OFFER.findall("<offer></offer>") == [("", "")]
    assert _PAIR.findall("pay-rise = 10, leave=2 weeks=3") == [("pay-rise", "10"), ("leave", "2"), ("weeks", "3")]


@pytest.mark.parametrize("fence", ["{}", "```json\n{}\n```", " ```\n{}``` \n"])
def test_a_fence_around_a_verdict_is_taken_off(fence: str) -> None:
    scores = dict.fromkeys(judge.DIMENSIONS, 0)
    verdict = json.dumps({"reasoning": "", "agent_1": scores, "agent_2": scores})
    assert judge._read(fence.format(verdict) if fence == "{}" else fence.replace("{}", verdict)).agent_1.goal == 0
