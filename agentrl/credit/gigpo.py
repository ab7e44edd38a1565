"""GiGPO (arXiv 2505.10978): turns that acted in the same state of the same task are compared with one another.

    A^E_i     = (R_i - mean_g R) / F                                          F = std, or 1 (`scale: false`)
    G_t       = sum_{k >= t} gamma^(k-t) r_k                                  discounted return from turn t
    S(s)      = {(i, t) of the group : state_t^i = s}                         anchor group, also within a trajectory
    A^S_(i,t) = (G_t - mean_S G) / F_S
    A_(i,t)   = A^E_i + omega A^S_(i,t),                                      shared by the turn's tokens

Unlike OPRL's, this step term is a return-to-go of the environment's rewards. An anchor group of one gives 0: without
states that come back there is no step term (the metric ``anchored`` is the share of turns that have company). Turns
without action tokens are left out: of returns, of anchor groups and of the count of turns that discounts.

As in the paper, the statistics of A^E count a trajectory once; verl-agent's ``compute_mean_std_cross_steps`` counts it
once per turn (`episode_per_turn`). verl-agent lets the raw outcome of a group of one through; here it gives 0.
"""

from __future__ import annotations

from difflib import SequenceMatcher

import torch
from pydantic import Field

from agentrl.batch.index import Index, count, segment_mean, suffix_sum
from agentrl.credit.base import (
    Advantage,
    CreditMethod,
    Need,
    Options,
    Signals,
    acting_turns,
    broadcast,
    episode_advantage,
    step_share,
    zscore,
)

Tensor = torch.Tensor


class GiGPOOptions(Options):
    """Options of GiGPO."""

    gamma: float = Field(default=0.95, ge=0, le=1)
    """Discount per turn."""
    omega: float = Field(default=1.0, ge=0)
    """Weight of the step term."""
    scale: bool = False
    """Divide both terms by their standard deviation (+ 1e-6). The paper's better form on WebShop does not."""
    ddof: int = 1
    """Of those standard deviations: 1 divides by n - 1."""
    similarity: float | None = Field(default=None, gt=0, le=1)
    """States this similar are the same: the ratio of `difflib.SequenceMatcher` on their keys. None: equal keys only.
    Slow with many states a group: up to a millisecond for each pair of different keys of 64 characters."""
    terminal_outcome: bool = False
    """The only reward is the outcome, on the last turn: for environments that reward nothing before the end."""
    episode_per_turn: bool = False
    """Statistics of A^E over turns rather than trajectories: long episodes count more."""


def anchor_groups(group: Tensor, keys: list[str], similarity: float | None = None) -> Tensor:
    """Returns (L,) int64: the anchor group of each turn, numbered from 0.

    With `similarity`, a state joins the first anchor group of its task whose first key is similar enough, else opens
    one: greedy, as verl-agent does, but over the distinct keys in sorted order, so that the order of trajectories does
    not matter. Ratios are computed once per distinct pair; `autojunk` is off, as it takes boards drawn with few
    characters for dissimilar to themselves.

    Args:
        group: (L,) group of each turn.
        keys: L states.
        similarity: least ratio of two keys of the same state, 0..1.
    """
    states = list(zip(group.tolist(), keys, strict=True))
    ids = {state: i for i, state in enumerate(sorted(set(states)))}
    if similarity is not None:
        ids = _merge_similar(ids, similarity)
    return torch.tensor([ids[state] for state in states], dtype=torch.int64)


def _merge_similar(ids: dict[tuple[int, str], int], similarity: float) -> dict[tuple[int, str], int]:
    """Gives every (group, key), sorted, the id of the first key of its group that is similar enough."""
    known: dict[tuple[str, str], bool] = {}
    heads: dict[int, list[str]] = {}
    merged: dict[tuple[int, str], int] = {}
    for task, key in ids:
        for head in heads.setdefault(task, []):
            if (key, head) not in known:
                known[key, head] = _similar(key, head, similarity)
            if known[key, head]:
                merged[task, key] = merged[task, head]
                break
        else:
            heads[task].append(key)
            merged[task, key] = ids[task, key]
    return merged


def _similar(key: str, head: str, similarity: float) -> bool:
    """Whether the ratio of two keys reaches `similarity`; cheap upper bounds of it first."""
    matcher = SequenceMatcher(None, key, head, autojunk=False)
    bounds = (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)
    return all(bound() >= similarity for bound in bounds)


def episode_term(index: Index, outcome: Tensor, options: GiGPOOptions) -> Tensor:
    """Returns A^E (N,) float64."""
    if not options.episode_per_turn:
        return episode_advantage(index, outcome, "grpo" if options.scale else "dr_grpo", ddof=options.ddof)
    acting = index.tokens_per_turn > 0
    traj = index.traj_of_turn[acting]
    advantage = torch.zeros(index.N, dtype=torch.float64)
    advantage[traj] = _against(outcome[traj], index.group_of_traj[traj], index.G, options)
    return advantage


def _against(values: Tensor, owner: Tensor, size: int, options: GiGPOOptions) -> Tensor:
    """Returns float64 values against their segment's mean, in its standard deviations with `scale`."""
    if options.scale:
        return zscore(values, owner, size, ddof=options.ddof)
    return values.double() - segment_mean(values, owner, size)[owner]


def gigpo(signals: Signals, options: GiGPOOptions) -> Advantage:
    """Returns A^E + omega A^S per action token (K,). Needs `Signals.state_key` and, by option, `turn_reward`."""
    index = signals.index
    assert signals.state_key is not None
    acting, place = acting_turns(index)
    traj = index.traj_of_turn[acting]
    if options.terminal_outcome:
        last = place == count(traj, index.N)[traj] - 1
        reward = torch.where(last, signals.outcome[traj].double(), 0.0)
    else:
        assert signals.turn_reward is not None
        reward = signals.turn_reward[acting].double()
    returns = suffix_sum(reward, traj, place, index.N, options.gamma)
    keys = [key for key, act in zip(signals.state_key, acting.tolist(), strict=True) if act]
    anchor = anchor_groups(index.group_of_traj[traj], keys, options.similarity)
    size = int(anchor.max()) + 1 if len(anchor) else 0
    own = options.omega * _against(returns, anchor, size, options)
    episode = episode_term(index, signals.outcome, options)
    step = torch.zeros(index.M, dtype=torch.float64).masked_scatter(acting, own)
    company = count(anchor, size)[anchor] > 1
    metrics = {
        "anchored": float(company.double().mean()) if len(anchor) else 0.0,
        "return_mean": float(returns.mean()) if len(returns) else 0.0,
        "step_share": step_share(own, episode[traj]),
    }
    return broadcast(index, episode, step, metrics)


def needs(options: GiGPOOptions) -> frozenset[Need]:
    """State keys, and the environment's rewards unless the outcome stands for them."""
    return frozenset({"state_keys"} if options.terminal_outcome else {"state_keys", "turn_rewards"})


# States may come back within one episode: a group of one has a step term.
GIGPO = CreditMethod("gigpo", GiGPOOptions, gigpo, needs=needs, group_relative=False)
