"""Wrappers for text environments, by class or by the name that a configuration gives them.

    env = TruncateObservation(agentrl.make("Sokoban-v0"), limit=2000)
    env = agentrl.make("Sokoban-v0", wrappers=[{"name": "truncate_observation", "limit": 2000}])

The first of a list is the innermost; all of them lie outside the turn limit (Gymnasium's `TimeLimit`). What agents and
credit methods ask of an environment (`instructions`, `provides`, `fast`) is that of the wrapped one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import TimeLimit

from agentrl.errors import UnknownNameError, UserError
from agentrl.types import Content, ImagePart, StopReason, TextPart, Trajectory, Turn

__all__ = ["InvalidActionPenalty", "Record", "RewardParts", "TextWrapper", "TimeLimit", "TruncateObservation", "wrap"]

Env = gym.Env[Any, Any]
Answer = tuple[Any, float, bool, bool, dict[str, Any]]


class TextWrapper(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Base of wrappers: `instructions`, `provides` and `fast` are read through it."""

    local_arguments: ClassVar[frozenset[str]] = frozenset()
    """As `TextEnv.local_arguments`: what a server never takes from clients."""

    def __init__(self, env: Env, **arguments: Any) -> None:
        RecordConstructorArgs.__init__(self, **arguments)
        gym.Wrapper.__init__(self, env)

    @property
    def instructions(self) -> str:
        """The environment's system prompt; "" where it has none."""
        return str(self._of("instructions", ""))

    @property
    def provides(self) -> dict[str, dict[str, Any]]:
        """What credit methods may ask of the environment (`TextEnv.provides`)."""
        return dict(self._of("provides", {}))

    @property
    def fast(self) -> bool:
        """Whether the environment declares itself fast."""
        return bool(self._of("fast", False))

    def _of(self, name: str, default: Any) -> Any:
        return self.env.get_wrapper_attr(name) if self.env.has_wrapper_attr(name) else default


class InvalidActionPenalty(TextWrapper):
    """Takes `penalty` off the reward of a turn whose text was no action (``info["valid_action"]`` is False).

    It stands in ``info["reward_parts"]["invalid_action"]``.

    Args:
        env: the environment.
        penalty: in the unit of its reward, at least 0.
    """

    def __init__(self, env: Env, penalty: float = 0.1) -> None:
        if penalty < 0:
            raise UserError(f"invalid_action_penalty: penalty={penalty} would reward text that is no action; use >= 0")
        super().__init__(env, penalty=penalty)
        self.penalty = float(penalty)

    def step(self, action: str) -> Answer:
        observation, reward, terminated, truncated, info = self.env.step(action)
        cost = -self.penalty if info.get("valid_action") is False else 0.0
        parts = {**info.get("reward_parts", {}), "invalid_action": cost}
        return observation, float(reward) + cost, terminated, truncated, {**info, "reward_parts": parts}


class TruncateObservation(TextWrapper):
    """Keeps the first `limit` characters of an observation's text and says how many were left out.

    Images stay. The notice comes on top of the limit.

    Args:
        env: the environment.
        limit: characters, at least 1.
    """

    def __init__(self, env: Env, limit: int = 4000) -> None:
        if limit < 1:
            raise UserError(f"truncate_observation: limit={limit}; at least 1 character")
        super().__init__(env, limit=limit)
        self.limit = limit

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._cut(observation), info

    def step(self, action: str) -> Answer:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._cut(observation), float(reward), terminated, truncated, info

    def _cut(self, observation: Content) -> Content:
        parts = [TextPart(text=observation)] if isinstance(observation, str) else observation
        left, out = self.limit, 0
        kept: list[TextPart | ImagePart] = []
        for part in parts:
            if not isinstance(part, TextPart):
                kept.append(part)
                continue
            out += max(len(part.text) - left, 0)
            if left:
                kept.append(TextPart(text=part.text[:left]))
            left -= min(left, len(part.text))
        if not out:
            return observation
        notice = f"\n[{out:,} more characters left out]"
        if isinstance(observation, str):
            return observation[: self.limit] + notice
        return [*kept, TextPart(text=notice)]


class RewardParts(TextWrapper):
    """Pays the weighted sum of ``info["reward_parts"]`` instead of the environment's reward.

    Parts without a weight count nothing, and so does a turn without parts.

    Args:
        env: an environment that tells its reward parts.
        weights: part -> weight.

    `step` raises `UserError` where a turn has parts, and one of `weights` is not among them.
    """

    def __init__(self, env: Env, weights: Mapping[str, float]) -> None:
        if not weights:
            raise UserError("reward_parts: weights is empty, and every reward would be 0; give part -> weight")
        super().__init__(env, weights=dict(weights))
        self.weights = {name: float(weight) for name, weight in weights.items()}

    def step(self, action: str) -> Answer:
        observation, _, terminated, truncated, info = self.env.step(action)
        parts = info.get("reward_parts") or dict.fromkeys(self.weights, 0.0)
        if missing := sorted(self.weights.keys() - parts.keys()):
            raise UserError(f"reward_parts: no part {missing[0]!r}; the environment's are {', '.join(sorted(parts))}")
        return observation, sum(w * parts[name] for name, w in self.weights.items()), terminated, truncated, info


class Record(TextWrapper):
    """Appends every episode to a JSONL file as a `Trajectory` (``agentrl.buffer.read_jsonl`` reads it).

    An episode is written when it ends; one that `reset` or `close` breaks off is stored as cancelled. Its outcome is
    the sum of the rewards.

    Args:
        env: the environment.
        path: file to append to; its folder must exist.
    """

    local_arguments = frozenset({"path"})

    def __init__(self, env: Env, path: str | Path) -> None:
        super().__init__(env, path=str(path))
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise UserError(f"record: no folder {self.path.parent} for path={self.path}")
        self._episode: Trajectory | None = None
        self._observation: Content = ""
        self._count = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._write(StopReason.CANCELLED)
        observation, info = self.env.reset(seed=seed, options=options)
        used = seed if seed is not None else int(self.unwrapped.np_random_seed or -1)
        self._episode = Trajectory(
            id=f"record-{self._count}",
            group_id=f"{used}",
            env=self.spec.id if self.spec is not None else type(self.unwrapped).__name__,
            task={"options": _stored(options or {})},
            seed=used,
            instructions=self.instructions,
            start_info=_stored(info),
            policy="recorded",
            metadata={"seeded": seed is not None},
        )
        self._observation = observation
        self._count += 1
        return observation, info

    def step(self, action: str) -> Answer:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self._episode is not None:
            self._episode.turns.append(
                Turn(
                    observation=self._observation,
                    action=action,
                    reward=float(reward),
                    terminated=terminated,
                    truncated=truncated,
                    info=_stored(info),
                )
            )
            self._observation = observation
            if terminated or truncated:
                self._episode.success = bool(info.get("success", False))
                self._write(StopReason.TERMINATED if terminated else StopReason.TURN_LIMIT)
        return observation, float(reward), terminated, truncated, info

    def close(self) -> None:
        self._write(StopReason.CANCELLED)
        super().close()

    def _write(self, reason: StopReason) -> None:
        if self._episode is None:
            return
        episode, self._episode = self._episode, None
        episode.stop_reason, episode.final_observation = reason, self._observation
        episode.outcome = episode.total_reward
        # `json`, not pydantic: it escapes half a surrogate pair, which has no UTF-8.
        line = json.dumps(episode.model_dump(mode="python")).encode() + b"\n"
        with self.path.open("ab", buffering=0) as file:  # one write: lines of environments side by side stay whole
            file.write(line)


WRAPPERS: dict[str, type[TextWrapper]] = {
    "invalid_action_penalty": InvalidActionPenalty,
    "record": Record,
    "reward_parts": RewardParts,
    "truncate_observation": TruncateObservation,
}
"""What a configuration calls them; any other wrapper is named ``module:Class``."""


def wrap(env: Env, wrappers: Sequence[Mapping[str, Any]]) -> Env:
    """Returns `env` in `wrappers`, the first innermost.

    Args:
        env: the environment.
        wrappers: ``{"name": name or "module:Class", **options}`` each.

    Raises:
        UserError: an entry without a name, an unknown name, or options that the wrapper refuses.
    """
    for entry in wrappers:
        options = dict(entry)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise UserError(f"wrapper {dict(entry)} has no name; known: {', '.join(sorted(WRAPPERS))}, or module:Class")
        try:
            env = _wrapper(name)(env, **options)
        except TypeError as error:
            raise UserError(f"wrapper {name!r} cannot be made with {options}: {error}") from error
    return env


def _wrapper(name: str) -> Any:
    if name in WRAPPERS:
        return WRAPPERS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UnknownNameError("wrapper", name, WRAPPERS, "or module:Class")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"wrapper {name!r}: {error}") from error


def _stored(info: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of `info` that JSON holds as it is, without the list of admissible actions."""
    kept = {}
    for key, value in info.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            continue
        if key != "admissible_actions":
            kept[str(key)] = value
    return kept
