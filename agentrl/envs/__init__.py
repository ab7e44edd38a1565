"""Environments: `gymnasium.Env` with text observations and text actions."""

from agentrl.envs.core import AnyText, TextEnv
from agentrl.envs.registry import environment_ids, make, register

__all__ = ["AnyText", "TextEnv", "environment_ids", "make", "register"]
