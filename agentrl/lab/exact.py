"""The exact advantage of every turn, by dynamic programming under the policy that played it.

    V_0(s) = 0      Q_h(s, a) = 1 if a solves, 0 if it ends the episode unsolved, else V_{h-1}(s')
    V_h(s) = sum_a pi(a|s) Q_h(s, a) + pi(no action|s) V_{h-1}(s)           h = turns left, this one included
    A_h(s, a) = Q_h(s, a) - V_h(s)

pi(a|s) is the probability of the action's canonical text with its end of turn, from one forward pass over all states.
What is left counts as text that is no action and stays put; other spellings of an action are therefore booked there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from agentrl.batch import build_batch, score
from agentrl.envs import Tabular
from agentrl.models.chat import ChatCodec
from agentrl.types import Trajectory, Turn


class ExactValues:
    """Values of one policy on task instances; make a new one after each policy update.

    Args:
        model: the policy's weights.
        chat: its codec.
        tables: task instances by name.
        instructions: system prompt that the policy plays with.
        horizon: turn limit.
        temperature: of the sampler.
        budget: tokens per forward pass.
    """

    def __init__(
        self,
        model: Any,
        chat: ChatCodec,
        tables: Mapping[str, Tabular],
        *,
        instructions: str,
        horizon: int,
        temperature: float = 1.0,
        budget: int = 32768,
    ) -> None:
        self.tables, self.horizon = tables, horizon
        self.state_of = {name: {key: i for i, key in enumerate(table.keys)} for name, table in tables.items()}
        self.values: dict[str, np.ndarray] = {}
        """(horizon + 1, S) by task: V_h."""
        self.quality: dict[str, np.ndarray] = {}
        """(horizon + 1, S, A) by task: Q_h; row 0 is unused."""
        for name, pi in self._policies(model, chat, instructions, temperature, budget).items():
            self.values[name], self.quality[name] = solve(tables[name], pi, horizon)

    def advantage(self, task: str, state_key: str, action: str | None, turns_left: int) -> float:
        """Returns A_h(s, a) of an action (canonical text; None: the text was no action) with `turns_left` turns left.

        Raises:
            KeyError: a state or an action that the task's table does not have.
        """
        state = self.state_of[task][state_key]
        value = self.values[task][turns_left][state]
        if action is None:
            return float(self.values[task][turns_left - 1][state] - value)
        return float(self.quality[task][turns_left][state, self.tables[task].actions.index(action)] - value)

    def _policies(
        self, model: Any, chat: ChatCodec, instructions: str, temperature: float, budget: int
    ) -> dict[str, np.ndarray]:
        """(S, A) probabilities of each task: the product over an action's tokens, its end of turn included."""
        encoded = {action: chat.encode_action(action) for table in self.tables.values() for action in table.actions}
        turns = []
        for table in self.tables.values():
            for observation in table.observations:
                prompt = chat.start(instructions, observation)
                for ids in (encoded[action] for action in table.actions):
                    turns.append(
                        Turn.model_construct(
                            prompt_ids=prompt, action_ids=ids, action_logprobs=[0.0] * len(ids), new_row=True
                        )
                    )
        batch = build_batch([Trajectory.model_construct(id="states", group_id="states", turns=turns)])
        batch.device = str(next(model.parameters()).device)
        logp = score(model, batch, budget=budget, temperature=temperature).logprob
        total = torch.zeros(batch.index.M, dtype=torch.float64).index_add_(0, batch.index.turn_of_token, logp.double())
        flat, start, found = total.exp().numpy(), 0, {}
        for name, table in self.tables.items():
            size = len(table.keys) * len(table.actions)
            found[name] = flat[start : start + size].reshape(-1, len(table.actions))
            start += size
        return found


def solve(table: Tabular, pi: np.ndarray, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns V (horizon + 1, S) and Q (horizon + 1, S, A) of the policy `pi` (S, A) by backward induction."""
    states = len(table.keys)
    values = np.zeros((horizon + 1, states))
    quality = np.zeros((horizon + 1, states, len(table.actions)))
    stay = 1 - pi.sum(1)
    going = ~(table.solved | table.ended)
    for h in range(1, horizon + 1):
        quality[h] = np.where(going, values[h - 1][table.next_state], table.solved.astype(float))
        values[h] = (pi * quality[h]).sum(1) + stay * values[h - 1]
    return values, quality
