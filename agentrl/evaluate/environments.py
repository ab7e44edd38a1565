"""What environments are like, measured: how their scripted agents fare, how long their texts are, how fast they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from time import perf_counter

from pydantic import BaseModel

from agentrl.config.schema import OutcomeConfig, RolloutConfig
from agentrl.envs import make
from agentrl.envs.registry import scripted_agents
from agentrl.errors import UserError
from agentrl.evaluate.evaluate import evaluate
from agentrl.evaluate.stats import Interval, Proportion
from agentrl.policy import load_policy
from agentrl.types import Trajectory, text_of

_RETURN = OutcomeConfig(rule="return")
_REPLAY_S = 2.0
"""Seconds that measuring the speed takes at most, for each agent."""


class AgentStats(BaseModel):
    """One scripted agent in one environment. Means are over scorable episodes and their turns."""

    env: str
    role: str
    """``random``, ``naive`` or ``expert``."""
    policy: str
    success: Proportion
    """With its 95 % Wilson interval."""
    outcome: Interval
    """Mean of the environment's return (sum of rewards), with its 95 % bootstrap interval over tasks."""
    turns: float
    """Mean turns of an episode."""
    characters: float
    """Mean characters of an observation."""
    words: float
    """Mean words of an observation, between white space."""
    tokens: float | None
    """Mean tokens of an observation; None without a tokenizer."""
    steps_per_second: float
    """Of the environment alone: recorded actions played again, `reset` left out."""
    resets_per_second: float
    failures: int
    """Episodes that infrastructure ended; in no mean above."""


def agent_stats(
    env_id: str,
    role: str,
    *,
    episodes: int = 200,
    seed: int = 10**12,
    tokens: Callable[[str], int] | None = None,
    on_episode: Callable[[Trajectory], None] | None = None,
) -> AgentStats:
    """Plays the tasks `seed`, `seed` + 1, ... with the scripted agent that has `role` in an environment.

    Args:
        env_id: a registered environment.
        role: ``random``, ``naive`` or ``expert``.
        episodes: number of tasks.
        seed: of the first.
        tokens: counts the tokens of a text.
        on_episode: called with every finished episode.

    Raises:
        UserError: the environment has no such agent, or cannot be made.
        InfrastructureError: not one episode could be scored.
    """
    agents = scripted_agents(env_id)
    if role not in agents:
        known = ", ".join(agents) or "none"
        raise UserError(
            f"environment {env_id!r} has no {role} agent (it has: {known}); name it in register(agents=...)"
        )
    played: list[Trajectory] = []

    def keep(trajectory: Trajectory) -> None:
        played.append(trajectory)
        if on_episode is not None:
            on_episode(trajectory)

    policy = load_policy(agents[role].policy, **agents[role].options)
    # Scripted agents keep nobody waiting: more environments than cores (some are a Java VM each) gain nothing.
    rollout = RolloutConfig(workers=min(16, os.cpu_count() or 1), step_deadline_s=300)
    result = evaluate(policy, env_id, episodes=episodes, seed=seed, rollout=rollout, outcome=_RETURN, on_episode=keep)
    scored = [trajectory for trajectory in played if trajectory.scorable]
    texts = [text_of(turn.observation) for trajectory in scored for turn in trajectory.turns]
    count = max(len(texts), 1)
    steps, resets = _speed(env_id, scored)
    return AgentStats(
        env=env_id,
        role=role,
        policy=policy.name,
        success=result.success,
        outcome=result.outcome,
        turns=result.turns,
        characters=sum(map(len, texts)) / count,
        words=sum(len(text.split()) for text in texts) / count,
        tokens=sum(map(tokens, texts)) / count if tokens is not None else None,
        steps_per_second=steps,
        resets_per_second=resets,
        failures=result.infrastructure_failures,
    )


def _speed(env_id: str, played: Sequence[Trajectory]) -> tuple[float, float]:
    """Returns steps and resets a second of an instance that plays recorded episodes again, nothing around it."""
    env = make(env_id)
    stepping = resetting = 0.0
    steps = resets = 0
    try:
        for trajectory in played:
            started = perf_counter()
            env.reset(seed=trajectory.seed)
            reset = perf_counter()
            for turn in trajectory.turns:
                env.step(turn.action)
            resetting, stepping = resetting + reset - started, stepping + perf_counter() - reset
            steps, resets = steps + len(trajectory.turns), resets + 1
            if resetting + stepping > _REPLAY_S:
                break
    finally:
        env.close()
    return steps / max(stepping, 1e-9), resets / max(resetting, 1e-9)
