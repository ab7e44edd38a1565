"""Preference pairs: the golden ones, the modes, and what holds for every batch."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.buffer import pair_counts, preference_pairs
from agentrl.config import PairConfig
from agentrl.types import StopReason, Trajectory, Turn

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "spec" / "golden.json"
MODES = ["all", "best_worst", "one_to_one", "margin"]


def member(
    group: str = "g",
    success: bool = False,
    outcome: float | None = None,
    turns: int = 1,
    tokens: int = 1,
    **fields: Any,
) -> Trajectory:
    turn = Turn(observation="o", action="a", action_ids=[7] * tokens, action_logprobs=[-1.0] * tokens)
    return Trajectory(
        id="t",
        group_id=group,
        env="E",
        seed=0,
        turns=[turn] * turns,
        success=success,
        outcome=float(success) if outcome is None else outcome,
        **fields,
    )


def found(trajectories: list[Trajectory], seed: int = 0, **config: Any) -> list[tuple[int, int]]:
    return [(p.winner, p.loser) for p in preference_pairs(trajectories, PairConfig(**config), seed=seed)]


@pytest.fixture(scope="module")
def golden() -> Any:
    if not GOLDEN.exists():
        pytest.skip("the shared specification is not here")
    return json.loads(GOLDEN.read_text())["oprl"]


def test_golden_pairs(golden: Any) -> None:
    given = golden["inputs"]["trajectories"]
    batch = [
        member(t["group"], t["outcome"] > 0, t["outcome"], turns=len(t["turns"]), tokens=2) for t in given.values()
    ]
    names = list(given)
    assert [[names[i], names[j]] for i, j in found(batch)] == golden["outputs"]["pairs"]


def test_golden_threshold_example(golden: Any) -> None:
    example = golden["pair_rule_threshold_example"]
    batch = [member(success=i in example["positives"], outcome=o) for i, o in enumerate(example["outcomes"])]
    assert [list(pair) for pair in found(batch)] == example["pairs"]


def test_pairs_never_cross_groups_and_need_both_kinds() -> None:
    batch = [member("a", True), member("b", False), member("c", True), member("c", True), member("d", False)]
    assert found(batch) == []
    assert found([*batch, member("b", True)]) == [(5, 1)]


def test_graded_pairs_any_two_that_differ() -> None:
    batch = [member(outcome=o) for o in (1.0, 3.0, 1.0)]
    assert found(batch) == []
    assert found(batch, graded=True) == [(1, 0), (1, 2)]


def test_margin_is_strict_and_keeps_the_rule() -> None:
    batch = [member(success=s, outcome=o) for s, o in [(True, 7.0), (False, 6.0), (False, 5.5)]]
    assert found(batch, mode="margin", margin=1.0) == [(0, 2)]
    assert found(batch, mode="margin", margin=0.4, graded=True) == [(0, 1), (0, 2), (1, 2)]
    assert found(batch, mode="margin", margin=0.5, graded=True) == [(0, 1), (0, 2)]


def test_best_worst_takes_the_widest_gap_that_length_allows() -> None:
    batch = [member(outcome=o, turns=t) for o, t in [(3.0, 1), (0.0, 9), (1.0, 2), (1.5, 8)]]
    assert found(batch, mode="best_worst", graded=True) == [(0, 1)]
    assert found(batch, mode="best_worst", graded=True, match_length=1) == [(0, 2)]


def test_ties_are_broken_by_the_seed_not_by_position() -> None:
    batch = [member(success=i < 4) for i in range(8)]
    drawn = Counter(found(batch, mode="best_worst", seed=seed)[0] for seed in range(400))
    assert len(drawn) == 16
    assert max(drawn.values()) < 60


def test_length_matching() -> None:
    batch = [member(success=True, turns=3), member(turns=3), member(turns=4), member(turns=5)]
    assert found(batch, match_length=0) == [(0, 1)]
    assert found(batch, match_length=1) == [(0, 1), (0, 2)]


def test_per_group_mean_weighs_every_group_the_same() -> None:
    batch = [member("a", i < 2) for i in range(5)] + [member("b", i < 1) for i in range(2)] + [member("c")]
    pairs = preference_pairs(batch, PairConfig(per_group_mean=True))
    total = dict.fromkeys("ab", 0.0)
    for pair in pairs:
        total[batch[pair.winner].group_id] += pair.weight
    assert total == pytest.approx({"a": 1.0, "b": 1.0})
    assert [pair.weight for pair in preference_pairs(batch)] == [1.0] * 7


@pytest.mark.parametrize("mode", MODES)
def test_unscorable_and_tokenless_episodes_enter_no_pair(mode: str) -> None:
    lost = [reason for reason in StopReason if not reason.scorable]
    batch = [member(success=True), *[member(stop_reason=reason) for reason in lost], member(tokens=0), member(turns=0)]
    assert found(batch, mode=mode) == []
    assert found([*batch, member()], mode=mode) == [(0, len(batch))]


def test_counts() -> None:
    batch = [
        *[member("mixed", True), member("mixed")],
        *[member("won", True), member("won", True)],
        *[member("lost"), member("lost")],
        *[member("one", True), member("one", stop_reason=StopReason.DEADLINE)],
        *[member("none", tokens=0)],
    ]
    assert pair_counts(batch) == {
        "groups": 5,
        "mixed": 1,
        "all_success": 1,
        "all_failure": 1,
        "singleton": 1,
        "empty": 1,
        "unscorable": 1,
        "no_action_tokens": 1,
    }
    assert set(pair_counts([]).values()) == {0}


batches = st.lists(
    st.builds(
        member,
        group=st.sampled_from("abc"),
        success=st.booleans(),
        outcome=st.sampled_from([0.0, 0.5, 1.0, 7.0, math.inf]),
        turns=st.integers(0, 4),
        tokens=st.integers(0, 2),
        stop_reason=st.sampled_from([StopReason.TERMINATED, StopReason.TURN_LIMIT, StopReason.POLICY_ERROR]),
    ),
    max_size=14,
)
rest = {
    "graded": st.booleans(),
    "match_length": st.none() | st.integers(0, 2),
    "per_group_mean": st.booleans(),
}
configs = st.builds(PairConfig, mode=st.sampled_from(MODES[:-1]), **rest) | st.builds(
    PairConfig, mode=st.just("margin"), margin=st.sampled_from([0.0, 0.5]), **rest
)


@given(batches, configs, st.integers(0, 5))
def test_every_pair_obeys_the_configuration(batch: list[Trajectory], config: PairConfig, seed: int) -> None:
    every = set(found(batch, graded=config.graded, match_length=config.match_length))
    pairs = preference_pairs(batch, config, seed=seed)
    chosen = [(p.winner, p.loser) for p in pairs]
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= every
    for i, j in chosen:
        winner, loser = batch[i], batch[j]
        assert winner.group_id == loser.group_id
        assert winner.outcome > loser.outcome if config.graded else winner.success and not loser.success
        assert config.match_length is None or abs(len(winner.turns) - len(loser.turns)) <= config.match_length
    groups = {batch[i].group_id for i, _ in chosen}
    if config.mode == "all":
        assert set(chosen) == every
    if config.mode == "best_worst":
        assert len(chosen) == len(groups) == len({batch[i].group_id for i, _ in every})
    if config.mode == "one_to_one":
        ends = [end for pair in chosen for end in pair]
        assert len(set(ends)) == len(ends)
        assert all(i in ends or j in ends for i, j in every)
    if config.per_group_mean:
        assert sum(p.weight for p in pairs) == pytest.approx(len(groups))
    assert preference_pairs(batch, config, seed=seed) == pairs


@given(batches, st.randoms(use_true_random=False))
def test_order_of_trajectories_does_not_matter(batch: list[Trajectory], random: Any) -> None:
    order = list(range(len(batch)))
    random.shuffle(order)
    for graded in (False, True):
        shuffled = found([batch[i] for i in order], graded=graded)
        assert sorted((order[i], order[j]) for i, j in shuffled) == sorted(found(batch, graded=graded))


@given(batches, st.sampled_from(["best_worst", "one_to_one"]))
def test_a_group_is_matched_the_same_whatever_other_groups_there_are(batch: list[Trajectory], mode: str) -> None:
    alone = [i for i, t in enumerate(batch) if t.group_id == "a"]
    pairs = [(alone[i], alone[j]) for i, j in found([batch[i] for i in alone], mode=mode)]
    assert pairs == [pair for pair in found(batch, mode=mode) if pair[0] in alone]
