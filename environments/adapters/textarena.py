"""`TextArenaEnv`: the games of TextArena (arXiv 2504.11442), one seat for the agent, the others scripted.

The package's observation wrappers repeat the whole history each turn; here a turn shows what is new, and the game's
prompt is the system prompt.
"""

from __future__ import annotations

import copy
import importlib
import logging
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np

from agentrl.envs.core import Step
from agentrl.errors import ActionError, EnvironmentFailure, UserError, unknown_name
from environments.adapters.base import LONGEST_ACTION, Adapter, BorrowedRandom, draw_seed, require

log = logging.getLogger("environments.adapters")

ENV_ID = "TextArena-v0"
Opponent = Callable[[str], str]
"""From all that the player has seen so far to its answer."""

_LISTED = re.compile(r"(?:available|valid|legal|possible) (?:moves|actions)[^:\n]{0,80}:(.*)", re.IGNORECASE)
_BRACKETED = re.compile(r"\[[^\[\]\n]+\]")
_MOST_OPPONENT_TURNS = 1000
"""Between two turns of the agent; a game that takes longer does not come back."""


class TextArenaEnv(Adapter):
    """A game of TextArena. The reward comes with the last turn: the game's own (-1 lost, 0 drawn, 1 won, or a share).

    `info` holds `success` (alone: a reward of 1; against others: a positive reward that nobody exceeds),
    `valid_action`, `admissible_actions` where the game lists them in its observation, and at the end `reason`, in the
    game's words. There is no `state_key`: games keep hidden state. The game's rules for errors hold: most end the game
    at the second invalid move in a row.

    Args:
        game: id of the package, e.g. ``TicTacToe-v0`` or ``FrozenLake-v0-hardcore`` (see `ENV_REGISTRY`).
        opponent: plays all other seats: ``random`` or ``first`` of the moves that the game lists, a function from what
            it has seen to its answer, or ``"module:function"``.
        player: the agent's seat, from 0.
        players: number of seats; None: 1 or 2, whichever the game takes. Games for more need it.
        game_params: keyword arguments of the game, e.g. ``{"size": 5}`` of FrozenLake.

    Raises:
        UserError: the package is missing, the game is unknown or refuses its arguments, or it lists no moves for a
            ``random`` or ``first`` opponent (at the first `reset`).
    """

    live: ClassVar[tuple[str, ...]] = ("_package", "_fresh", "_game", "_chance")
    _package: Any = None
    _fresh: Any = None
    _game: Any = None
    _chance: Any = None

    local_arguments = frozenset({"opponent"})

    def __init__(
        self,
        *,
        game: str = "TicTacToe-v0",
        opponent: Literal["random", "first"] | str | Opponent = "random",
        player: int = 0,
        players: int | None = None,
        game_params: dict[str, Any] | None = None,
        render_mode: Literal["ansi"] | None = None,
    ) -> None:
        super().__init__()
        self.game, self.player, self.players = game, player, players
        self.game_params = dict(game_params or {})
        self.opponent = opponent
        self._answer = _function(opponent) if opponent not in ("random", "first") else None
        self.render_mode = render_mode
        self.instructions = f"You are playing {game}."
        self._load()
        if not 0 <= player < self._seats:
            raise UserError(f"player={player}: {game!r} has seats 0 to {self._seats - 1}")

    def begin(self, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if self._fresh is None:
            self._load()
        seed = draw_seed(self.np_random)
        self._chance = BorrowedRandom(seed)
        self._opponent_rng = np.random.default_rng(seed)
        self._game = copy.deepcopy(self._fresh)
        self._seen: dict[int, list[str]] = {seat: [] for seat in range(self._seats)}
        self._moves: dict[int, list[str]] = {}
        with self._chance.lend():
            self._game.reset(num_players=self._seats, seed=seed)
        news = self._play_others(first=True)
        if self._seats > 1 and self._answer is None and not self._moves:
            raise UserError(
                f"{ENV_ID}: {self.game!r} does not list its moves, so opponent={self.opponent!r} cannot play it; "
                "give a function from text to text, opponent='module:function'"
            )
        return news or "The game begins.", self._info()

    def parse_action(self, text: str) -> str:
        """Returns `text`, in brackets where the game wants them and it has none. The game says what is a move.

        Raises:
            ActionError: nothing, or more than `LONGEST_ACTION` characters.
        """
        if not text.strip():
            raise ActionError("the answer is empty")
        if len(text) > LONGEST_ACTION:
            raise ActionError(f"the answer has {len(text)} characters; at most {LONGEST_ACTION}")
        return f"[{text.strip()}]" if self._brackets and not {"[", "]"} & set(text) else text

    def play(self, action: str) -> Step:
        state, before = self._game.state, self._errors()
        try:
            done = self._move(action)
        except Exception as error:  # a parser of the package that stumbles over the agent's text
            log.info("textarena %s raised on %.80r: %s: %s", self.game, action, type(error).__name__, error)
            return self.on_invalid(ActionError("the game cannot read that"))
        invalid = bool(state.game_info.get(self.player, {}).get("invalid_move")) if done else False
        invalid = invalid or (state.current_player_id == self.player and self._errors() > before)
        news = self._play_others(keep_moves=invalid) if not done else self._news(self.player)
        info = {**self._info(), "valid_action": not invalid}
        if not state.done:
            return news or "Your turn.", 0.0, False, info
        reward, success, reason = self._result()
        info = {**info, "success": success, "reason": reason, "admissible_actions": []}
        return "\n".join(filter(None, (news, reason))) or "The game is over.", reward, True, info

    def on_invalid(self, error: ActionError) -> Step:
        observation, reward, terminated, _ = super().on_invalid(error)
        return observation, reward, terminated, {"valid_action": False, "action_error": str(error), **self._info()}

    def _load(self) -> None:
        """Makes the game once and finds out for how many it is."""
        self._package = package = require("textarena", ENV_ID, "textarena")
        known = importlib.import_module("textarena.envs.registration").ENV_REGISTRY
        if self.game not in known:
            names = [name for name in known if not name.endswith(("-raw", "-train"))]
            raise UserError(f"{ENV_ID}: {unknown_name('game', self.game, names)}")
        wrappers = known[self.game].default_wrappers or []
        self._brackets = package.wrappers.ActionFormattingWrapper in wrappers
        with BorrowedRandom(0).lend():
            try:
                made = package.make(self.game, **self.game_params)
                while isinstance(made, package.Wrapper):
                    made = made.env
                self._seats = self._count_seats(made)
            except UserError:
                raise
            except Exception as error:
                raise UserError(
                    f"{ENV_ID}: textarena cannot make {self.game!r} with {self.game_params}: "
                    f"{type(error).__name__}: {' '.join(str(error).split())}"
                ) from error
        self._fresh = made

    def _count_seats(self, game: Any) -> int:
        if self.players is not None:
            copy.deepcopy(game).reset(num_players=self.players, seed=0)
            return self.players
        states = {1: self._package.SinglePlayerState, 2: self._package.TwoPlayerState}
        for seats, kind in states.items():
            tried = copy.deepcopy(game)
            try:
                tried.reset(num_players=seats, seed=0)
            except AssertionError:
                continue
            if isinstance(tried.state, kind) and (seats == 1) == (tried.state.num_players == 1):
                return seats
        raise UserError(f"{ENV_ID}: {self.game!r} is a game for several; say how many play: players=3")

    def _move(self, action: str) -> bool:
        with self._chance.lend():
            done, _ = self._game.step(action=action)
        return bool(done)

    def _play_others(self, *, first: bool = False, keep_moves: bool = False) -> str:
        """Plays the other seats until it is the agent's turn or the game ends. Returns what is new to the agent."""
        state = self._game.state
        if not keep_moves:
            self._moves.pop(self.player, None)
        for _ in range(_MOST_OPPONENT_TURNS):
            if state.done or state.current_player_id == self.player:
                return self._news(self.player, first=first)
            seat = state.current_player_id
            self._seen[seat].append(self._news(seat))
            self._move(self._reply(seat))
        raise EnvironmentFailure(f"{self.game!r}: {_MOST_OPPONENT_TURNS} turns of others without one of the agent's")

    def _reply(self, seat: int) -> str:
        if self._answer is not None:
            return str(self._answer("\n".join(filter(None, self._seen[seat]))))
        moves = self._moves.get(seat)
        if not moves:
            raise EnvironmentFailure(f"{self.game!r} lists no move for seat {seat}; opponent={self.opponent!r} is lost")
        move = moves[int(self._opponent_rng.integers(len(moves)))] if self.opponent == "random" else moves[0]
        return f"[{move}]" if self._brackets and not move.startswith("[") else move

    def _news(self, seat: int, *, first: bool = False) -> str:
        """Takes the messages that `seat` has not seen. The agent's prompt becomes its instructions."""
        state, kind = self._game.state, self._package.ObservationType
        messages, state.observations[seat] = state.observations[seat], []
        lines = []
        for sender, message, type_ in messages:
            message = str(message).strip()
            if sender == seat and type_ == kind.PLAYER_ACTION:
                continue  # it knows what it said
            if listed := _moves_in(message):
                self._moves[seat] = listed
            if type_ == kind.PROMPT and seat == self.player:
                self.instructions = message if first else f"{self.instructions}\n{message}"
                first = False
            else:
                who = "" if sender == self._package.GAME_ID else f"[{state.role_mapping.get(sender, sender)}] "
                lines.append(who + message)
        return "\n".join(lines)

    def _errors(self) -> int:
        return int(getattr(self._game.state, "error_count", 0))

    def _result(self) -> tuple[float, bool, str]:
        """Returns the agent's reward, whether it won, and the game's words for it."""
        rewards, facts = self._game.state.rewards or {}, self._game.state.game_info or {}
        numbers = {int(seat): _number(value) for seat, value in rewards.items()}
        own = numbers.get(self.player, 0.0)
        success = own >= 1 if self._seats == 1 else own > 0 and own >= max(numbers.values())
        return own, success, str(facts.get(self.player, {}).get("reason") or "")

    def _info(self) -> dict[str, Any]:
        moves = self._moves.get(self.player)
        return {} if moves is None else {"admissible_actions": list(moves)}


def _moves_in(message: str) -> list[str]:
    """Returns the moves that a message lists after ``Available Moves:`` and the like, without any ``[bet X]``."""
    found = _LISTED.findall(message)
    if not found:
        return []
    moves = _BRACKETED.findall(found[-1]) or [part.strip(" '\".") for part in found[-1].split(",")]
    return [move for move in moves if move and not move.endswith(" X]")]


def _number(value: Any) -> float:
    """Returns a reward as a number; some games give text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isfinite(number):
        return number
    log.warning("textarena gave the reward %r; taken as 0", value)
    return 0.0


def _function(opponent: Any) -> Opponent:
    if callable(opponent):
        return opponent  # type: ignore[no-any-return]
    module, _, name = str(opponent).partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"opponent={opponent!r}: 'random', 'first' or 'module:function': {error}") from error
    if not callable(found):
        raise UserError(f"opponent={opponent!r}: that is {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]
