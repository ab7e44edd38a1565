"""Stored trajectories scored again: another outcome rule, a judge of one's own, another credit method.

Neither environment nor model is needed, so that only what files hold can be used: outcomes, rewards, infos, texts,
sampled ids and their log-probs. Credit that needs a model's word on the tokens (an implicit PRM, entropies, values) is
refused; `docs/offline.md` shows how to train such a model on the same files.

Left out: asking the judge of Social-v0 again. It reads the private goals and secrets of both characters and the whole
dialogue, which the agent never saw and the file does not hold.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agentrl.config.schema import OutcomeConfig
from agentrl.errors import DataError, UserError
from agentrl.policy import load_function
from agentrl.rollout import run, score
from agentrl.types import Trajectory, Turn

Rule = Callable[[Trajectory], tuple[float, bool]]
"""Outcome and success of a scorable trajectory."""

FROM_FILES = frozenset({"turn_rewards", "state_keys", "turn_scores"})
"""Needs of credit methods that files (or, for ``turn_scores``, a served PRM) can meet."""


def rule_of(config: OutcomeConfig) -> Rule:
    """Returns the rule that a run's ``outcome`` section is."""
    return lambda trajectory: score(trajectory, config)


def load_rule(name: str) -> Rule:
    """Returns the function ``module:function`` as a rule: it takes a `Trajectory` and returns (outcome, success).

    A number alone is an outcome whose success is that it is above 0. An async function is awaited. The rule raises
    `UserError`, with the trajectory's id, where the function raises or answers with anything else.

    Raises:
        UserError: no such module or function.
    """
    try:
        function = load_function(name)
    except UserError as error:
        raise UserError(f"rule {name!r}: {error}") from error

    def rule(trajectory: Trajectory) -> tuple[float, bool]:
        try:
            answer = function(trajectory)
            if inspect.iscoroutine(answer):
                answer = run(answer)
        except Exception as error:
            raise UserError(
                f"rule {name!r} failed on trajectory {trajectory.id!r}: {type(error).__name__}: {error}"
            ) from error
        try:
            outcome, success = answer if isinstance(answer, tuple) else (answer, float(answer) > 0)
            if math.isfinite(outcome := float(outcome)):
                return outcome, bool(success)
        except (TypeError, ValueError, OverflowError):
            pass
        raise UserError(
            f"rule {name!r} answered {answer!r:.80} to trajectory {trajectory.id!r}; wanted a finite outcome, or "
            "(outcome, success)"
        )

    return rule


def rescore(trajectories: Sequence[Trajectory], rule: Rule) -> list[Trajectory]:
    """Returns copies of `trajectories` with the outcomes of `rule`; what infrastructure ended stays unscored."""
    found = []
    for trajectory in trajectories:
        outcome, success = rule(trajectory) if trajectory.scorable else (0.0, False)
        found.append(trajectory.model_copy(update={"outcome": outcome, "success": success}))
    return found


def credit_of(
    trajectories: Sequence[Trajectory],
    method: str,
    options: Mapping[str, Any] | None = None,
    *,
    prm_url: str | None = None,
) -> list[dict[str, Any]]:
    """Returns what a credit method says of each turn of the scorable trajectories, as a run's ``credit/`` holds it.

    Trajectories of policies without tokens count each turn as one token.

    Args:
        trajectories: one batch: groups are compared inside it.
        method: name of the method.
        options: its options.
        prm_url: served PRM, for methods that need ``turn_scores``.

    Returns:
        ``{"id", "episode", "step"}`` for each trajectory, and ``"reward"`` with a served PRM; lists of one number a
        turn.

    Raises:
        UserError: the method needs what no file holds.
        DataError: an environment that gave no state keys, or ids without log-probs.
        InfrastructureError: the served PRM does not answer.
    """
    import torch

    from agentrl.batch import build_batch
    from agentrl.credit import Signals, load_credit
    from agentrl.train.judge import state_keys

    found, checked = load_credit(method, dict(options or {}))
    needs = found.needs_of(checked)
    if missing := sorted(needs - FROM_FILES):
        raise UserError(
            f"credit method {method!r} needs {', '.join(map(repr, missing))}, which a model computes and no trajectory "
            "file holds; see docs/offline.md, or take a method that needs nothing (agentrl credit)"
        )
    if "turn_scores" in needs and prm_url is None:
        raise UserError(f"credit method {method!r} wants the scores of a served PRM: give its URL (--prm-url)")
    members = [one for one in trajectories if one.scorable]
    if not members:
        raise DataError("no trajectory can be scored: infrastructure ended all of them")
    batch = build_batch([one if one.action_tokens else _one_token_a_turn(one) for one in members])
    fields: dict[str, Any] = {}
    if "turn_rewards" in needs:
        rewards = [turn.reward for one in members for turn in one.turns]
        fields["turn_reward"] = torch.tensor(rewards, dtype=torch.float64)
    if "state_keys" in needs:
        fields["state_key"] = state_keys(members)
    if "turn_scores" in needs:
        from agentrl.prm.served import ServedPRM

        fields["turn_score"] = ServedPRM(str(prm_url)).score(members)
    outcome = torch.tensor([one.outcome for one in members], dtype=torch.float64)
    names = [one.id for one in members]
    advantage = found(Signals(batch.index, outcome, policy_logprob=batch.behaviour, names=names, **fields), checked)
    columns = {"episode": advantage.episode.tolist(), "step": advantage.step.tolist()}
    if "turn_score" in fields:
        columns["reward"] = fields["turn_score"].tolist()
    lines, start = [], 0
    for one in members:
        end = start + len(one.turns)
        lines.append({"id": one.id, **{name: values[start:end] for name, values in columns.items()}})
        start = end
    return lines


def _one_token_a_turn(trajectory: Trajectory) -> Trajectory:
    token: dict[str, Any] = {"prompt_ids": [0], "action_ids": [0], "action_logprobs": [0.0], "new_row": True}
    turns: list[Turn] = [turn.model_copy(update=token) for turn in trajectory.turns]
    return trajectory.model_copy(update={"turns": turns})
