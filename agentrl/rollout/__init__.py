"""Rollout: episodes as coroutines, policy calls batched as they arrive, contexts token in, token out."""

from agentrl.rollout.collector import Collected, Collector, collect
from agentrl.rollout.context import Context, ContextBuilder
from agentrl.rollout.loop import run
from agentrl.rollout.outcome import score
from agentrl.rollout.summary import Summary, summarise
from agentrl.rollout.tasks import Task

__all__ = [
    "Collected",
    "Collector",
    "Context",
    "ContextBuilder",
    "Summary",
    "Task",
    "collect",
    "run",
    "score",
    "summarise",
]
