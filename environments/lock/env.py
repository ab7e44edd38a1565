"""`LockEnv`: a chain with a reward at its far end, the textbook case of hard credit assignment, in text."""

from __future__ import annotations

import hashlib
from itertools import islice, product
from typing import Any, Literal, get_args

import numpy as np

from agentrl.envs import Tabular, TextEnv
from agentrl.envs.core import Step
from agentrl.errors import ActionError, UserError

OnError = Literal["back", "start", "stay", "jam"]
Split = Literal["all", "train", "test"]
TEST_ONE_IN = 10
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CERTAIN = 1000
"""Codes looked at before a split counts as empty: among so many, none in it means there are no more."""

_AFTER_ERROR = {
    "back": "sets you back by one place",
    "start": "sets you back to the first place",
    "stay": "changes nothing",
    "jam": "jams the lock for good",
}


class LockEnv(TextEnv):
    """A code of letters is entered one letter a turn; the last right one opens the lock.

    The observation shows the code with the current place in brackets, ``b a [d] c a b``: the right answer is ``d``.

    `info` holds `success`, `valid_action`, `admissible_actions` (the symbols), `state_key` (code and place, also where
    the code is hidden) and `reward_parts`, whatever `reward` is:

        opened      1 when the lock opens
        progress    1 / length for each place reached for the first time in the episode; the open lock is the last

    ``reset(options={"code": "badcab"})`` gives the code instead of drawing it.

    Args:
        length: symbols of the code (1..64).
        symbols: size of the alphabet a, b, c, ... (2..26).
        on_error: after a wrong symbol: ``back`` one place, back to the ``start``, ``stay``, or ``jam`` (the episode
            ends as a failure). Text that is no symbol leaves the place as it is.
        hidden: shows ``?`` for every symbol. One code is then learnt from outcomes alone.
        code: the code of every episode, instead of a drawn one, for instance a hidden one.
        split: ``train`` and ``test`` never share a code.
        reward: ``sparse``: `opened`. ``shaped``: `progress`; either sums to 1 over an episode that opens the lock.

    Raises:
        UserError: a setting out of its range, or a split without a code.
    """

    fast = True
    reward_range = (0.0, 1.0)
    provides = {"state_keys": {}, "turn_rewards": {"reward": "shaped"}}

    def __init__(
        self,
        *,
        length: int = 6,
        symbols: int = 4,
        on_error: OnError = "back",
        hidden: bool = False,
        code: str | None = None,
        split: Split = "all",
        reward: Literal["sparse", "shaped"] = "sparse",
        render_mode: Literal["ansi"] | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= length <= 64:
            raise UserError(f"length={length}: codes have 1 to 64 symbols")
        if not 2 <= symbols <= len(_LETTERS):
            raise UserError(f"symbols={symbols}: an alphabet of 2 to {len(_LETTERS)} letters")
        if on_error not in get_args(OnError):
            raise UserError(f"on_error={on_error!r}: one of {', '.join(map(repr, get_args(OnError)))}")
        if split not in get_args(Split):
            raise UserError(f"split={split!r}: one of 'all', 'train', 'test'")
        if reward not in ("sparse", "shaped"):
            raise UserError(f"reward={reward!r}: 'sparse' or 'shaped'")
        self.alphabet, self.length = _LETTERS[:symbols], length
        self.on_error, self.hidden, self.split, self.reward = on_error, hidden, split, reward
        self.code = None if code is None else self._checked(code)
        self.single_task = code is not None
        self.render_mode = render_mode
        if code is None:
            first = islice(product(self.alphabet, repeat=length), _CERTAIN)
            if not any(in_split("".join(drawn), split) for drawn in first):
                raise UserError(f"no code of split={split!r} with length={length} and symbols={symbols}; raise either")
        elif not in_split(code, split):
            raise UserError(f"code={code!r} is not in split={split!r}; leave one of them out")
        self.instructions = (
            f"Open the lock: enter its code of {length} letters, one each turn. The current place is in brackets.\n"
            f"A right letter leads to the next place, a wrong one {_AFTER_ERROR[on_error]}.\n"
            f"Answer with one letter: {', '.join(self.alphabet)}."
        )

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        given = options.get("code")
        self._code = self._checked(given) if given is not None else self.code or self._draw()
        self._place = self._furthest = 0
        return self._show(0), self._info(0)

    def parse_action(self, text: str) -> str:
        """Returns the symbol that `text` is, whatever its case and the space around it.

        Raises:
            ActionError: anything else.
        """
        symbol = text.strip().lower()
        if len(symbol) != 1 or symbol not in self.alphabet:
            raise ActionError(f"answer with one letter: {', '.join(self.alphabet)}")
        return symbol

    def play(self, action: str) -> Step:
        jammed = self.on_error == "jam" and action != self._code[self._place]
        self._place = self._after(self._place, action)
        reached = int(self._place > self._furthest)
        self._furthest += reached
        info = self._info(reached)
        reward = info["reward_parts"]["progress" if self.reward == "shaped" else "opened"]
        return self._show(self._place), reward, info["success"] or jammed, info

    def on_invalid(self, error: ActionError) -> Step:
        observation, reward, terminated, _ = super().on_invalid(error)
        return observation, reward, terminated, self._info(0)

    def tabular(self) -> Tabular:
        """The places of the current code, the open lock left out: it is only ever the end of a transition."""
        places, actions = range(self.length), list(self.alphabet)
        after = np.array([[self._after(place, action) for action in actions] for place in places])
        right = np.array([[action == symbol for action in actions] for symbol in self._code])
        solved = after == self.length
        ended = solved | ~right if self.on_error == "jam" else solved
        return Tabular(
            keys=[_bracketed(self._code, place) for place in places],
            observations=[self._show(place) for place in places],
            actions=actions,
            next_state=np.minimum(after, self.length - 1),
            solved=solved,
            ended=ended,
            start=0,
        )

    def _after(self, place: int, action: str) -> int:
        if action == self._code[place]:
            return place + 1
        return {"back": max(place - 1, 0), "start": 0}.get(self.on_error, place)

    def _show(self, place: int) -> str:
        return _bracketed("?" * self.length if self.hidden else self._code, place)

    def _info(self, reached: int) -> dict[str, Any]:
        opened = self._place == self.length
        return {
            "success": opened,
            "admissible_actions": list(self.alphabet),
            "state_key": _bracketed(self._code, self._place),
            "reward_parts": {"progress": reached / self.length, "opened": float(opened)},
        }

    def _draw(self) -> str:
        while True:  # every tenth code is a test code: few draws
            code = "".join(self.alphabet[i] for i in self.np_random.integers(len(self.alphabet), size=self.length))
            if in_split(code, self.split):
                return code

    def _checked(self, code: str) -> str:
        if len(code) != self.length or set(code) - set(self.alphabet):
            raise UserError(f"code={code!r}: {self.length} letters of {self.alphabet!r}, as length and symbols say")
        return code


def in_split(code: str, split: Split) -> bool:
    """Whether a code belongs to `split`: one in `TEST_ONE_IN` is a test code, by a hash of the code itself."""
    if split == "all":
        return True
    digest = hashlib.sha256(code.encode()).digest()
    return (int.from_bytes(digest[:8], "big") % TEST_ONE_IN == 0) == (split == "test")


def _bracketed(code: str, place: int) -> str:
    """Returns ``b a [d] c a b`` for place 2; an open lock (place = length) has no brackets."""
    return " ".join(f"[{symbol}]" if i == place else symbol for i, symbol in enumerate(code))
