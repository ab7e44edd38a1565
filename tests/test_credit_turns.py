"""Credit by turn: OPRL's ablations, ground truth, SPRO and GiGPO against worked numbers, plain loops and theory."""

from __future__ import annotations

import dataclasses
import itertools
from difflib import SequenceMatcher
from statistics import NormalDist, fmean, pstdev, stdev

import numpy as np
import pytest
import torch
from helpers import assign, episodes, per_turn, rearranged, signals_of, trajectory, turn
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.batch import Index, build_batch
from agentrl.credit import Signals, load_credit
from agentrl.credit.gigpo import anchor_groups
from agentrl.credit.oprl import step_rewards
from agentrl.errors import ConfigError

SEEDS = st.integers(0, 10**6)
some = settings(max_examples=40, deadline=None)
layouts = pytest.mark.parametrize("layout", [list, per_turn], ids=["packed", "per-turn"])


def close(ours, theirs):
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(ours).double(), theirs, atol=1e-5, rtol=0)


# --- worked numbers ---


def oprl_signals(section, layout):
    """The specification's six trajectories in two groups; token rewards are beta times the log-ratio."""
    inputs = section["inputs"]
    made, ratio = [], []
    for name, entry in inputs["trajectories"].items():
        steps = [turn([9], range(len(t["logp_old"])), new_row=not i) for i, t in enumerate(entry["turns"])]
        made.append(trajectory(name, entry["group"], entry["outcome"], steps))
        ratio += [p - o for t in entry["turns"] for p, o in zip(t["logp_prm"], t["logp_old"], strict=True)]
    reward = inputs["beta"] * torch.tensor(ratio, dtype=torch.float64)
    return signals_of(layout(made), reward)


@layouts
def test_oprl_token_level_ablation(golden, layout):
    signals = oprl_signals(golden["oprl"], layout)
    expected = golden["oprl"]["outputs"]["ablation_token_level_step_adv_ddof1"]
    advantage = assign("oprl", {"granularity": "token"}, signals)
    close(advantage.token - advantage.episode[signals.index.turn_of_token], list(itertools.chain(*expected)))
    close(advantage.step, [fmean(turn) for turn in expected])


@layouts
def test_oprl_merged_ablation(golden, layout):
    signals = oprl_signals(golden["oprl"], layout)
    expected = torch.tensor(golden["oprl"]["outputs"]["ablation_merged_adv_grpo_ddof1"])
    advantage = assign("oprl", {"combine": "merged"}, signals)
    close(advantage.token, expected[signals.index.traj_of_token])
    assert torch.all(advantage.step == 0)


RELEASED = {"step_unit": "largest_return", "step_pool": "first_turns"}


@layouts
def test_oprl_as_released_with_rloo(golden, layout):
    """Also its merged rewards: as RLOO is linear, R + r through RLOO is the sum of both terms (algorithms.md 1.6)."""
    signals, expected = oprl_signals(golden["oprl"], layout), golden["oprl"]["outputs"]
    advantage = assign("oprl", {"episode": "rloo", "step_norm": "loo_step", **RELEASED}, signals)
    close(advantage.step, expected["code_A_S_rloo_first_row_baseline"])
    turns = advantage.episode + advantage.step
    close(turns, expected["code_A_rloo"])
    close(turns, expected["ablation_merged_adv_code"])


@layouts
def test_oprl_as_released_with_grpo(golden, layout):
    signals, expected = oprl_signals(golden["oprl"], layout), golden["oprl"]["outputs"]
    advantage = assign("oprl", RELEASED, signals)
    close(advantage.episode + advantage.step, expected["code_A_grpo_mean_std_first_row"])


@layouts
def test_oprl_step_unit_of_the_released_code(golden, layout):
    signals = oprl_signals(golden["oprl"], layout)
    options = load_credit("oprl", {"step_unit": "largest_return"})[1]
    close(step_rewards(signals, options), golden["oprl"]["outputs"]["code_rm_scores_batch_norm"])


@pytest.mark.parametrize(
    "options",
    [
        {"step_pool": "first_turns", "step_norm": "rank"},
        {"step_pool": "first_turns", "granularity": "token"},
        {"step_unit": "largest_return", "granularity": "token"},
    ],
)
def test_oprl_refuses_released_forms_that_have_no_meaning(options):
    with pytest.raises(ConfigError):
        load_credit("oprl", options)


def spro_signals(ratio, outcome, made):
    index = build_batch(made).index
    zero = torch.zeros(index.K, dtype=torch.float64)
    return Signals(index, outcome, policy_logprob=zero + ratio, reference_logprob=zero)


@layouts
@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("beta1", {"beta": 1.0, "align": "token"}),
        ("beta0.05", {"beta": 0.05, "align": "token"}),
        ("turn_level_beta1", {"beta": 1.0}),
    ],
)
def test_spro(golden, layout, key, options):
    inputs, expected = golden["spro"]["inputs"], golden["spro"]["outputs"][key]
    made = []
    for i, (ratios, ends) in enumerate(zip(inputs["log_ratio_tokens"], inputs["turn_end_token_index"], strict=True)):
        lengths = np.diff([-1, *ends])
        steps = [turn([9], range(length), new_row=not t) for t, length in enumerate(lengths)]
        assert sum(lengths) == len(ratios)
        made.append(trajectory(str(i), "g", inputs["outcome"][i], steps))
    ratio = torch.tensor(list(itertools.chain(*inputs["log_ratio_tokens"])), dtype=torch.float64)
    signals = spro_signals(ratio, torch.tensor(inputs["outcome"]), layout(made))
    advantage = assign("spro", options, signals)
    if "advantage_turn" in expected:
        close(advantage.episode + advantage.step, list(itertools.chain(*expected["advantage_turn"])))
        close(advantage.step, list(itertools.chain(*expected["msa_turn"])))
    else:
        close(advantage.token, list(itertools.chain(*expected["advantage"])))


@layouts
def test_spro_aligns_action_tokens_and_not_columns(golden, layout):
    """Rows with observation tokens between the actions, whose junk ratio of 7 nats no one may read."""
    packed, inputs = golden["spro"]["packed"], golden["spro"]["inputs"]
    made = []
    for i, turn_id in enumerate(packed["turn_id"]):
        ids, start, steps = list(range(100, 100 + len(turn_id))), 0, []
        for t in range(max(turn_id) + 1):
            first, length = turn_id.index(t), turn_id.count(t)
            steps.append(turn([0] * (not t) + ids[start:first], ids[first : first + length], new_row=not t))
            start = first + length
        made.append(trajectory(str(i), "g", inputs["outcome"][i], [*steps, turn(ids[start:], [])]))
    rows = build_batch(made)
    ratio = torch.empty(rows.index.K, dtype=torch.float64)
    for i, cells in enumerate(rows.tokens_of_row):
        for column, (token,) in cells:
            ratio[token] = packed["log_ratio"][i][column - 1]  # each row starts with one id of its own
    signals = spro_signals(ratio, torch.tensor(inputs["outcome"]), layout(made))
    token = assign("spro", {"beta": 1.0, "align": "token"}, signals).token
    for i, cells in enumerate(rows.tokens_of_row):
        row = torch.zeros(len(packed["turn_id"][i]))
        for column, (k,) in cells:
            row[column - 1] = token[k]
        wanted = iter(golden["spro"]["outputs"]["beta1"]["advantage"][i])
        close(row, [next(wanted) if t >= 0 else 0.0 for t in packed["turn_id"][i]])


@layouts
@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("mean_norm_per_trajectory", {}),
        ("mean_std_norm_per_trajectory", {"scale": True}),
        ("mean_norm_cross_steps", {"episode_per_turn": True}),
        ("mean_std_norm_cross_steps", {"scale": True, "episode_per_turn": True}),
    ],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_gigpo(golden, layout, key, options, terminal):
    """The example rewards only the end, so that the outcome as last reward says the same."""
    inputs, expected = golden["gigpo"]["inputs"], golden["gigpo"]["outputs"][key]
    entries = inputs["trajectories"]
    made = [
        trajectory(name, "g", sum(e["rewards"]), [turn([9], [1], new_row=not t) for t in range(len(e["states"]))])
        for name, e in entries.items()
    ]
    signals = signals_of(
        layout(made),
        turn_reward=None if terminal else torch.tensor([r for e in entries.values() for r in e["rewards"]]),
        state_key=[s for e in entries.values() for s in e["states"]],
    )
    options = {**options, "gamma": inputs["gamma"], "omega": inputs["omega"], "terminal_outcome": terminal}
    advantage = assign("gigpo", options, signals)
    close(advantage.episode, expected["A_E"])
    close(advantage.step, expected["A_S"])
    close(advantage.token, expected["A"])


# --- scalar oracles: plain loops over Python floats ---


def ragged(seed):
    """Signals of a tiny random batch: groups and episodes of one, empty turns and episodes, rows in any order."""
    random = np.random.default_rng(seed)
    group_of_traj = np.repeat(np.arange(g := random.integers(1, 4)), random.integers(1, 5, g))
    traj_of_turn = np.repeat(np.arange(len(group_of_traj)), random.integers(0, 5, len(group_of_traj)))
    turn_of_token = np.repeat(np.arange(len(traj_of_turn)), random.integers(0, 4, len(traj_of_turn)))
    index = Index(*map(torch.from_numpy, (turn_of_token, traj_of_turn, group_of_traj)))

    def normal(size, scale=1.0):
        return torch.from_numpy(random.normal(0, scale, size))

    signals = Signals(
        index,
        torch.from_numpy(random.choice([0.0, 0.5, 1.0], index.N)),
        token_reward=normal(index.K, random.choice([0.05, 1e-9])),
        policy_logprob=-normal(index.K).abs(),
        reference_logprob=-normal(index.K).abs(),
        turn_reward=normal(index.M).round(decimals=1),
        state_key=random.choice(["box left", "box left.", "a wall", "door open", "door opens"], index.M).tolist(),
    )
    turns, tokens = (torch.from_numpy(random.permutation(size)) for size in (index.M, index.K))
    mixed = Index(torch.argsort(turns)[index.turn_of_token[tokens]], index.traj_of_turn[turns], index.group_of_traj)
    mixed = dataclasses.replace(mixed, token_time=tokens, turn_time=turns)
    return rearranged(signals, mixed, torch.arange(index.N), turns, tokens) if seed % 2 else signals


def tree(signals):
    """{group: {trajectory: [(turn, [tokens])]}} in the order of time; what has no action tokens is left out."""
    index = signals.index
    turn_time = range(index.M) if index.turn_time is None else index.turn_time.tolist()
    token_time = range(index.K) if index.token_time is None else index.token_time.tolist()
    tokens = {t: [] for t in sorted(range(index.M), key=lambda t: turn_time[t])}
    for k in sorted(range(index.K), key=lambda k: token_time[k]):
        tokens[int(index.turn_of_token[k])].append(k)
    out = {}
    for t, mine in tokens.items():
        if mine:
            traj = int(index.traj_of_turn[t])
            out.setdefault(int(index.group_of_traj[traj]), {}).setdefault(traj, []).append((t, mine))
    return out


def standard(x, xs, ddof=1, scale=True):
    if len(xs) < 2:
        return 0.0
    return (x - fmean(xs)) / ((stdev(xs) if ddof else pstdev(xs)) + 1e-6 if scale else 1.0)


def outcome_of(signals, i):
    return float(signals.outcome[i])


def tokens_of(signals, per_token):
    """(K,) from {token: advantage}."""
    return torch.tensor([per_token[k] for k in range(signals.index.K)], dtype=torch.float64)


def oracle_oprl(signals, *, environment=False, by_token=False, merged=False, norm="zscore", batch=False, alpha=1.0):
    out, pools, totals = {}, {}, {}
    for g, trajs in tree(signals).items():
        for i, turns in trajs.items():
            for t, tokens in turns:
                rewards = [float(signals.token_reward[k]) for k in tokens]
                units = [[k] for k in tokens] if by_token else [tokens]
                values = rewards if by_token else [float(signals.turn_reward[t]) if environment else sum(rewards)]
                for unit, value in zip(units, values, strict=True):
                    pools.setdefault(0 if batch else g, []).append((i, unit, value))
                totals[i] = totals.get(i, 0.0) + sum(values)
    for trajs in tree(signals).values():
        apart = len(trajs) > 1 and stdev(totals[i] for i in trajs) > 1e-6
        added = {i: alpha * totals[i] if merged and apart else 0.0 for i in trajs}
        returns = [outcome_of(signals, i) + added[i] for i in trajs]
        for i, turns in trajs.items():
            for k in itertools.chain(*(tokens for _, tokens in turns)):
                out[k] = standard(outcome_of(signals, i) + added[i], returns)
    for pool in [] if merged else pools.values():
        values = [value for *_, value in pool]
        if len(values) < 2 or stdev(values) <= 1e-6:
            continue
        for i, unit, value in pool:
            step = oracle_norm(norm, value, values, [v for j, _, v in pool if j != i])
            for k in unit:
                out[k] += alpha * step
    return tokens_of(signals, out)


def oracle_norm(norm, x, values, of_others):
    if norm == "zscore":
        return standard(x, values)
    if norm == "scale":
        return x / fmean(v * v for v in values) ** 0.5
    if norm == "centre":
        return x - fmean(values)
    if norm == "loo_step":
        return x - (sum(values) - x) / (len(values) - 1)
    if norm == "loo_trajectory":
        return x - fmean(of_others) if of_others else 0.0
    below, equal = sum(v < x for v in values), sum(v == x for v in values)
    return NormalDist().inv_cdf((below + equal / 2) / len(values))


def oracle_spro(signals, *, beta, by_token=False, clip=float("inf"), ddof=1):
    out = {}
    for trajs in tree(signals).values():
        walks = {}
        for i, turns in trajs.items():
            total, walks[i] = 0.0, []
            for _, tokens in turns:
                for k in tokens:
                    total += beta * float(signals.policy_logprob[k] - signals.reference_logprob[k])
                    if by_token:
                        walks[i].append(([k], total))
                if not by_token:
                    walks[i].append((tokens, total))
        outcomes = [outcome_of(signals, i) for i in trajs]
        for i, walk in walks.items():
            for place, (unit, total) in enumerate(walk):
                msa = total - fmean(other[place][1] for other in walks.values() if len(other) > place)
                for k in unit:
                    out[k] = standard(outcome_of(signals, i), outcomes, ddof) + max(-clip, min(clip, msa))
    return tokens_of(signals, out)


def oracle_gigpo(signals, *, gamma=0.95, omega=1.0, scale=False, similarity=None, terminal=False, per_turn=False):
    out = {}
    for trajs in tree(signals).values():
        anchors, heads = {}, []
        for key in sorted({signals.state_key[t] for turns in trajs.values() for t, _ in turns}):
            alike = [h for h in heads if similarity and SequenceMatcher(None, key, h, False).ratio() >= similarity]
            heads += [] if alike else [key]
            anchors[key] = alike[0] if alike else key
        returns, pool = {}, {}
        for i, turns in trajs.items():
            rewards = [float(signals.turn_reward[t]) for t, _ in turns]
            if terminal:
                rewards = [0.0] * (len(turns) - 1) + [outcome_of(signals, i)]
            for place, (t, _) in enumerate(turns):
                returns[t] = sum(gamma ** (k - place) * rewards[k] for k in range(place, len(turns)))
                pool.setdefault(anchors[signals.state_key[t]], []).append(returns[t])
        outcomes = [outcome_of(signals, i) for i, turns in trajs.items() for _ in (turns if per_turn else [None])]
        for i, turns in trajs.items():
            for t, tokens in turns:
                step = standard(returns[t], pool[anchors[signals.state_key[t]]], scale=scale)
                for k in tokens:
                    out[k] = standard(outcome_of(signals, i), outcomes, scale=scale) + omega * step
    return tokens_of(signals, out)


ORACLES = [
    ("oprl", {}, oracle_oprl, {}),
    ("oprl", {"rewards": "environment", "alpha": 0.5}, oracle_oprl, {"environment": True, "alpha": 0.5}),
    ("ground_truth", {}, oracle_oprl, {"environment": True}),
    ("oprl", {"granularity": "token"}, oracle_oprl, {"by_token": True}),
    (
        "oprl",
        {"granularity": "token", "step_pool": "batch", "step_norm": "rank"},
        oracle_oprl,
        {"by_token": True, "batch": True, "norm": "rank"},
    ),
    ("oprl", {"combine": "merged", "alpha": 2.0}, oracle_oprl, {"merged": True, "alpha": 2.0}),
    (
        "oprl",
        {"combine": "merged", "rewards": "environment"},
        oracle_oprl,
        {"merged": True, "environment": True},
    ),
    *(
        ("oprl", {"step_norm": norm}, oracle_oprl, {"norm": norm})
        for norm in ("scale", "centre", "loo_step", "loo_trajectory", "rank")
    ),
    ("spro", {"beta": 0.05}, oracle_spro, {"beta": 0.05}),
    ("spro", {"beta": 2.0, "align": "token"}, oracle_spro, {"beta": 2.0, "by_token": True}),
    ("spro", {"beta": 2.0, "clip": 0.5, "ddof": 0}, oracle_spro, {"beta": 2.0, "clip": 0.5, "ddof": 0}),
    ("gigpo", {}, oracle_gigpo, {}),
    ("gigpo", {"scale": True, "gamma": 1.0, "omega": 0.8}, oracle_gigpo, {"scale": True, "gamma": 1.0, "omega": 0.8}),
    ("gigpo", {"similarity": 0.9, "gamma": 0.5}, oracle_gigpo, {"similarity": 0.9, "gamma": 0.5}),
    (
        "gigpo",
        {"terminal_outcome": True, "episode_per_turn": True, "scale": True},
        oracle_gigpo,
        {"terminal": True, "per_turn": True, "scale": True},
    ),
]


@pytest.mark.parametrize(
    ("name", "options", "oracle", "said"), ORACLES, ids=[f"{name}{i}" for i, (name, *_) in enumerate(ORACLES)]
)
def test_plain_loops_agree_on_200_ragged_batches(name, options, oracle, said):
    for seed in range(200):
        signals = ragged(seed)
        ours, theirs = assign(name, options, signals).token.double(), oracle(signals, **said)
        # The largest advantage is about 1e4: that a spread of 1e-6 passes the floor does not make float32 finer.
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-6), f"seed {seed}"


# --- OPRL's ablations ---


def test_ground_truth_is_oprl_on_the_rewards_of_the_environment():
    signals = dataclasses.replace(signals_of(episodes(3)), token_reward=None)
    ours, theirs = assign("ground_truth", {}, signals), assign("oprl", {"rewards": "environment"}, signals)
    assert torch.equal(ours.token, theirs.token)
    longest = assign("ground_truth", {"per_token": True, "step_norm": "centre"}, signals).step
    reward = signals.turn_reward / signals.index.tokens_per_turn
    for group in range(3):
        mine = signals.index.group_of_turn == group
        close(longest[mine], reward[mine] - reward[mine].mean())


@pytest.mark.parametrize("noise", [0.0, 1e-9])
@pytest.mark.parametrize("options", [{"granularity": "token"}, {"combine": "merged"}])
@pytest.mark.parametrize("episode", ["grpo", "rloo"])
def test_where_prm_and_policy_are_equal_the_ablations_are_their_episode_estimator(noise, options, episode):
    made = episodes(15)
    signals = signals_of(made, noise * signals_of(made).token_reward)
    assert torch.equal(
        assign("oprl", {**options, "episode": episode}, signals).token, assign(episode, {}, signals).token
    )


def test_merged_rewards_obey_the_weight_of_the_step_rewards():
    signals = signals_of(episodes(4))
    merged = {"combine": "merged"}
    grpo = assign("grpo", {}, signals).token
    assert torch.equal(assign("oprl", {**merged, "alpha": 0}, signals).token, grpo)
    assert torch.equal(assign("oprl", {**merged, "warmup_updates": 1}, signals).token, grpo)
    assert not torch.allclose(assign("oprl", merged, signals).token, grpo, atol=0.01)
    equal = dataclasses.replace(signals, outcome=torch.zeros(signals.index.N))
    assert torch.all(assign("oprl", {**merged, "uniform_groups": False}, equal).token == 0)
    assert assign("oprl", merged, equal).token.abs().max() > 0.5


def test_merging_loses_what_tells_the_turns_of_an_episode_apart():
    signals = signals_of(episodes(5))
    advantage, traj = assign("oprl", {"combine": "merged"}, signals).token, signals.index.traj_of_token
    for i in range(signals.index.N):
        assert len(set(advantage[traj == i].tolist())) == 1


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("oprl", {"rewards": "environment", "skill_gate": True}, "skill_gate"),
        ("oprl", {"rewards": "environment", "warmup_updates": 5}, "warmup_updates"),
        ("oprl", {"rewards": "environment", "granularity": "token"}, "granularity"),
        ("oprl", {"granularity": "token", "per_token": True}, "per_token"),
        ("oprl", {"combine": "merged", "granularity": "token"}, "granularity"),
        ("oprl", {"combine": "merged", "step_norm": "rank"}, "step_norm"),
        ("oprl", {"combine": "merged", "step_pool": "batch"}, "step_pool"),
        ("oprl", {"combine": "merged", "clip": 3.0}, "clip"),
        ("ground_truth", {"skill_gate": True}, "skill_gate"),
        ("ground_truth", {"rewards": "prm"}, "rewards"),
        ("spro", {}, "credit.options.beta: start at 0.05"),
        ("spro", {"beta": 0}, "credit.options.beta=0"),
        ("gigpo", {"gamma": 1.5}, "credit.options.gamma=1.5"),
        ("gigpo", {"similarity": 2}, "credit.options.similarity=2"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(name, options, named):
    with pytest.raises(ConfigError, match=named):
        load_credit(name, options)


@pytest.mark.parametrize(
    ("name", "options", "needs"),
    [
        ("oprl", {}, {"prm"}),
        ("oprl", {"rewards": "environment"}, {"turn_rewards"}),
        ("ground_truth", {}, {"turn_rewards"}),
        ("spro", {"beta": 1}, {"reference"}),
        ("gigpo", {}, {"state_keys", "turn_rewards"}),
        ("gigpo", {"terminal_outcome": True}, {"state_keys"}),
    ],
)
def test_needs_follow_the_options(name, options, needs):
    method, checked = load_credit(name, options)
    assert method.needs_of(checked) == needs


# --- SPRO ---


@pytest.mark.parametrize("align", ["turn", "token"])
@some
@given(seed=SEEDS, beta=st.floats(0.01, 10))
def test_spro_with_policy_equal_to_reference_is_grpo(align, seed, beta):
    signals = ragged(seed)
    signals = dataclasses.replace(signals, reference_logprob=signals.policy_logprob)
    assert torch.equal(assign("spro", {"beta": beta, "align": align}, signals).token, assign("grpo", {}, signals).token)


@some
@given(seed=SEEDS)
def test_msa_sums_to_zero_over_the_survivors_of_each_position(seed):
    signals = ragged(seed)
    by_turn = assign("spro", {"beta": 1.0}, signals)
    by_token = assign("spro", {"beta": 1.0, "align": "token"}, signals)
    msa = by_token.token - by_token.episode[signals.index.turn_of_token]
    for trajs in tree(signals).values():
        turns = [[by_turn.step[t] for t, _ in mine] for mine in trajs.values()]
        tokens = [[msa[k] for _, unit in mine for k in unit] for mine in trajs.values()]
        for survivors in (*itertools.zip_longest(*turns), *itertools.zip_longest(*tokens)):
            alive = [float(value) for value in survivors if value is not None]
            assert sum(alive) == pytest.approx(0, abs=1e-5)
            assert len(alive) > 1 or alive == [0.0] or abs(alive[0]) < 1e-6


@some
@given(seed=SEEDS)
def test_turns_of_one_token_are_aligned_alike_both_ways(seed):
    made = episodes(seed, action=1)
    ours, theirs = (assign("spro", {"beta": 1.0, "align": align}, signals_of(made)) for align in ("turn", "token"))
    torch.testing.assert_close(ours.token, theirs.token, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.step, theirs.step, atol=1e-6, rtol=1e-6)


# --- GiGPO ---


def one_state(made):
    """Episodes all of whose turns acted in one state."""
    signals = signals_of(made)
    return dataclasses.replace(signals, state_key=["here"] * signals.index.M)


@pytest.mark.parametrize("scale", [False, True])
@some
@given(seed=SEEDS, omega=st.floats(0, 3))
def test_gigpo_with_one_state_and_no_discount_repeats_the_episode_term(scale, seed, omega):
    """With the outcome as the only reward every return is the outcome, and the anchor group is all turns: A^S is A^E
    with statistics over turns."""
    options = {"terminal_outcome": True, "gamma": 1.0, "scale": scale, "omega": omega, "episode_per_turn": True}
    advantage = assign("gigpo", options, one_state(episodes(seed)))
    torch.testing.assert_close(advantage.step, omega * advantage.episode, atol=1e-6, rtol=1e-6)


@some
@given(seed=SEEDS, length=st.integers(1, 4))
def test_in_episodes_of_equal_length_it_repeats_the_papers_episode_term(seed, length):
    """Turns then count as their trajectories do; ddof 0, as there are more of them."""
    made = episodes(seed, turns=1)
    signals = one_state([t.model_copy(update={"turns": t.turns * length}) for t in made])
    for scale in (False, True):
        options = {"terminal_outcome": True, "gamma": 1.0, "scale": scale, "ddof": 0}
        advantage = assign("gigpo", options, signals)
        torch.testing.assert_close(advantage.step, advantage.episode, atol=1e-6, rtol=1e-6)


def test_without_states_that_come_back_gigpo_is_its_episode_term():
    signals = signals_of(episodes(6))
    alone = dataclasses.replace(signals, state_key=[str(t) for t in range(signals.index.M)])
    for scale in (False, True):
        advantage = assign("gigpo", {"scale": scale}, alone)
        assert torch.equal(advantage.token, assign("grpo", {"scale": scale}, signals).token)
        assert advantage.metrics["anchored"] == 0


def test_equal_states_of_different_groups_are_not_compared():
    signals = one_state(episodes(7))
    apart = dataclasses.replace(signals, state_key=[f"task {g}" for g in signals.index.group_of_turn.tolist()])
    assert torch.equal(assign("gigpo", {}, signals).token, assign("gigpo", {}, apart).token)


def test_similar_states_share_an_anchor_group():
    keys = ["door open, lamp on", "door open, lamp off", "a wall", "door open, lamp on", "door open, lamp on"]
    group = torch.tensor([0, 0, 0, 0, 1])
    assert anchor_groups(group, keys).unique().numel() == 4
    assert anchor_groups(group, keys, 1.0).tolist() == anchor_groups(group, keys).tolist()
    alike = anchor_groups(group, keys, 0.9)
    assert alike[0] == alike[1] == alike[3]
    assert len({int(alike[i]) for i in (0, 2, 4)}) == 3
    assert anchor_groups(group, keys, 0.01)[:4].unique().numel() == 1


def test_long_boards_of_few_characters_are_similar_to_themselves():
    """With difflib's autojunk the ratio of two such keys would be 0."""
    board = "#####\n#...#\n#.$.#\n" * 20
    moved = board[:-3] + "$" + board[-2:]
    assert anchor_groups(torch.tensor([0, 0]), [board, moved], 0.95).unique().numel() == 1


# --- masked junk ---


@pytest.mark.parametrize(
    ("name", "options", "oracle", "said"), ORACLES, ids=[f"{n}{i}" for i, (n, *_) in enumerate(ORACLES)]
)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_signals_of_turns_without_action_tokens_change_nothing(name, options, oracle, said, seed):
    signals = ragged(seed)
    silent = signals.index.tokens_per_turn == 0
    absent = signals.index.tokens_per_traj == 0
    junk = dataclasses.replace(
        signals,
        outcome=torch.where(absent, 1e6, signals.outcome),
        turn_reward=torch.where(silent, 1e6, signals.turn_reward),
        state_key=["a wall" if out else key for out, key in zip(silent.tolist(), signals.state_key, strict=True)],
    )
    ours, theirs = assign(name, options, junk), assign(name, options, signals)
    assert torch.equal(ours.token, theirs.token)
    assert torch.equal(ours.step, theirs.step)
