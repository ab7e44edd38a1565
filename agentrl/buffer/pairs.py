"""Preference pairs inside a group: what the implicit PRM learns from (algorithms.md 1.3; arXiv 2509.19199, Eq. 2).

The paper pairs trajectories of one prompt, successes against failures, and is silent on which of them; its code takes
all. Pairs are formed over the whole batch, never per shard or micro-batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from agentrl.config.schema import PairConfig
from agentrl.types import PreferencePair, Trajectory

Positions = tuple[int, int]
"""(winner, loser), as positions in the list of trajectories."""


def preference_pairs(
    trajectories: Sequence[Trajectory], config: PairConfig | None = None, *, seed: int = 0
) -> list[PreferencePair]:
    """Returns the pairs (winner, loser), as positions in `trajectories`; both ends always share a `group_id`.

    Binary (`graded=False`): a success beats a failure. Graded: the higher outcome beats the lower. A group of one, or
    one whose members all ended alike, has no pair. Trajectories that are not scorable, or have no action tokens, enter
    none.

    Modes:
        all: every such combination.
        best_worst: one pair per group, the one with the widest gap of outcomes (ties broken by `seed`).
        one_to_one: random matching by `seed`; each trajectory is in one pair at most, and no further pair would fit.
        margin: as ``all``, with a gap of outcomes strictly above `config.margin`.

    `config.match_length` first drops combinations whose numbers of turns differ by more. Weights are 1, or with
    `config.per_group_mean` 1 / (pairs of the group): each group weighs the same, and the total is the number of groups
    that have pairs.

    Args:
        trajectories: (N,) of any number of groups, in any order.
        config: None takes the defaults (the paper's: binary, all).
        seed: decides ties and matchings; each group draws from its own stream, whatever other groups there are.

    Returns:
        Pairs ordered by group (first appearance), then winner, then loser.
    """
    config = config or PairConfig()
    pairs = []
    for group_id, members in _members(trajectories).items():
        chosen = _candidates(members, trajectories, config)
        if len(chosen) > 1 and config.mode in ("best_worst", "one_to_one"):
            rng = random.Random(f"{seed}/{group_id}")
            rng.shuffle(chosen)
            chosen = _widest(chosen, trajectories) if config.mode == "best_worst" else _matching(chosen)
        weight = 1 / len(chosen) if chosen and config.per_group_mean else 1.0
        pairs += [PreferencePair.model_construct(winner=i, loser=j, weight=weight) for i, j in sorted(chosen)]
    return pairs


def pair_counts(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """Returns how the groups of `trajectories` can be compared, for the log.

    Every group falls into one of: ``mixed`` (successes and failures), ``all_success``, ``all_failure``, ``singleton``
    (one usable trajectory), ``empty`` (none); ``groups`` is their sum. ``unscorable`` and ``no_action_tokens`` count
    the trajectories left out.
    """
    unscorable = sum(not t.scorable for t in trajectories)
    usable = _members(trajectories)
    kinds = ["groups", "mixed", "all_success", "all_failure", "singleton", "empty"]
    counts = dict.fromkeys(kinds, 0)
    for members in usable.values():
        successes = sum(trajectories[i].success for i in members)
        if len(members) < 2:
            kind = "singleton" if members else "empty"
        elif 0 < successes < len(members):
            kind = "mixed"
        else:
            kind = "all_success" if successes else "all_failure"
        counts[kind] += 1
        counts["groups"] += 1
    no_tokens = len(trajectories) - unscorable - sum(map(len, usable.values()))
    return counts | {"unscorable": unscorable, "no_action_tokens": no_tokens}


def _members(trajectories: Sequence[Trajectory]) -> dict[str, list[int]]:
    """Returns group id -> positions of its usable trajectories, groups in order of first appearance."""
    members: dict[str, list[int]] = {}
    for position, trajectory in enumerate(trajectories):
        group = members.setdefault(trajectory.group_id, [])
        if trajectory.scorable and trajectory.action_tokens > 0:
            group.append(position)
    return members


def _candidates(members: list[int], trajectories: Sequence[Trajectory], config: PairConfig) -> list[Positions]:
    """Returns every (winner, loser) of one group that `config` allows."""
    outcome = {i: trajectories[i].outcome for i in members}
    success = {i: trajectories[i].success for i in members}
    turns = {i: len(trajectories[i].turns) for i in members}
    if config.graded:
        pairs = [(i, j) for i in members for j in members if outcome[i] > outcome[j]]
    else:
        pairs = [(i, j) for i in members if success[i] for j in members if not success[j]]
    if config.mode == "margin":
        pairs = [(i, j) for i, j in pairs if outcome[i] - outcome[j] > config.margin]
    if config.match_length is not None:
        pairs = [(i, j) for i, j in pairs if abs(turns[i] - turns[j]) <= config.match_length]
    return pairs


def _widest(candidates: list[Positions], trajectories: Sequence[Trajectory]) -> list[Positions]:
    return [max(candidates, key=lambda pair: trajectories[pair[0]].outcome - trajectories[pair[1]].outcome)]


def _matching(candidates: list[Positions]) -> list[Positions]:
    taken: set[int] = set()
    chosen = []
    for winner, loser in candidates:
        if winner not in taken and loser not in taken:
            chosen.append((winner, loser))
            taken |= {winner, loser}
    return chosen
