"""Credit methods: what must hold whatever the numbers are. (The worked numbers are in test_golden.)"""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from helpers import TOKEN_FIELDS, TURN_FIELDS, episodes, per_turn, rearranged, signals_of, trajectory, turn
from helpers import assign as run
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.batch import Index
from agentrl.batch.index import segment_mean
from agentrl.credit import Advantage, CreditMethod, Options, Signals, credit_names, load_credit
from agentrl.credit.base import FIELD_OF
from agentrl.errors import ConfigError, NonFiniteError, UnknownNameError, UserError


@dataclasses.dataclass(frozen=True)
class Case:
    """A method with options, and which of the general properties it has."""

    name: str
    options: dict[str, Any]
    step: Literal["none", "turn", "token"] = "none"
    """What its step term is shared by: it has none, a turn, or it differs inside a turn."""
    shift: bool = True
    """A constant added to the outcomes of a group changes nothing."""
    equal: bool = True
    """Groups of equal outcomes, and groups of one, have exactly no episode term."""


METHODS = [
    Case("grpo", {}),
    Case("grpo", {"scale": False}),
    Case("rloo", {}),
    *(Case("oprl", {"step_norm": norm}, "turn") for norm in ("zscore", "centre", "loo_step", "loo_trajectory", "rank")),
    Case("oprl", {"episode": "rloo", "per_token": True, "clip": 1.0, "uniform_groups": False}, "turn"),
    Case("oprl", {"granularity": "token"}, "token"),
    Case("oprl", {"granularity": "token", "step_norm": "loo_trajectory", "step_pool": "batch"}, "token"),
    Case("oprl", {"combine": "merged", "alpha": 0.3}, equal=False),
    Case("ground_truth", {}, "turn"),
    Case("spro", {"beta": 0.05}, "turn"),
    Case("spro", {"beta": 1.0, "align": "token", "clip": 1.0}, "token"),
    Case("gigpo", {}, "turn"),
    Case("gigpo", {"scale": True, "episode_per_turn": True, "similarity": 0.8}, "turn"),
    Case("gigpo", {"terminal_outcome": True}, "turn", shift=False),
    Case("gigpo", {"terminal_outcome": True, "gamma": 1.0, "scale": True}, "turn"),
    Case("dr_grpo", {}),
    Case("reinforce_pp", {}, shift=False),
    Case("reinforce_pp", {"gamma": 0.9, "turn_rewards": True, "kl_coef": 0.1}, "token", equal=False),
    Case("reinforce_pp_baseline", {}),
    Case("ppo", {}, "token", shift=False),
    Case("ppo", {"level": "turn", "gamma": 0.9, "turn_rewards": True, "whiten": False}, "turn"),
    Case("prime", {}, "token"),
    Case("prime", {"form": "recipe", "gamma": 0.9, "batch_norm": True}, "token"),
    Case("prpo", {}, "turn"),
    Case("prpo", {"scores": "served", "prior": "empirical", "scale": False}, "turn"),
    Case("prpo", {"segmenter": "entropy", "spikes": 3, "min_gap": 2}, "token"),
    Case("prpo", {"segmenter": "entropy", "min_gap": 1, "placement": "nms", "threshold": 0.3}, "token"),
]
"""Every registered method is here at least once; the general properties below run over all."""


def over(cases):
    """Parametrises a test over some of the methods."""
    named = [pytest.param(c.name, c.options, c, id=f"{c.name}{METHODS.index(c)}") for c in cases]
    return pytest.mark.parametrize(("name", "options", "case"), named)


for_all = over(METHODS)
SEEDS = st.integers(0, 10**6)
few = settings(max_examples=8, deadline=None)


def load_method(name):
    """A registered method; its options are those of the first case."""
    return load_credit(name, next((case.options for case in METHODS if case.name == name), {}))[0]


def oprl(signals, **options):
    return run("oprl", options, signals)


def two_groups(outcomes=(1, 0, 1, 1), turns=(2, 3, 1, 2)):
    """Group a: the first two episodes; group b: the rest. One action token per turn."""
    return [
        trajectory(str(i), "a" if i < 2 else "b", outcome, [turn([1], [2], new_row=True)] * count)
        for i, (outcome, count) in enumerate(zip(outcomes, turns, strict=True))
    ]


def test_every_method_of_the_package_is_tested_here():
    ours = {name for name in credit_names() if load_method(name).function.__module__.startswith("agentrl.")}
    assert ours == {case.name for case in METHODS}


# --- permutation, shift, layout ---


@for_all
@few
@given(seed=SEEDS)
def test_permuting_trajectories_permutes_the_advantages(name, options, case, seed):
    made = episodes(seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(made)))
    straight, index = signals_of(made), signals_of([made[i] for i in order]).index
    turns, tokens = (
        torch.cat([(owner == i).nonzero()[:, 0] for i in order])
        for owner in (straight.index.traj_of_turn, straight.index.traj_of_token)
    )
    mixed = rearranged(straight, index, order, turns, tokens)
    ours, theirs = run(name, options, mixed).token, run(name, options, straight).token[tokens]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@for_all
@few
@given(seed=SEEDS)
def test_permuting_turns_and_tokens_permutes_the_advantages(name, options, case, seed):
    """No method may lean on the order of rows: the index vectors alone say who belongs to whom, and when."""
    signals = signals_of(episodes(seed))
    index = signals.index
    random = np.random.default_rng(seed)
    turns, tokens = (torch.from_numpy(random.permutation(size)) for size in (index.M, index.K))
    new_name = torch.argsort(turns)
    mixed = Index(new_name[index.turn_of_token[tokens]], index.traj_of_turn[turns], index.group_of_traj, tokens, turns)
    moved = rearranged(signals, mixed, torch.arange(index.N), turns, tokens)
    ours, theirs = run(name, options, moved), run(name, options, signals)
    torch.testing.assert_close(ours.token, theirs.token[tokens], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.step, theirs.step[turns], atol=1e-6, rtol=1e-6)


@over(case for case in METHODS if case.shift)
@few
@given(seed=SEEDS, shift=st.floats(-100, 100))
def test_adding_a_constant_to_a_groups_outcomes_changes_nothing(name, options, case, seed, shift):
    made = episodes(seed)
    shifted = [t.model_copy(update={"outcome": t.outcome + shift}) if t.group_id == "g1" else t for t in made]
    ours, theirs = run(name, options, signals_of(shifted)).token, run(name, options, signals_of(made)).token
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@for_all
def test_both_layouts_have_the_same_advantages(name, options, case):
    made = episodes(11)
    assert torch.equal(run(name, options, signals_of(made)).token, run(name, options, signals_of(per_turn(made))).token)


@for_all
def test_the_advantage_of_a_turn_is_shared_by_its_tokens_and_split_into_its_two_terms(name, options, case):
    signals = signals_of(episodes(12))
    index = signals.index
    advantage = run(name, options, signals)
    whole = advantage.episode + advantage.step
    torch.testing.assert_close(segment_mean(advantage.token, index.turn_of_token, index.M).float(), whole)
    shared = torch.allclose(advantage.token, whole[index.turn_of_token], atol=1e-6)
    assert shared == (case.step != "token")
    assert advantage.token.dtype == advantage.episode.dtype == advantage.step.dtype == torch.float32
    assert bool((advantage.step != 0).any()) == (case.step != "none")


# --- episodes and turns without action tokens, groups of one, groups without variance ---


@for_all
def test_turns_and_episodes_without_action_tokens_enter_no_statistic(name, options, case):
    """`signals_of` gives such turns large rewards and states of their own."""
    made = episodes(13)
    silent = turn([1, 2], [])
    filled = [t.model_copy(update={"turns": [silent, *t.turns, silent]}) for t in made]
    for place, group in ((0, "g0"), (5, "g2"), (9, "g7")):
        filled.insert(place, trajectory(f"silent {place}", group, 100.0, [silent] if place else []))
    signals = signals_of(filled)
    ours, theirs = run(name, options, signals), run(name, options, signals_of(made))
    torch.testing.assert_close(ours.token, theirs.token, atol=1e-6, rtol=1e-6)
    acting = signals.index.tokens_per_turn > 0
    torch.testing.assert_close(ours.step[acting], theirs.step, atol=1e-6, rtol=1e-6)
    assert torch.all(ours.step[~acting] == 0)


@for_all
def test_a_batch_without_a_single_action_token_has_no_advantage(name, options, case):
    for made in ([], [trajectory("a", "g", 1.0, [])], [trajectory("a", "g", 1.0, [turn([1], [])])]):
        assert run(name, options, signals_of(made)).token.shape == (0,)


@over(case for case in METHODS if case.equal)
def test_a_group_of_one_has_no_episode_advantage(name, options, case):
    made = [trajectory("a", "g", 3.0, [turn([1], [2, 3], new_row=True), turn([1], [2])])]
    advantage = run(name, options, signals_of(made))
    assert torch.all(advantage.episode == 0)
    if options.get("step_norm") == "loo_trajectory":
        assert torch.all(advantage.step == 0), "there is no other trajectory to compare with"


def test_a_pool_of_one_turn_has_no_step_advantage():
    made = [trajectory("a", "g", 3.0, [turn([1], [2, 3], new_row=True)])]
    for norm in ("zscore", "centre", "loo_step", "loo_trajectory", "rank"):
        assert torch.all(oprl(signals_of(made), step_norm=norm).token == 0)


@pytest.mark.parametrize("value", [0.0, 0.1, -0.7, 1 / 3, 1e6 + 0.1])
@over(case for case in METHODS if case.equal)
def test_a_group_of_equal_outcomes_has_exactly_no_episode_advantage(name, options, case, value):
    """0.1 + 0.1 + 0.1 is not 0.3 in floating point: the mean of equal numbers must still be that number."""
    made = [t.model_copy(update={"outcome": value}) for t in episodes(14, groups=1, size=7)]
    assert torch.all(run(name, options, signals_of(made)).episode == 0)
    assert torch.all(run("oprl", {"uniform_groups": False}, signals_of(made)).token == 0)


def test_in_a_group_of_equal_outcomes_the_prm_is_the_only_signal_unless_switched_off():
    signals = signals_of(two_groups())
    in_b = signals.index.group_of_turn == 1
    kept, dropped = oprl(signals), oprl(signals, uniform_groups=False)
    assert torch.all(kept.episode[in_b] == 0)
    assert torch.all(kept.step[in_b] != 0)
    assert torch.all(dropped.step[in_b] == 0)
    assert torch.equal(dropped.step[~in_b], kept.step[~in_b])


# --- the step term ---


@pytest.mark.parametrize("noise", [0.0, 1e-8])
@pytest.mark.parametrize("norm", ["zscore", "centre", "loo_step", "loo_trajectory", "rank"])
def test_where_prm_and_policy_are_equal_the_advantage_is_the_episodes(norm, noise):
    """The first iteration: log-ratios are float noise, and normalising would blow it up to order one."""
    made = episodes(15)
    signals = signals_of(made, noise * signals_of(made).token_reward)
    advantage = oprl(signals, step_norm=norm)
    assert torch.all(advantage.step == 0)
    assert torch.equal(advantage.token, run("grpo", {}, signals).token)


def test_the_std_floor_is_a_setting():
    signals = signals_of(two_groups(), torch.tensor([0.0, 1, 2, 3, 4, 0, 0.01, 0.02]))
    in_b = signals.index.group_of_turn == 1
    assert oprl(signals).step[in_b].abs().max() > 0.9
    step = oprl(signals, std_floor=0.05).step
    assert torch.all(step[in_b] == 0)
    assert torch.equal(step[~in_b], oprl(signals).step[~in_b])


@few
@given(seed=SEEDS, beta=st.floats(0.1, 100))
def test_beta_does_not_change_standardised_or_ranked_step_advantages(seed, beta):
    """Up to the 1e-6 that is added to the standard deviation."""
    signals = signals_of(episodes(seed))
    scaled = dataclasses.replace(signals, token_reward=beta * signals.token_reward.double())
    for norm in ("zscore", "rank"):
        torch.testing.assert_close(
            oprl(scaled, step_norm=norm).step, oprl(signals, step_norm=norm).step, atol=3e-4, rtol=3e-4
        )
    torch.testing.assert_close(
        oprl(scaled, step_norm="centre").step, beta * oprl(signals, step_norm="centre").step, atol=1e-5, rtol=1e-5
    )


def test_standardised_step_advantages_have_mean_zero_and_std_one_in_every_group():
    signals = signals_of(episodes(16, groups=5))
    step = oprl(signals).step.double()
    for group in range(5):
        pool = step[signals.index.group_of_turn == group]
        assert float(pool.mean()) == pytest.approx(0, abs=1e-6)
        assert float(pool.std()) == pytest.approx(1, abs=1e-6)


def test_a_turns_reward_is_the_sum_over_its_tokens_or_their_mean():
    made = [
        trajectory("a", "g", 1, [turn([1], [2, 3, 4], new_row=True), turn([1], [2])]),
        trajectory("b", "g", 0, [turn([1], [2, 3], new_row=True)]),
    ]
    signals = signals_of(made, torch.tensor([1.0, 2, 3, 5, -1, -2]))
    summed = torch.tensor([6.0, 5, -3])
    meaned = torch.tensor([2.0, 5, -1.5])
    torch.testing.assert_close(oprl(signals, step_norm="centre").step, summed - summed.mean())
    torch.testing.assert_close(oprl(signals, step_norm="centre", per_token=True).step, meaned - meaned.mean())


def test_clip_bounds_the_step_term_before_alpha_weighs_it():
    made = episodes(17, groups=1, size=8)
    reward = signals_of(made).token_reward
    reward[3] = 50.0
    signals = signals_of(made, reward)
    free, clipped = oprl(signals, alpha=0.5), oprl(signals, alpha=0.5, clip=1.5)
    assert float(free.step.max()) > 1
    assert torch.equal(clipped.step, free.step.clamp(-0.75, 0.75))


def test_ranks_are_normal_scores_with_ties_sharing_theirs():
    reward = torch.tensor([3.0, -1, 100, 3, 0.5])
    made = [trajectory(str(i), "g", i % 2, [turn([1], [2], new_row=True)]) for i in range(5)]
    step = oprl(signals_of(made, reward), step_norm="rank").step
    places = torch.tensor([3.0, 0.5, 4.5, 3.0, 1.5], dtype=torch.float64) / 5
    torch.testing.assert_close(step.double(), torch.special.ndtri(places), atol=1e-6, rtol=0)
    twisted = oprl(signals_of(made, reward.double().mul(0.1).exp()), step_norm="rank").step
    assert torch.equal(twisted, step)


def test_alpha_waits_for_the_warm_up_and_scales_with_skill():
    made = episodes(18)
    base = oprl(signals_of(made)).step

    def step(prm_updates=0, prm_skill=None, **options):
        advantage = oprl(signals_of(made, prm_updates=prm_updates, prm_skill=prm_skill), **options)
        assert torch.equal(advantage.episode, oprl(signals_of(made)).episode)
        return advantage.step

    assert torch.all(step(prm_updates=4, warmup_updates=5) == 0)
    assert torch.equal(step(prm_updates=5, warmup_updates=5), base)
    assert torch.equal(step(prm_skill=0.5, skill_gate=True), 0.5 * base)
    assert torch.equal(step(prm_skill=0.5), base)
    assert torch.all(step(prm_skill=None, skill_gate=True) == 0)
    assert torch.all(step(prm_skill=0.0, skill_gate=True) == 0)
    torch.testing.assert_close(step(prm_skill=0.5, skill_gate=True, alpha=3.0), 1.5 * base)


def test_alpha_zero_is_the_episode_estimator_alone():
    signals = signals_of(episodes(19))
    assert torch.equal(oprl(signals, alpha=0).token, run("grpo", {}, signals).token)
    assert torch.equal(oprl(signals, alpha=0, episode="rloo").token, run("rloo", {}, signals).token)


# --- options ---


def test_unknown_methods_and_options_are_refused_with_the_nearest_name():
    assert {"grpo", "rloo", "oprl"} <= set(credit_names())
    with pytest.raises(UnknownNameError, match="no credit method 'oprll'; did you mean 'oprl'"):
        load_credit("oprll", {})
    with pytest.raises(ConfigError, match=r"'alfa'.*did you mean 'alpha'"):
        load_credit("oprl", {"alfa": 1})
    with pytest.raises(ConfigError, match=r"credit.options.alpha=-1"):
        load_credit("oprl", {"alpha": -1})


def test_methods_say_what_they_need():
    for name, needs in (("oprl", {"prm"}), ("grpo", set()), ("rloo", set())):
        method, options = load_credit(name, {})
        assert method.needs_of(options) == needs


# --- bad input ---


@for_all
def test_a_missing_signal_is_refused_with_its_name(name, options, case):
    method, checked = load_credit(name, options)
    full = signals_of(episodes(20))
    for need in method.needs_of(checked):
        field = FIELD_OF[need]
        with pytest.raises(UserError, match=rf"{name}' needs '{need}': give Signals.{field}"):
            method(dataclasses.replace(full, **{field: None}), checked)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", [*TOKEN_FIELDS, *TURN_FIELDS, "outcome"])
def test_a_signal_that_is_not_finite_is_refused_with_its_trajectory_and_turn(field, bad):
    made = [
        trajectory("first", "g", 1, [turn([1], [2, 3], new_row=True)]),
        trajectory("second", "g", 0, [turn([1], [4], new_row=True), turn([1], []), turn([1], [5, 6])]),
    ]
    signals = signals_of(made)
    values = getattr(signals, field).clone()
    values[-1] = bad
    where = f"trajectory second: its outcome is {bad}" if field == "outcome" else f"second, turn 2: {field} is {bad}"
    with pytest.raises(NonFiniteError, match=where):
        run("grpo", {}, dataclasses.replace(signals, **{field: values}))


def test_turns_are_named_by_their_place_in_time():
    index = Index(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0]), turn_time=torch.tensor([5, 2]))
    bad = Signals(index, torch.tensor([1.0]), token_reward=torch.tensor([float("nan"), 0.0]))
    with pytest.raises(NonFiniteError, match="trajectory 0, turn 1: token_reward is nan"):
        run("grpo", {}, bad)


# --- cost ---


def test_the_benchmark_times_every_method(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    file = tmp_path / "credit.json"
    result = importlib.import_module("credit").main(
        ["--turns", "130", "--tokens", "1000", "--repeat", "1", "--json", str(file)]
    )
    assert json.loads(file.read_text()) == result
    assert {"grpo", "rloo", "oprl", "spro", "gigpo"} <= {row["method"] for row in result["methods"]}
    assert all(row["ms"] > 0 for row in result["methods"])
    assert result["settings"]["trajectories"] == 16
    assert result["settings"]["turns"] == pytest.approx(130, rel=0.3)
    assert result["settings"]["tokens"] == pytest.approx(1000, rel=0.3)
    printed = capsys.readouterr().out
    assert "oprl granularity=token" in printed
    assert "ms least" in printed


def test_a_need_that_does_not_exist_is_refused_with_the_nearest():
    method = CreditMethod("mine", Options, lambda signals, options: None, needs=frozenset({"state_key"}))
    with pytest.raises(UserError, match=r"credit method 'mine': no need 'state_key'; did you mean 'state_keys'"):
        method.needs_of(Options())


@pytest.mark.parametrize(("field", "shape"), [("token", "5"), ("episode", "3"), ("step", "3"), ("value_target", "5")])
def test_an_answer_of_the_wrong_shape_is_refused(field, shape):
    made = [trajectory("a", "g", 1.0, [turn([1], [2, 3], new_row=True), turn([1], [2, 3]), turn([1], [2])])]
    right = {"token": torch.zeros(5), "episode": torch.zeros(3), "step": torch.zeros(3), "value_target": torch.zeros(5)}

    def answer(signals, options):
        return Advantage(**right | {field: torch.zeros(4)})

    method = CreditMethod("mine", Options, answer, needs=frozenset({"values"}))
    with pytest.raises(UserError, match=rf"'mine': Advantage.{field} must have shape \({shape},\), not \(4,\)"):
        method(signals_of(made), Options())
