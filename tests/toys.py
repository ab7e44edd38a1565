"""Small worlds to train in, small models, and the settings of a run that takes a second or two."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gymnasium as gym

from agentrl.config import EnvConfig, RunConfig
from agentrl.config.load import checked
from agentrl.envs import TextEnv
from agentrl.errors import ActionError
from agentrl.policy import FunctionPolicy, PolicyRequest

WORDS = ("red", "green", "blue")

SOKOBAN: dict[str, Any] = {
    "id": "Sokoban-v0",
    "kwargs": {"size": 6, "observation": "cells", "max_solution": 2},
    "instructions": "",
    "max_turns": 10,
}
"""Levels so small that moving at random solves a third of them."""


def register(env_id: str, env: type[TextEnv], max_turns: int | None = None, **kwargs: Any) -> None:
    """Registers `env` with Gymnasium alone, so that ``agentrl envs`` and its hints do not list what only tests know."""
    gym.register(env_id, env, max_episode_steps=max_turns, kwargs=kwargs, disable_env_checker=True, order_enforce=False)


class Echo(TextEnv):
    """Each of `turns` observations names a word; an episode is a success if every one is said back."""

    instructions = "Say it."
    fast = True

    def __init__(self, turns: int = 2) -> None:
        super().__init__()
        self.turns = turns

    def begin(self, options: dict[str, Any]) -> Any:
        self.right = self.turn = 0
        return self.show(), {"admissible_actions": list(WORDS)}

    def show(self) -> str:
        self.word = WORDS[int(self.np_random.integers(len(WORDS)))]
        return f"word {self.word}"

    def parse_action(self, text: str) -> str:
        if text not in WORDS:
            raise ActionError("not a word")
        return text

    def play(self, action: str) -> Any:
        return self.next(action == self.word)

    def on_invalid(self, error: ActionError) -> Any:
        return self.next(False)

    def next(self, right: bool) -> Any:
        self.turn += 1
        self.right += right
        info = {"success": self.right == self.turns, "admissible_actions": list(WORDS)}
        return self.show(), float(right), self.turn == self.turns, info


register("Echo-v0", Echo)


def parrot(skill: float) -> FunctionPolicy:
    """Says the word with probability `skill`, else one at random."""

    def act(request: PolicyRequest) -> str:
        rng = random.Random(request.seed)
        return str(request.observation).split()[-1] if rng.random() < skill else rng.choice(WORDS)

    return FunctionPolicy(act)


def make_model(path: Path, env: EnvConfig, **shape: Any) -> Path:
    """A random model of two layers that knows the words of `env`."""
    from agentrl.evaluate.texts import environment_texts
    from agentrl.models.init import init_model

    texts, words = environment_texts(env, 8)
    init_model(path, texts, **{"hidden": 32, "layers": 2, "heads": 4, "vocab": 300, "words": words} | shape)
    return path


def clone(start: Path, out: Path, env: EnvConfig, policy: Any, episodes: int = 400, **options: Any) -> Path:
    """Fine-tunes `start` on episodes of `policy`."""
    from agentrl.config import OutcomeConfig, RolloutConfig
    from agentrl.rollout import Collector, Task
    from agentrl.train.sft import sft

    with Collector(policy, env, RolloutConfig(), OutcomeConfig()) as collector:
        played = collector.collect([Task(5_000_000 + i, str(i)) for i in range(episodes)]).trajectories
    sft(str(start), played, str(out), **{"lr": 1e-2, "batch_tokens": 512, "threads": 1} | options)
    return out


def run_config(run_dir: Path, model: Path, **settings: Any) -> RunConfig:
    """A run of 3 iterations of 2 x 4 Sokoban episodes without evaluation; `settings` override it, keys dotted by __."""
    config: dict[str, Any] = {
        "run_dir": str(run_dir),
        "iterations": 3,
        "env": SOKOBAN,
        "model": {"path": str(model), "threads": 1},
        "rollout": {"groups": 2, "group_size": 4, "history": "window(0)", "max_new_tokens": 3},
        "credit": {"method": "rloo"},
        "prm": {"lr": 1e-3},
        "policy_update": {"lr": 1e-3},
        "eval": {"every": 0},
        "checkpoint": {"every": 1},
        "log": {"tensorboard": False, "progress": False},
    }
    for key, value in settings.items():
        section, _, name = key.partition("__")
        config[section] = {**config.get(section, {}), name: value} if name else value
    return checked(RunConfig, config)


MEASURED = ("seconds", "episode_seconds", "elapsed", "peak_memory_mb")


def timeless(value: Any) -> Any:
    """`value` without what differs between two equal runs: wall times and memory."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in MEASURED}
    return [timeless(item) for item in value] if isinstance(value, list) else value
