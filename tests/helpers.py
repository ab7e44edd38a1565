"""Synthetic episodes, and slow, plain versions of what the learning core computes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from agentrl.batch import Index, build_batch, score
from agentrl.credit import Advantage, Signals, load_credit
from agentrl.types import Trajectory, Turn

Tensor = torch.Tensor


def trajectory(id: str, group: str, outcome: float, turns: Sequence[Turn], **fields: Any) -> Trajectory:
    """An episode of no environment; a success where the outcome is positive."""
    fields = {"success": outcome > 0, "env": "none", "seed": 0} | fields
    return Trajectory(id=id, group_id=group, outcome=outcome, turns=list(turns), **fields)


def turn(prompt: Sequence[int], action: Sequence[int], logprobs: Sequence[float] | None = None, new_row: bool = False):
    """A turn of ids; log-probs default to -1."""
    logprobs = [-1.0] * len(action) if logprobs is None else list(logprobs)
    return Turn(
        observation="",
        action="",
        prompt_ids=list(prompt),
        action_ids=list(action),
        action_logprobs=logprobs,
        new_row=new_row,
    )


def episodes(
    seed: int, *, groups: int = 3, size: int = 4, turns: int = 4, vocab: int = 64, prompt: int = 6, action: int = 4
) -> list[Trajectory]:
    """Ragged random episodes with full history (one growing row each); every group has a success and a failure.

    Args:
        seed: of everything.
        groups, size: how many.
        turns, prompt, action: largest number of turns, of new context tokens per turn, of action tokens per turn.
        vocab: ids are drawn below this.
    """
    random = np.random.default_rng(seed)

    def ids(longest: int) -> list[int]:
        return random.integers(vocab, size=random.integers(1, longest + 1)).tolist()

    made = []
    for g, member in itertools.product(range(groups), range(size)):
        outcome = float(member) if member < 2 else float(random.integers(-1, 3)) / 2
        acts = [ids(action) for _ in range(random.integers(1, turns + 1))]
        steps = [turn(ids(prompt), act, random.normal(-2, 1, len(act)), new_row=t == 0) for t, act in enumerate(acts)]
        made.append(trajectory(f"{g}.{member}", f"g{g}", outcome, steps))
    return made


def per_turn(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The same episodes laid out as one row per turn: every turn carries its whole context."""
    return [
        t.model_copy(
            update={
                "turns": [
                    step.model_copy(update={"prompt_ids": context, "new_row": True})
                    for step, context in zip(t.turns, contexts(t), strict=True)
                ]
            }
        )
        for t in trajectories
    ]


def contexts(t: Trajectory) -> list[list[int]]:
    """Every id the model saw before each action."""
    out: list[list[int]] = []
    row: list[int] = []
    for step in t.turns:
        row = [*([] if step.new_row else row), *step.prompt_ids]
        out.append(row)
        row = [*row, *step.action_ids]
    return out


TOKEN_FIELDS = ("policy_logprob", "token_reward", "reference_logprob", "entropy", "value")
TURN_FIELDS = ("turn_reward", "turn_score")


def signals_of(
    trajectories: Sequence[Trajectory], reward: Tensor | None = None, seed: int = 7, **fields: Any
) -> Signals:
    """All signals of episodes, drawn from a seeded generator unless given in `fields` (`reward`: token rewards).

    Turns without action tokens hold junk that no method may read; leaving them out changes no other draw.
    """
    index = build_batch(trajectories).index
    acting = index.tokens_per_turn > 0
    turns = int(acting.sum())

    def generator(stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed + 1000 * stream)

    def per_turn_of(values: Tensor, junk: float) -> Tensor:
        return torch.full((index.M,), junk).masked_scatter(acting, values)

    keys = iter(torch.randint(4, (turns,), generator=generator(1)).tolist())
    made: dict[str, Any] = {
        "outcome": torch.tensor([t.outcome for t in trajectories], dtype=torch.float64),
        "token_reward": torch.randn(index.K, generator=generator(0)) if reward is None else reward,
        "policy_logprob": torch.randn(index.K, generator=generator(2)).abs().neg(),
        "reference_logprob": torch.randn(index.K, generator=generator(3)).abs().neg(),
        "entropy": torch.rand(index.K, generator=generator(4)),
        "value": torch.randn(index.K, generator=generator(5)),
        "turn_reward": per_turn_of(torch.randn(turns, generator=generator(6)), 100.0),
        "turn_score": per_turn_of(torch.rand(turns, generator=generator(7)), 1.0),
        "state_key": [f"state {next(keys)}" if act else "junk" for act in acting.tolist()],
        "names": [t.id for t in trajectories],
    }
    return Signals(index, **(made | fields))


def rearranged(signals: Signals, index: Index, trajs: Tensor, turns: Tensor, tokens: Tensor) -> Signals:
    """The signals in another order: entry j of each is entry `trajs[j]`, `turns[j]`, `tokens[j]` of the old one."""
    given = {name: getattr(signals, name) for name in TOKEN_FIELDS + TURN_FIELDS}
    return dataclasses.replace(
        signals,
        index=index,
        outcome=signals.outcome[trajs],
        **{name: given[name][tokens] for name in TOKEN_FIELDS if given[name] is not None},
        **{name: given[name][turns] for name in TURN_FIELDS if given[name] is not None},
        state_key=signals.state_key and [signals.state_key[i] for i in turns.tolist()],
        names=signals.names and [signals.names[i] for i in trajs.tolist()],
    )


def assign(name: str, options: dict[str, Any], signals: Signals) -> Advantage:
    """The advantage by a registered method."""
    method, checked = load_credit(name, options)
    return method(signals, checked)


def played_by(model: Any, trajectories: Sequence[Trajectory], temperature: float = 1.0) -> list[Trajectory]:
    """The episodes with the log-probs that `model` gives their actions, as if it had sampled them."""
    batch = build_batch(trajectories)
    logprobs = iter(score(model, batch, budget=10**6, temperature=temperature).logprob.tolist())
    out = []
    for t in trajectories:
        steps = [s.model_copy(update={"action_logprobs": [next(logprobs) for _ in s.action_ids]}) for s in t.turns]
        out.append(t.model_copy(update={"turns": steps}))
    return out


def plain_logp(model: Any, trajectories: Sequence[Trajectory], temperature: float = 1.0) -> Tensor:
    """(K, V) log-distributions at every action token, from one plain full-logits call per turn."""
    rows = []
    for t in trajectories:
        for step, context in zip(t.turns, contexts(t), strict=True):
            if step.action_ids:
                ids = torch.tensor([[*context, *step.action_ids]])
                logits = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1]
                rows.append(torch.log_softmax(logits / temperature, dim=-1))
    return torch.cat(rows)


def action_ids(trajectories: Sequence[Trajectory]) -> Tensor:
    """(K,) all action ids in order."""
    return torch.tensor([i for t in trajectories for step in t.turns for i in step.action_ids])


def perturbed(model: Any, size: float = 0.05, seed: int = 0) -> Any:
    """A copy of `model` with noise on every weight."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


def flat_gradient(model: Any) -> Tensor:
    """(P,) float64 gradient of all parameters."""
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


def flat_parameters(model: Any) -> Tensor:
    """(P,) a copy of all parameters."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference, relative to the largest entry of `theirs`."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


class Bandit(torch.nn.Module):
    """A causal LM in miniature: the next token's logits are one free vector, whatever the context."""

    def __init__(self, logits: Sequence[float]) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))
        self.config = SimpleNamespace()
        self._head = torch.nn.Identity()
        self._head.weight = torch.zeros(len(logits), 1)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self._head

    def base_model(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.logits.expand(*input_ids.shape, -1))
