"""agentrl: multi-turn reinforcement learning for language-model agents.

    import agentrl

    env = agentrl.make("Sokoban-v0")
    config = agentrl.load_config("configs/sokoban_oprl.yaml", ["iterations=5"])
    agentrl.train(config)

Importing this package loads neither torch nor any engine: heavy parts load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentrl.errors import (
    ActionError,
    AgentRLError,
    ConfigError,
    DataError,
    InfrastructureError,
    ModelError,
    UnknownNameError,
    UserError,
)
from agentrl.types import Group, Message, PreferencePair, StopReason, Trajectory, Turn

__version__ = "0.1.0"

_LAZY = {
    "TextEnv": "agentrl.envs",
    "AnyText": "agentrl.envs",
    "make": "agentrl.envs",
    "register": "agentrl.envs",
    "environment_ids": "agentrl.envs",
    "Policy": "agentrl.policy",
    "FunctionPolicy": "agentrl.policy",
    "load_policy": "agentrl.policy",
    "register_policy": "agentrl.policy",
    "RunConfig": "agentrl.config",
    "load_config": "agentrl.config",
    "collect": "agentrl.rollout",
    "TrajectoryBuffer": "agentrl.buffer",
    "Trainer": "agentrl.train",
    "sft": "agentrl.train.sft",
}
_PACKAGES = ("evaluate", "train")
"""Packages that can be called: their names are also those of the functions they are about."""

if TYPE_CHECKING:  # ignored: packages of these names, which mypy may meet first, by the order of its import cycle
    from agentrl.buffer import TrajectoryBuffer as TrajectoryBuffer
    from agentrl.config import RunConfig as RunConfig
    from agentrl.config import load_config as load_config
    from agentrl.envs import AnyText as AnyText
    from agentrl.envs import TextEnv as TextEnv
    from agentrl.envs import environment_ids as environment_ids
    from agentrl.envs import make as make
    from agentrl.envs import register as register
    from agentrl.evaluate import evaluate as evaluate  # type: ignore[no-redef]
    from agentrl.policy import FunctionPolicy as FunctionPolicy
    from agentrl.policy import Policy as Policy
    from agentrl.policy import load_policy as load_policy
    from agentrl.policy import register_policy as register_policy
    from agentrl.rollout import collect as collect
    from agentrl.train import Trainer as Trainer
    from agentrl.train import train as train  # type: ignore[no-redef]
    from agentrl.train.sft import sft as sft

__all__ = [
    "ActionError",
    "AgentRLError",
    "ConfigError",
    "DataError",
    "Group",
    "InfrastructureError",
    "Message",
    "ModelError",
    "PreferencePair",
    "StopReason",
    "Trajectory",
    "Turn",
    "UnknownNameError",
    "UserError",
    *_LAZY,
    *_PACKAGES,
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"agentrl.{name}")
    if name in _LAZY:
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'agentrl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
