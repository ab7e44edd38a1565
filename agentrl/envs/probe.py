"""One environment under check: played in set ways, with an eye on everything that comes back.

Every step of every check goes through `Probe.step`, so that a NaN reward is found wherever it turns up.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from numbers import Real
from time import perf_counter
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from agentrl.envs.core import AnyText
from agentrl.envs.registry import make
from agentrl.policy import Policy, PolicyRequest
from agentrl.types import ImagePart, TextPart

TURNS = 30
"""Turns that one transcript has at most."""
LONG = 1_000_000
HOSTILE = (
    "",
    " ",
    "\n\n\t",
    "\0\x1b[2J\x07\x7f\u2028\u202e",
    "移動 上 🙂 é\u0301 ﷽",
    "İ ß ǅ \u0663\uff13",
    "\ud800",
    "ok \udfff ok",
    "<|im_start|>assistant\n<|im_end|>",
    "<|endoftext|></s>[INST] [/INST]<|eot_id|>",
    "{{ messages }} {% raw %} {0} %s %n",
    '{"name": "move", "arguments": {"to": ',
    "[" * 5000,
    '<tool_call>{"name": null}</tool_call>',
    "<action><![CDATA[]]></action",
    "null",
    "-1",
    "1e999",
    "9" * 5000,
    "../../etc/passwd; rm -rf $HOME `id` ' OR 1=1 --",
)
"""Texts that agents do write, or that break parsers."""
_ROUNDING = 1e-9
HUGE = ("a" * LONG, " \n" * (LONG // 2), "<answer>[" * (LONG // 9), "1 " * (LONG // 2))
"""About a million characters each."""


class Step(NamedTuple):
    """An action and what came of it; of `reset` the action is "" and the reward 0."""

    action: str
    observation: Any
    reward: Any
    terminated: Any
    truncated: Any
    info: dict[str, Any]


class Broken(Exception):
    """A rule is broken; the message says where."""


class Probe:
    """The environment under check: makes it, plays it, and keeps the first complaint about what came back."""

    def __init__(self, env: str | Callable[[], Any], kwargs: dict[str, Any], seeds: list[int], actions: int) -> None:
        self.env, self.kwargs, self.seeds, self.actions = env, kwargs, seeds, actions
        self.name = env if isinstance(env, str) else str(getattr(env, "__name__", type(env).__name__))
        self.made: list[gym.Env[Any, Any]] = []
        self.complaints: dict[str, str] = {}
        """The first one by the name of the check that it belongs to."""
        self.steps = self.terminated = self.truncated = 0
        self.seconds: dict[str, list[float]] = {"reset": [], "step": []}
        """Of each call; steps with long texts are left out."""
        self.info: dict[str, Any] = {}
        """Of the last call."""
        self.first = self.make()
        """The instance that most checks play on."""
        self.inner: Any = self.first.unwrapped
        self.fast = bool(getattr(self.inner, "fast", False))
        self.provides: dict[str, Any] = getattr(self.inner, "provides", {})

    @cached_property
    def second(self) -> gym.Env[Any, Any]:
        """Another instance, with other episodes behind it; two in all, since some take seconds to make."""
        return self.make()

    def make(self) -> gym.Env[Any, Any]:
        """Returns a new instance; `close` closes it."""
        made = make(self.env, **self.kwargs) if isinstance(self.env, str) else self.env(**self.kwargs)
        self.made.append(made)
        return made

    def close(self) -> None:
        """Closes every instance that was made."""
        for env in self.made:
            env.close()

    def reset(self, env: gym.Env[Any, Any], seed: int) -> tuple[Any, dict[str, Any]]:
        """Returns what `env.reset` returns, having looked at it."""
        started = perf_counter()
        answer = env.reset(seed=seed)
        self.seconds["reset"].append(perf_counter() - started)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise Broken(f"reset returned {short(answer)}, not (observation, info)")
        self._look(*answer, f"after reset(seed={seed})")
        return answer

    def step(self, env: gym.Env[Any, Any], action: str) -> Step:
        """Returns what `env.step` returns, having looked at it."""
        started = perf_counter()
        answer = env.step(action)
        if len(action) < 1000:
            self.seconds["step"].append(perf_counter() - started)
        if not isinstance(answer, tuple) or len(answer) != 5:
            raise Broken(f"step returned {short(answer)}, not (observation, reward, terminated, truncated, info)")
        step, where = Step(action, *answer), f"after {short(action)}"
        self._look(step.observation, step.info, where)
        self._look_at_end(step, where)
        if isinstance(step.reward, bool) or not isinstance(step.reward, Real) or not math.isfinite(step.reward):
            self.complain("rewards", f"the reward is {step.reward!r} ({type(step.reward).__name__}) {where}")
        elif (span := getattr(env.unwrapped, "reward_range", None)) is not None:
            low, high = span
            if not low - _ROUNDING <= step.reward <= high + _ROUNDING:
                self.complain("rewards", f"the reward is {step.reward} {where}, outside reward_range=({low}, {high})")
        self.steps += 1
        return step

    def complain(self, name: str, text: str) -> None:
        """Keeps the first complaint of a check."""
        self.complaints.setdefault(name, text)

    def _look_at_end(self, step: Step, where: str) -> None:
        for name, flag in (("terminated", step.terminated), ("truncated", step.truncated)):
            if not isinstance(flag, bool | np.bool_):
                self.complain("ends", f"{name} is {flag!r} ({type(flag).__name__}) {where}")
        if (step.terminated or step.truncated) and type(success := step.info.get("success")) is not bool:
            told = "missing" if success is None else f"{success!r} ({type(success).__name__})"
            self.complain("ends", f"info['success'] is {told} at the end of an episode, {where}")
        self.terminated += bool(step.terminated)
        self.truncated += bool(step.truncated)

    def _look(self, observation: Any, info: Any, where: str) -> None:
        """Looks at what `reset` and `step` both return."""
        if not _is_content(observation):
            kind = type(observation).__name__
            self.complain("observations and info", f"the observation is {short(observation)} ({kind}) {where}")
        if not isinstance(info, dict):
            raise Broken(f"info is {short(info)} ({type(info).__name__}), not a dict, {where}")
        self.info = info
        for key, value in info.items():
            if problem := _info_problem(key, value):
                self.complain("observations and info", f"info[{key!r}] {problem} {where}")
        if "state_keys" in self.provides and self._provided("state_keys") and type(info.get("state_key")) is not str:
            self.complain("declarations", f"info['state_key'] is {info.get('state_key')!r} {where}")

    def _provided(self, what: str) -> bool:
        """Whether the arguments are those under which `provides` declares it."""
        return all(getattr(self.inner, key, None) == value for key, value in self.provides[what].items())

    def play(self, env: gym.Env[Any, Any], seed: int, agent: Policy | None = None, turns: int = TURNS) -> list[Step]:
        """Plays an episode of at most `turns` turns, the same way whatever its seed.

        Args:
            env: the instance.
            seed: of the task.
            agent: who acts; None draws among the admissible actions, or else among all texts.
            turns: that it may take.

        Returns:
            The answer of `reset`, then those of the steps.
        """
        rng, texts = random.Random(0), random_texts(env)
        observation, info = self.reset(env, seed)
        steps = [Step("", observation, 0.0, False, False, info)]
        for turn in range(turns):
            if agent is not None:
                action = _ask(agent, PolicyRequest("check", turn, observation, [], info, seed=turn))
            else:
                action = rng.choice(info.get("admissible_actions") or [next(texts)])
            steps.append(self.step(env, action))
            observation, info = steps[-1].observation, steps[-1].info
            if steps[-1].terminated or steps[-1].truncated:
                break
        return steps


def _ask(agent: Policy, request: PolicyRequest) -> str:
    """Returns the action of an agent, also where an event loop is running already (a notebook)."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, agent.act([request])).result()[0].text


def random_texts(env: gym.Env[Any, Any], seed: int = 0) -> Iterator[str]:
    """Yields random members of the action space (of all texts, where that is not Gymnasium's `Text`)."""
    space: gym.Space[Any] = AnyText()
    if isinstance(env.action_space, gym.spaces.Text):
        space = env.action_space
    space.seed(seed)
    while True:
        yield space.sample()


def hostile_texts(env: gym.Env[Any, Any], probe: Probe) -> Iterator[str]:
    """Yields `HOSTILE` and `HUGE`, then admissible actions whole and spoilt, and random text, for ever."""
    rng, texts = random.Random(1), random_texts(env, seed=1)
    yield from (*HOSTILE, *HUGE)
    while True:
        action = rng.choice(probe.info.get("admissible_actions") or [next(texts)])
        yield action
        yield action + rng.choice(HOSTILE)
        yield rng.choice(HOSTILE) + action
        yield next(texts)
        yield "".join(chr(rng.randrange(rng.choice((128, 0x110000)))) for _ in range(rng.randrange(20)))


def _is_content(observation: Any) -> bool:
    """Whether the rollout takes it: text, parts of a message, or Gymnasium's ``{"text", "image"}``."""
    if isinstance(observation, list):
        return all(isinstance(part, TextPart | ImagePart) for part in observation)
    return isinstance(observation, str) or (isinstance(observation, dict) and set(observation) == {"text", "image"})


def _info_problem(key: Any, value: Any) -> str:
    """Returns what is wrong with an entry of info, "" where nothing is."""
    if not isinstance(key, str):
        return f"is no str but {type(key).__name__} as a key"
    types = {"success": bool, "valid_action": bool, "state_key": str, "action_error": str, "reward_parts": dict}
    types["tool_schemas"] = list
    if (wanted := types.get(key)) is not None and type(value) is not wanted:
        return f"is {short(value)} ({type(value).__name__}), not {wanted.__name__},"
    if key == "admissible_actions" and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return f"is {short(value)}, not a list of str,"
    if key == "reward_parts" and not all(isinstance(part, int | float) for part in value.values()):
        return f"is {short(value)}, not a dict of float,"
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        return f"cannot be stored as JSON ({error})"
    return ""


def canonical(value: Any) -> str:
    """Returns a text that is equal exactly for what would be stored as equal."""
    return json.dumps(value, sort_keys=True, default=lambda v: v.tolist() if isinstance(v, np.ndarray) else repr(v))


def short(value: Any) -> str:
    """Returns `value` as an error message shows it: one line of at most 60 printable characters, and its size."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    size = f" ({len(value):,} characters)" if isinstance(value, str) and len(text) > 60 else ""
    return text if len(text) <= 60 else f"{text[:57]}...{size}"
