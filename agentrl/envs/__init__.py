"""Environments: `gymnasium.Env` with text observations and text actions."""

from agentrl.envs.core import AnyText, TextEnv
from agentrl.envs.registry import environment_ids, make, register
from agentrl.envs.tabular import Tabular
from agentrl.envs.tools import ToolEnv, tool

__all__ = ["AnyText", "Tabular", "TextEnv", "ToolEnv", "environment_ids", "make", "register", "tool"]
