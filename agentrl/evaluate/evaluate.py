"""`evaluate`: a policy plays held-out tasks, one episode each."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from pydantic import BaseModel, Field

from agentrl.config.schema import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.errors import InfrastructureError, UserError
from agentrl.evaluate.stats import Interval, Proportion, bootstrap_mean, wilson
from agentrl.policy import FunctionPolicy, Policy, Sampling
from agentrl.rollout import Collector, Task
from agentrl.types import Content, Trajectory


class EvalResult(BaseModel):
    """What an evaluation found. Means and intervals are over the episodes that can be scored."""

    env: str
    env_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the environment, those for evaluation included."""
    policy: str
    episodes: int
    """Episodes asked for: scored ones and infrastructure failures."""
    success: Proportion
    """Success rate with its 95 % Wilson interval."""
    outcome: Interval
    """Mean outcome reward with its 95 % bootstrap interval over tasks."""
    turns: float
    """Mean turns per episode."""
    action_tokens: float
    """Mean sampled tokens per episode; 0 for policies without tokens."""
    invalid_action_rate: float
    """Share of turns whose text was no action."""
    stop_reasons: dict[str, int]
    """Every episode by the reason why it stopped, infrastructure failures included."""
    infrastructure_failures: int
    """Episodes that no retry could finish; in no mean above."""
    seconds: float
    seed: int
    temperature: float | None
    """Of the sampling; None for policies that do not sample tokens."""


def evaluate(
    policy: Policy | Callable[[Content], str],
    env: EnvConfig | str,
    *,
    episodes: int = 256,
    seed: int = 10**12,
    rollout: RolloutConfig | None = None,
    sampling: Sampling | None = None,
    outcome: OutcomeConfig | None = None,
    on_episode: Callable[[Trajectory], None] | None = None,
) -> EvalResult:
    """Plays the tasks `seed`, `seed + 1`, ... with `policy`, one episode each, and returns what came of it.

    Args:
        policy: any policy, or a plain function ``observation -> action``.
        env: environment; its `eval_kwargs` override its `kwargs` here.
        episodes: number of tasks.
        seed: of the first task, and of the sampling.
        rollout: history, limits and deadlines; None takes the defaults.
        sampling: how actions are drawn; None takes `rollout`'s.
        outcome: what an episode is worth and what counts as success.
        on_episode: called with every finished episode, for progress bars and files.

    Raises:
        UserError: `episodes` below 1, or an environment that cannot be made.
        InfrastructureError: not one episode could be scored; the message says why.
    """
    if episodes < 1:
        raise UserError(f"episodes={episodes}: an evaluation needs at least 1")
    policy = policy if isinstance(policy, Policy) else _as_policy(policy)
    env = EnvConfig(id=env) if isinstance(env, str) else env
    rollout = rollout or RolloutConfig()
    sampling = sampling or Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens)
    tasks = [Task(seed=seed + i, group_id=f"eval-{seed + i}") for i in range(episodes)]
    with Collector(
        policy, env, rollout, outcome or OutcomeConfig(), evaluation=True, on_episode=on_episode
    ) as collector:
        collected = collector.collect(tasks, sampling=sampling, seed=seed)
    scored = collected.trajectories
    if not scored:
        raise InfrastructureError(
            f"none of {episodes} episodes of {env.id} could be scored; the first: {collected.failed[0].error}"
        )
    turns = [turn for t in scored for turn in t.turns]
    return EvalResult(
        env=env.id,
        env_kwargs={**env.kwargs, **env.eval_kwargs},
        policy=policy.name,
        episodes=episodes,
        success=wilson(sum(t.success for t in scored), len(scored)),
        outcome=bootstrap_mean([t.outcome for t in scored], [t.seed for t in scored], seed=seed),
        turns=fmean(len(t.turns) for t in scored),
        action_tokens=fmean(t.action_tokens for t in scored),
        invalid_action_rate=fmean(turn.info.get("valid_action") is False for turn in turns) if turns else 0.0,
        stop_reasons=collected.counts,
        infrastructure_failures=len(collected.failed),
        seconds=collected.seconds["total"],
        seed=seed,
        temperature=sampling.temperature if any(t.action_tokens for t in scored) else None,
    )


def _as_policy(function: Callable[[Content], str]) -> Policy:
    name = getattr(function, "__name__", type(function).__name__)
    return FunctionPolicy(lambda request: function(request.observation), name)
