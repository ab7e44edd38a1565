"""`TextEnv`: what a text environment adds to `gymnasium.Env`.

A subclass says three things: `begin` (the first observation), `parse_action` (what the agent's text means, or an
`ActionError`), `play` (what the action does). Everything that all text environments share is here: text that is no
action comes back as an observation instead of killing the episode, stepping a finished episode is refused, and the
`info` keys have one meaning everywhere:

    success           bool: the task is solved (only meaningful at the end)
    valid_action      bool: the last text was an action
    admissible_actions list[str]: what may be done now, where the environment can list it
    state_key         str: equal exactly when two states are the same (for anchor-state methods)
    reward_parts      dict[str, float]: what the reward is made of
    usage             dict: what models behind the environment cost (calls, tokens, seconds): measured, so that equal
                      episodes may differ in it
    tool_schemas      list[dict]: the tools that the instructions tell of (after `reset`; `ToolEnv` fills it in)
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces.space import Space

from agentrl.envs.tabular import Tabular
from agentrl.errors import ActionError, UserError
from agentrl.types import Content

Step = tuple[Content, float, bool, dict[str, Any]]
"""Observation, reward, terminated, info: what `TextEnv.play` returns (turn limits are Gymnasium's `TimeLimit`)."""


class AnyText(Space[str]):
    """The space of all strings. Gymnasium's `Text` refuses spaces, new lines and other scripts; agents write them all.

    `sample` draws short strings of printable and awkward characters, so that checkers exercise the parser.
    """

    _ALPHABET = tuple("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789 \n\t.,:;!?<>[]{}()#$@*+-_/\\'\"éß漢🙂")

    def __init__(self, max_sample_length: int = 32, seed: int | np.random.Generator | None = None) -> None:
        self.max_sample_length = max_sample_length
        super().__init__(None, None, seed)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        length = int(self.np_random.integers(0, self.max_sample_length + 1))
        return "".join(self._ALPHABET[int(i)] for i in self.np_random.integers(0, len(self._ALPHABET), length))

    def contains(self, x: Any) -> bool:
        return isinstance(x, str)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "AnyText()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AnyText)

    __hash__ = None  # type: ignore[assignment]


class TextEnv(gym.Env[Content, str], abc.ABC):
    """Base of text environments. Randomness from `self.np_random` only, so that a seed means one transcript."""

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}
    instructions: str = ""
    """System prompt: the rules and the action format, as the agent reads them."""
    provides: ClassVar[dict[str, dict[str, Any]]] = {}
    """What credit methods may ask of this environment, and the keyword arguments that make it so ({} = always):
    ``state_keys`` (`info["state_key"]` after `reset` and every step), ``turn_rewards`` (rewards that say something
    before the episode ends). For instance ``{"state_keys": {}, "turn_rewards": {"reward": "shaped"}}``."""
    fast: ClassVar[bool] = False
    """Declares that `reset` and `step` take well under a millisecond and cannot block: the collector then calls them
    directly. Everything else runs in threads or processes, where a deadline can cut it off."""

    reward_range: tuple[float, float] | None = None
    """Least and largest reward that one step can bring, where that is known."""
    single_task: bool = False
    """Declares that every seed means the same task, which `check_env` otherwise takes for a seed that is ignored."""
    local_arguments: ClassVar[frozenset[str]] = frozenset()
    """Keyword arguments that name files, addresses or code, or bound what an episode costs the machine it runs on: a
    server takes them from its owner, never from clients (`agentrl serve`)."""

    hard: bool = False
    """Declares that even the registered expert may solve no task of a few, which `check_env` otherwise takes for a
    defect of the one or the other."""

    def __init__(self) -> None:
        self.observation_space: Space[Any] = AnyText()
        self.action_space: Space[Any] = AnyText()
        self._finished = True
        self._last: Content = ""
        self._standing: dict[str, Any] = {}
        """What the last info said of the state."""

    @abc.abstractmethod
    def begin(self, options: dict[str, Any]) -> tuple[Content, dict[str, Any]]:
        """Starts an episode. Returns the first observation and info. Draw randomness from `self.np_random`."""

    @abc.abstractmethod
    def parse_action(self, text: str) -> Any:
        """Returns the action that `text` means.

        Raises:
            ActionError: `text` is no action; the message is shown to the agent.
        """

    @abc.abstractmethod
    def play(self, action: Any) -> Step:
        """Plays a parsed action. Returns observation, reward, terminated, info."""

    def on_invalid(self, error: ActionError) -> Step:
        """What happens after text that is no action: by default the last observation, under an error line."""
        last = self._last if isinstance(self._last, str) else ""
        return f"Invalid action: {error}\n{last}", 0.0, False, dict(self._standing)

    def tabular(self) -> Tabular:
        """The task instance of the current episode as a finite Markov decision process, for exact values.

        Raises:
            NotImplementedError: this environment has none.
            UserError: it has too many states.
        """
        raise NotImplementedError(f"{type(self).__name__} is not tabular")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._finished = False
        observation, info = self.begin(options or {})
        self._remember(observation, info)
        return observation, {"success": False, "valid_action": True, **info}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self._finished:
            raise UserError(f"{type(self).__name__}: step after the episode ended; call reset() first")
        try:
            parsed = self.parse_action(action)
        except ActionError as error:
            observation, reward, terminated, info = self.on_invalid(error)
            info = {"success": False, "valid_action": False, "action_error": str(error), **info}
        else:
            observation, reward, terminated, info = self.play(parsed)
            info = {"success": False, "valid_action": True, **info}
            self._remember(observation, info)
        self._finished = terminated
        return observation, float(reward), terminated, False, info

    def _remember(self, observation: Content, info: dict[str, Any]) -> None:
        self._last = observation
        self._standing = {key: info[key] for key in ("state_key", "admissible_actions") if key in info}

    def render(self) -> Any:
        return self._last
