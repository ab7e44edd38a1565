"""Methods that reward tokens or segments: REINFORCE++, PPO, PRIME, PRPO, Dr. GRPO.

The specification's worked numbers, and beside each method a scalar oracle: loops and Python floats, slow and plain.
"""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from helpers import per_turn, trajectory, turn

from agentrl.batch import build_batch
from agentrl.batch.index import suffix_sum
from agentrl.credit import Signals, load_credit
from agentrl.credit.segments import entropy_segments, turn_segments
from agentrl.errors import ConfigError, NonFiniteError, UserError

BATCHES = 200
BOTH = pytest.mark.parametrize("layout", [list, per_turn], ids=["packed", "per-turn"])


def run(name, options, signals):
    method, checked = load_credit(name, options)
    return method(signals, checked)


def episodes_of(lengths, outcomes, groups):
    """Episodes from the numbers of action tokens of their turns."""
    return [
        trajectory(
            f"t{i}", str(group), outcome, [turn([1], [2] * n, new_row=place == 0) for place, n in enumerate(turns)]
        )
        for i, (turns, outcome, group) in enumerate(zip(lengths, outcomes, groups, strict=True))
    ]


def signals_of(made, **fields):
    """Signals of episodes; flat lists become float64 tensors."""
    tensors = {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in fields.items()}
    outcome = torch.tensor([t.outcome for t in made], dtype=torch.float64)
    return Signals(build_batch(made).index, outcome, names=[t.id for t in made], **tensors)


def flat(rows):
    return [value for row in rows for value in row]


def close(ours, theirs, tolerance=1e-5):
    theirs = torch.tensor(theirs, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(ours).double(), theirs, atol=tolerance, rtol=0)


# --- the worked numbers ---


def masked(rows, mask):
    """The entries of padded rows that are action tokens."""
    return [x for row, keep in zip(rows, mask, strict=True) for x, k in zip(row, keep, strict=True) if k]


TURNS = [[2, 2], [4], [2, 1]]  # of `mask` in the sections reinforce_pp and gae: a turn ends where the mask has a hole
LAST_REWARDS = [0, 1, 0, 0.5, 2]  # of the turns; every token reward there lies on a turn's last token


@BOTH
@pytest.mark.parametrize("gamma", [1, 0.9])
def test_reinforce_pp_golden(golden, layout, gamma):
    section = golden["reinforce_pp"]
    mask = section["inputs"]["mask"]
    made = layout(episodes_of(TURNS, [1, 0, 2.5], "aab"))
    signals = signals_of(made, turn_reward=LAST_REWARDS)
    ours = run("reinforce_pp", {"gamma": gamma, "turn_rewards": True}, signals)
    close(ours.token, masked(section["outputs"][f"advantages_gamma{gamma}"], mask))


@BOTH
@pytest.mark.parametrize("singleton", ["zero", "raw"])
def test_reinforce_pp_baseline_golden(golden, layout, singleton):
    section = golden["reinforce_pp"]
    signals = signals_of(layout(episodes_of(TURNS, [1, 0, 2.5], section["inputs"]["index"])))
    expected = section["outputs"][f"baseline_variant_singleton_{singleton}"]
    close(
        run("reinforce_pp_baseline", {"singleton": singleton}, signals).token,
        masked(expected, section["inputs"]["mask"]),
    )


@BOTH
@pytest.mark.parametrize(("key", "options"), [("1_lam1", {"lam": 1.0}), (".99_lam.95", {"gamma": 0.99})])
def test_gae_golden(golden, layout, key, options):
    section = golden["gae"]
    mask, outputs = section["inputs"]["mask"], section["outputs"]
    made = layout(episodes_of(TURNS, [1, 0, 2.5], "aab"))
    signals = signals_of(made, turn_reward=LAST_REWARDS, value=masked(section["inputs"]["values"], mask))
    raw = run("ppo", {"whiten": False, "turn_rewards": True, **options}, signals)
    close(raw.token, masked(outputs[f"raw_adv_gamma{key}_times_mask"], mask))
    close(raw.value_target, masked(outputs[f"returns_gamma{key}_times_mask"], mask))
    if key == "1_lam1":
        whitened = run("ppo", {"turn_rewards": True, **options}, signals)
        close(whitened.token, masked(outputs["whitened_gamma1_lam1_times_mask"], mask))
        assert torch.equal(whitened.value_target, raw.value_target)


@BOTH
def test_prime_golden(golden, layout):
    inputs, outputs = golden["prime"]["inputs"], golden["prime"]["outputs"]
    made = layout(episodes_of([[2, 1], [1, 1], [1, 3]], inputs["outcome"], "aaa"))
    signals = signals_of(made, token_reward=flat(outputs["token_rewards"]))
    paper, recipe = run("prime", {}, signals), run("prime", {"form": "recipe"}, signals)
    close(paper.token, flat(outputs["advantage_paper_eq5"]))
    close(paper.token - paper.episode[signals.index.turn_of_token], flat(outputs["process_return_paper"]))
    close(paper.episode, [outputs["outcome_loo"][i] for i in (0, 0, 1, 1, 2, 2)])
    whitened = outputs["recipe_advantages_whitened_times_mask"]
    lengths = [len(row) for row in outputs["token_rewards"]]
    close(recipe.token, flat(row[:n] for row, n in zip(whitened, lengths, strict=True)))


def test_prime_recipe_returns_golden(golden):
    from agentrl.credit.prime import centred_rewards

    inputs, outputs = golden["prime"]["inputs"], golden["prime"]["outputs"]
    signals = signals_of(episodes_of([[3], [2], [4]], inputs["outcome"], "aaa"))
    index, loo = signals.index, torch.tensor(outputs["outcome_loo"], dtype=torch.float64)
    reward = torch.tensor(flat(outputs["token_rewards"]), dtype=torch.float64)
    centred = centred_rewards(index, reward, "recipe")
    returns = 5 * (suffix_sum(centred, index.traj_of_token, index.token_rank, index.N) + loo[index.traj_of_token])
    close(returns, flat(row[:n] for row, n in zip(outputs["recipe_returns"], [3, 2, 4], strict=True)))


def test_prime_batch_norm_golden(golden):
    from agentrl.credit.prime import batch_normed

    section = golden["prime"]
    index = signals_of(episodes_of([[3], [2], [4]], [1, 0, 1], "aaa")).index
    ratio = torch.tensor(flat(section["inputs"]["log_ratio_tokens"]), dtype=torch.float64)
    expected = section["outputs"]["batch_norm_scaled_log_ratio"]
    close(batch_normed(index, ratio), flat(row[:n] for row, n in zip(expected, [3, 2, 4], strict=True)))


@BOTH
def test_prpo_average_baseline_golden(golden, layout):
    inputs = golden["prpo"]["inputs"]
    lengths = [[1 + j for j in range(len(row))] for row in inputs["segment_prm_scores"]]
    made = layout(episodes_of(lengths, inputs["outcome"], "aaaa"))
    signals = signals_of(made, turn_score=flat(inputs["segment_prm_scores"]))
    ours = run("prpo", {"scores": "served", "combine": "average"}, signals)
    expected = torch.tensor(golden["prpo"]["outputs"]["prm_avg_baseline"])
    close(ours.token, expected[signals.index.traj_of_token].tolist())


def borders(entropy, **options):
    """[begin, end) of the segments of one turn."""
    index = signals_of(episodes_of([[len(entropy)]], [1], "a")).index
    lengths = entropy_segments(index, torch.tensor(entropy), **options).of_token.bincount().tolist()
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [[end - n, end] for end, n in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize("placement", ["positional", "nms"])
def test_prpo_segments_golden(golden, placement):
    section = golden["prpo"]
    inputs = section["inputs"]
    ours = borders(inputs["token_entropy"], spikes=inputs["top_k"], min_gap=inputs["min_gap"], placement=placement)
    assert ours == section["outputs"][f"segments_{placement}"]
    example = section["srpocode_segmentation_observed"]["peaks_example"]
    entropy = [example["peaks"].get(str(k), example["background"]) for k in range(example["length"])]
    ours = borders(entropy, spikes=example["top_k"], min_gap=example["min_gap"], placement=placement)
    assert ours == example[f"segments_{placement}"]


@BOTH
@pytest.mark.parametrize("scores", ["environment", "served", "prm"])
@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("adv_sd12_outcome_std", {}),
        ("adv_sd24_outcome_std", {"sigma0": math.sqrt(1 / 24)}),
        ("adv_code_sd24_outcome_centred", {"sigma0": math.sqrt(1 / 24), "scale": False}),
        ("adv_empirical_segment_pool_outcome_centred", {"prior": "empirical", "scale": False}),
    ],
)
def test_prpo_golden(golden, layout, scores, key, options):
    inputs, expected = golden["prpo"]["inputs"], golden["prpo"]["outputs"][key]
    score = flat(inputs["segment_prm_scores"])
    lengths = [[1 + (i + j) % 3 for j in range(len(row))] for i, row in enumerate(inputs["segment_prm_scores"])]
    signals = signals_of(layout(episodes_of(lengths, inputs["outcome"], "aaaa")), turn_score=score, turn_reward=score)
    index, tokens = signals.index, flat(lengths)
    logit = [math.log(p / (1 - p)) * 0.5 / n for p, n in zip(score, tokens, strict=True) for _ in range(n)]
    signals = dataclasses.replace(signals, token_reward=torch.tensor(logit, dtype=torch.float64))
    squash = {"temperature": 0.5} if scores == "prm" else {}
    ours = run("prpo", {"scores": scores, **squash, **options}, signals)
    whole = expected["advantage"] if isinstance(expected, dict) else expected
    close(ours.token, [a for a, n in zip(flat(whole), tokens, strict=True) for _ in range(n)])
    if isinstance(expected, dict):
        close(ours.step, flat(expected["z"]))
        close(ours.episode, [expected["shift"][i] for i in index.traj_of_turn.tolist()])


# --- scalar oracles ---


@dataclasses.dataclass
class Episode:
    """One trajectory of plain lists; `turns` are lists of global token numbers."""

    group: int
    outcome: float
    turns: list[list[int]]
    numbers: list[int]
    """Global turn numbers, parallel to `turns`."""

    @property
    def tokens(self):
        return [k for t in self.turns for k in t]


def ragged(seed):
    """A random ragged batch: groups of 1 to 4, some of equal outcomes, silent turns, silent trajectories."""
    draw = random.Random(seed)
    lengths, outcomes, groups = [], [], []
    for group in range(draw.randint(1, 4)):
        equal = draw.random() < 0.2
        for _ in range(draw.randint(1, 4)):
            lengths.append([draw.choice([0, 1, 2, 3, 9]) for _ in range(draw.randint(0, 5))])
            outcomes.append(0.3 if equal else draw.choice([0.0, 1.0, 0.5, -0.25]))
            groups.append(group)
    made = episodes_of(lengths, outcomes, groups)
    K, M = sum(map(sum, lengths)), sum(map(len, lengths))
    lists = {
        "policy_logprob": [draw.gauss(-1, 1) for _ in range(K)],
        "reference_logprob": [draw.gauss(-1, 1) for _ in range(K)],
        "token_reward": [draw.gauss(0, 0.5) for _ in range(K)],
        "entropy": [draw.choice([0.0, 0.2, draw.expovariate(1)]) for _ in range(K)],
        "value": [draw.gauss(0.3, 0.3) for _ in range(K)],
        "turn_reward": [draw.random() for _ in range(M)],
        "turn_score": [draw.random() for _ in range(M)],
    }
    plain, token, number = [], 0, 0
    for turns, outcome, group in zip(lengths, outcomes, groups, strict=True):
        rows = []
        for n in turns:
            rows.append(list(range(token, token + n)))
            token += n
        plain.append(Episode(group, outcome, rows, list(range(number, number + len(turns)))))
        number += len(turns)
    return signals_of(made, **lists), plain, lists


def mean(values):
    return sum(values) / len(values)


def std(values):
    m = mean(values)
    return math.sqrt(sum((x - m) ** 2 for x in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def whitened(values):
    if len(values) < 2:
        return [0.0] * len(values)
    m, s = mean(values), std(values)
    return [(x - m) / math.sqrt(s * s + 1e-8) for x in values]


def members(batch, e):
    """The trajectories of e's group that acted."""
    return [o for o in batch if o.group == e.group and o.tokens]


def z_outcome(batch, e):
    outcomes = [o.outcome for o in members(batch, e)]
    return (e.outcome - mean(outcomes)) / (std(outcomes) + 1e-6)


def per_token(batch, values_of):
    """Flat list of `values_of(episode)` (one value per action token) over all episodes."""
    return [x for e in batch if e.tokens for x in values_of(e)]


def rewards_oracle(e, s, turn_rewards, kl_coef):
    out = {k: -kl_coef * (s["policy_logprob"][k] - s["reference_logprob"][k]) for k in e.tokens}
    if turn_rewards:
        for number, tokens in zip(e.numbers, e.turns, strict=True):
            if tokens:
                out[tokens[-1]] += s["turn_reward"][number]
    else:
        out[e.tokens[-1]] += e.outcome
    return [out[k] for k in e.tokens]


def to_go(values, gamma):
    out, carry = [], 0.0
    for v in reversed(values):
        carry = v + gamma * carry
        out.append(carry)
    return out[::-1]


def reinforce_pp_oracle(batch, s, gamma=1.0, turn_rewards=False, kl_coef=0.0):
    return whitened(per_token(batch, lambda e: to_go(rewards_oracle(e, s, turn_rewards, kl_coef), gamma)))


def reinforce_pp_baseline_oracle(batch, s):
    def centred(e):
        return [e.outcome - mean([o.outcome for o in members(batch, e)])] * len(e.tokens)

    return whitened(per_token(batch, centred))


def dr_grpo_oracle(batch, s):
    def centred(e):
        return [e.outcome - mean([o.outcome for o in members(batch, e)])] * len(e.tokens)

    return per_token(batch, centred)


def gae_oracle(rewards, values, gamma, lam):
    out, advantage, following = [], 0.0, 0.0
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        advantage = r + gamma * following - v + gamma * lam * advantage
        following = v
        out.append(advantage)
    return out[::-1]


def ppo_oracle(batch, s, gamma=1.0, lam=0.95, level="token", whiten=True, turn_rewards=False, kl_coef=0.0):
    def one(e):
        rewards = dict(zip(e.tokens, rewards_oracle(e, s, turn_rewards, kl_coef), strict=True))
        steps = [[k] for k in e.tokens] if level == "token" else [t for t in e.turns if t]
        values = [s["value"][step[0]] for step in steps]
        found = gae_oracle([sum(rewards[k] for k in step) for step in steps], values, gamma, lam)
        return [(a, a + v) for step, a, v in zip(steps, found, values, strict=True) for _ in step]

    pairs = per_token(batch, one)
    advantage = [a for a, _ in pairs]
    return whitened(advantage) if whiten else advantage, [target for _, target in pairs]


def prime_oracle(batch, s, form="paper", gamma=1.0, batch_norm=False, process_weight=None, outcome_weight=None):
    usual = 1.0 if form == "paper" else 5.0
    process_weight = usual if process_weight is None else process_weight
    outcome_weight = usual if outcome_weight is None else outcome_weight
    r = s["token_reward"]
    if batch_norm:
        sums = per_token(batch, lambda e: to_go([r[k] for k in e.tokens], 1.0))
        largest = max((abs(x) for x in sums), default=0.0)
        r = [x / (largest + 1e-6) for x in r]

    def one(e):
        others = [o for o in members(batch, e) if o is not e]
        if not others:
            return [0.0] * len(e.tokens)
        loo = outcome_weight * (e.outcome - mean([o.outcome for o in others]))
        theirs = mean([mean([r[k] for k in o.tokens]) for o in others])
        own = mean([r[k] for k in e.tokens])
        centred = [r[k] - theirs for k in e.tokens]
        if form == "paper":
            return [process_weight * x + loo for x in to_go(centred, gamma)]
        rewards = [process_weight * (c + (r[k] - own) / len(others)) for c, k in zip(centred, e.tokens, strict=True)]
        rewards[-1] += loo
        return to_go(rewards, gamma)

    found = per_token(batch, one)
    return whitened(found) if form == "recipe" else found


def cut_oracle(e, entropy, spikes, min_gap, threshold, placement):
    """Segments (lists of tokens) of one trajectory."""
    tokens = e.tokens
    begins = {t[0] for t in e.turns if t}
    ends = {t[-1] + 1 for t in e.turns if t}
    highest = sorted((k for k in tokens if entropy[k] > threshold), key=lambda k: (-entropy[k], k))
    taken = []
    if placement == "positional":
        for k in sorted(highest[:spikes]):
            if all(k - cut >= min_gap for cut in [*begins, *taken] if cut <= k):
                taken.append(k)
    else:
        for k in highest:
            if len(taken) < spikes and all(abs(k - cut) >= min_gap for cut in [*begins, *ends, *taken]):
                taken.append(k)
    segments = []
    for k in tokens:
        if k in begins or k in taken:
            segments.append([])
        segments[-1].append(k)
    return segments


def prpo_oracle(
    batch,
    s,
    segmenter="turn",
    spikes=5,
    min_gap=10,
    placement="positional",
    threshold=0.0,
    sigma0=1 / 12**0.5,
    prior="uniform",
    scale=True,
    scores="prm",
    temperature=1.0,
):
    def scored(e):
        """(tokens, score) of each segment."""
        if scores != "prm":
            given = s["turn_reward" if scores == "environment" else "turn_score"]
            return [(tokens, given[number]) for number, tokens in zip(e.numbers, e.turns, strict=True) if tokens]
        cuts = [t for t in e.turns if t]
        if segmenter == "entropy":
            cuts = cut_oracle(e, s["entropy"], spikes, min_gap, threshold, placement)
        reward = [sum(s["token_reward"][k] for k in cut) for cut in cuts]
        return [(cut, 1 / (1 + math.exp(-r / temperature))) for cut, r in zip(cuts, reward, strict=True)]

    def one(e):
        outcomes = [o.outcome for o in members(batch, e)]
        shift = z_outcome(batch, e) if scale else e.outcome - mean(outcomes)
        pool = [p for o in members(batch, e) for _, p in scored(o)]
        at, spread = (0.5, sigma0) if prior == "uniform" else (mean(pool), std(pool) + 1e-6)
        return [(p - at) / spread + shift for tokens, p in scored(e) for _ in tokens]

    return per_token(batch, one)


CASES = [
    ("dr_grpo", dr_grpo_oracle, {}),
    ("reinforce_pp", reinforce_pp_oracle, {}),
    ("reinforce_pp", reinforce_pp_oracle, {"gamma": 0.9, "kl_coef": 0.1}),
    ("reinforce_pp", reinforce_pp_oracle, {"gamma": 0.5, "turn_rewards": True}),
    ("reinforce_pp_baseline", reinforce_pp_baseline_oracle, {}),
    ("ppo", ppo_oracle, {}),
    ("ppo", ppo_oracle, {"gamma": 0.9, "lam": 0.8, "whiten": False, "kl_coef": 0.2}),
    ("ppo", ppo_oracle, {"level": "turn", "gamma": 0.9, "lam": 0.7, "whiten": False, "turn_rewards": True}),
    ("ppo", ppo_oracle, {"level": "turn", "lam": 0.0, "kl_coef": 0.1}),
    ("prime", prime_oracle, {}),
    ("prime", prime_oracle, {"gamma": 0.9, "batch_norm": True, "process_weight": 3.0, "outcome_weight": 0.5}),
    ("prime", prime_oracle, {"form": "recipe"}),
    ("prime", prime_oracle, {"form": "recipe", "gamma": 0.8, "batch_norm": True, "process_weight": 2.0}),
    ("prpo", prpo_oracle, {}),
    ("prpo", prpo_oracle, {"scores": "environment", "scale": False, "sigma0": 0.2}),
    ("prpo", prpo_oracle, {"scores": "served", "prior": "empirical"}),
    ("prpo", prpo_oracle, {"segmenter": "entropy", "spikes": 3, "min_gap": 2, "temperature": 0.3}),
    ("prpo", prpo_oracle, {"segmenter": "entropy", "spikes": 2, "min_gap": 3, "threshold": 0.3, "placement": "nms"}),
    ("prpo", prpo_oracle, {"segmenter": "entropy", "spikes": 40, "min_gap": 1, "placement": "nms"}),
]
NAMES = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, _, options in CASES]


@pytest.mark.parametrize(("name", "oracle", "options"), CASES, ids=NAMES)
def test_a_scalar_oracle_agrees_on_ragged_batches(name, oracle, options):
    for seed in range(BATCHES):
        signals, plain, lists = ragged(seed)
        ours, theirs = run(name, options, signals), oracle(plain, lists, **options)
        if name == "ppo":
            theirs, target = theirs
            assert agree(ours.value_target, target), f"targets of seed {seed}"
        assert agree(ours.token, theirs), f"seed {seed}"


def agree(ours, theirs):
    return ours.tolist() == pytest.approx(theirs, rel=2e-5, abs=2e-5)


def test_the_ragged_batches_hold_every_edge_case():
    """Otherwise the oracles would agree about less than they seem to."""
    seen = set()
    for seed in range(BATCHES):
        _, plain, _ = ragged(seed)
        for e in plain:
            group = [o.outcome for o in members(plain, e)]
            seen |= {"silent trajectory"} if not e.tokens else set()
            seen |= {"silent turn"} if e.tokens and not all(e.turns) else set()
            seen |= {"group of one"} if len(group) == 1 else set()
            seen |= {"no variance"} if len(group) > 1 and len(set(group)) == 1 else set()
    assert seen == {"silent trajectory", "silent turn", "group of one", "no variance"}


# --- properties ---

ALL = [(name, options) for name, _, options in CASES]
RELATIVE = [(name, options) for name, options in ALL if name not in ("reinforce_pp", "ppo")]


@pytest.mark.parametrize(("name", "options"), ALL, ids=NAMES)
def test_the_two_terms_sum_to_the_turns_mean_advantage(name, options):
    signals, _, _ = ragged(3)
    index, advantage = signals.index, run(name, options, signals)
    total = torch.zeros(index.M).index_add_(0, index.turn_of_token, advantage.token)
    acting = index.tokens_per_turn > 0
    whole = (advantage.episode + advantage.step)[acting]
    torch.testing.assert_close(
        whole, (total / index.tokens_per_turn.clamp(min=1)).float()[acting], atol=1e-5, rtol=1e-5
    )
    assert torch.all(advantage.step[~acting] == 0)


@pytest.mark.parametrize(("name", "options"), ALL, ids=NAMES)
def test_junk_on_turns_without_tokens_changes_nothing(name, options):
    signals, _, _ = ragged(5)
    silent = signals.index.tokens_per_turn == 0
    assert silent.any()
    junk = dataclasses.replace(
        signals,
        turn_reward=torch.where(silent, -99.0, signals.turn_reward),
        turn_score=torch.where(silent, 99.0, signals.turn_score),
        outcome=torch.where(signals.index.tokens_per_traj == 0, 99.0, signals.outcome),
    )
    assert torch.equal(run(name, options, junk).token, run(name, options, signals).token)


@pytest.mark.parametrize(("name", "options"), ALL, ids=NAMES)
def test_shuffled_rows_with_their_times_give_the_shuffled_advantages(name, options):
    signals, _, _ = ragged(7)
    index, generator = signals.index, torch.Generator().manual_seed(1)
    turns, tokens = (torch.randperm(n, generator=generator) for n in (index.M, index.K))
    mixed = dataclasses.replace(
        index,
        turn_of_token=torch.argsort(turns)[index.turn_of_token[tokens]],
        traj_of_turn=index.traj_of_turn[turns],
        token_time=tokens,
        turn_time=turns,
    )
    fields = ("policy_logprob", "reference_logprob", "token_reward", "entropy", "value")
    moved = {field: getattr(signals, field)[tokens] for field in fields}
    moved |= {field: getattr(signals, field)[turns] for field in ("turn_reward", "turn_score")}
    ours = run(name, options, dataclasses.replace(signals, index=mixed, **moved))
    theirs = run(name, options, signals)
    torch.testing.assert_close(ours.token, theirs.token[tokens], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.step, theirs.step[turns], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("name", "options"), RELATIVE)
@pytest.mark.parametrize("shift", [-3.7, 50.0])
def test_a_constant_shift_of_the_outcomes_changes_nothing(name, options, shift):
    for seed in range(20):
        signals, _, _ = ragged(seed)
        shifted = dataclasses.replace(signals, outcome=signals.outcome + shift)
        ours, theirs = run(name, options, shifted).token, run(name, options, signals).token
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "options"), RELATIVE)
@pytest.mark.parametrize(("outcomes", "groups"), [([0.1] * 3, "aaa"), ([1e6 + 0.1] * 3, "aaa"), ([1.0, 2, 3], "abc")])
def test_groups_of_one_and_groups_of_equal_outcomes_have_exactly_no_outcome_term(name, options, outcomes, groups):
    made = episodes_of([[2, 1], [3], [1, 1, 2]], outcomes, groups)
    K, M = 10, 6
    signals = signals_of(made, token_reward=[0.1 * k for k in range(K)], entropy=[1.0] * K, turn_reward=[0.5] * M)
    signals = dataclasses.replace(signals, turn_score=signals.turn_reward)
    assert torch.all(run(name, options, signals).episode == 0)


@pytest.mark.parametrize("form", ["paper", "recipe"])
def test_prime_gives_a_group_of_one_nothing(form):
    made = episodes_of([[2], [1, 3], [2]], [1, 0, 1], "aab")
    signals = signals_of(made, token_reward=[0.5, -1, 2, 0.1, 0.2, -0.4, 7, 9])
    louder = dataclasses.replace(
        signals, token_reward=signals.token_reward.clone().index_fill_(0, torch.tensor([7]), 99)
    )
    assert torch.equal(run("prime", {"form": form}, louder).token, run("prime", {"form": form}, signals).token)
    if form == "paper":
        assert torch.all(run("prime", {}, signals).token[-2:] == 0)


def test_dr_grpo_is_grpo_without_the_standard_deviation():
    signals, _, _ = ragged(11)
    assert torch.equal(run("dr_grpo", {}, signals).token, run("grpo", {"scale": False}, signals).token)


def test_reinforce_pp_without_discount_gives_equal_outcomes_exactly_nothing():
    signals = signals_of(episodes_of([[2, 9], [1], [700]], [1e6 + 0.1] * 3, "aab"))
    assert torch.all(run("reinforce_pp", {}, signals).token == 0)


def test_a_perfect_critic_leaves_ppo_no_advantage():
    made = episodes_of([[2, 1], [3]], [1, -0.5], "aa")
    signals = signals_of(made, value=[1.0, 1, 1, -0.5, -0.5, -0.5])
    for level in ("token", "turn"):
        advantage = run("ppo", {"level": level}, signals)
        assert torch.all(advantage.token == 0)
        close(advantage.value_target, [1, 1, 1, -0.5, -0.5, -0.5])


def test_turn_level_gae_is_token_level_gae_where_every_turn_is_one_token():
    made = episodes_of([[1, 1, 1], [1, 1]], [1, 0], "aa")
    signals = signals_of(made, value=[0.1, 0.5, 0.2, 0.9, 0.4])
    options = {"gamma": 0.9, "lam": 0.8}
    token, by_turn = run("ppo", options, signals), run("ppo", {"level": "turn", **options}, signals)
    assert torch.equal(token.token, by_turn.token)
    assert torch.equal(token.value_target, by_turn.value_target)


def test_only_a_turns_first_value_counts_at_turn_level():
    made = episodes_of([[2, 3]], [1], "a")
    signals = signals_of(made, value=[0.3, 0, 0.6, 0, 0])
    junk = dataclasses.replace(signals, value=torch.tensor([0.3, 9, 0.6, 9, 9]))
    ours, theirs = (run("ppo", {"level": "turn", "lam": 1.0, "whiten": False}, s) for s in (junk, signals))
    torch.testing.assert_close(ours.token, theirs.token)
    close(theirs.token, [0.7, 0.7, 0.4, 0.4, 0.4])


def test_a_segment_never_spans_two_turns_and_spikes_keep_their_distance_from_turn_borders():
    index = signals_of(episodes_of([[6, 0, 6], [3]], [1, 0], "aa")).index
    entropy = torch.tensor([0.1, 0.1, 0.1, 3, 0.1, 0.1, 0.1, 2, 0.1, 0.1, 1, 0.1, 0, 0, 0])
    segments = entropy_segments(index, entropy, spikes=3, min_gap=2, placement="positional")
    assert segments.of_token.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 4, 4]
    assert segments.traj.tolist() == [0, 0, 0, 0, 1]
    one_cut = entropy_segments(index, entropy, spikes=1, min_gap=2, placement="positional")
    assert one_cut.of_token.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3]
    wide = entropy_segments(index, entropy, spikes=5, min_gap=20, placement="nms")
    assert torch.equal(wide.of_token, turn_segments(index).of_token)


def test_a_threshold_keeps_background_from_becoming_a_cut():
    entropy = [0.1] * 10 + [3.0] + [0.1] * 19
    assert len(borders(entropy, spikes=3, min_gap=5, placement="nms")) == 4
    assert borders(entropy, spikes=3, min_gap=5, placement="nms", threshold=0.2) == [[0, 10], [10, 30]]


def test_a_certain_policy_is_never_cut():
    for placement in ("positional", "nms"):
        assert borders([0.0] * 50, spikes=5, min_gap=3, placement=placement) == [[0, 50]]


@pytest.mark.parametrize(("name", "options"), ALL, ids=NAMES)
def test_batches_without_action_tokens_have_no_advantage(name, options):
    empty = {f: [] for f in ("policy_logprob", "reference_logprob", "token_reward", "entropy", "value")}
    for made, M in (([], 0), (episodes_of([[]], [1], "a"), 0), (episodes_of([[0, 0]], [1], "a"), 2)):
        signals = signals_of(made, **empty, turn_reward=[0.0] * M, turn_score=[0.0] * M)
        advantage = run(name, options, signals)
        assert advantage.token.shape == (0,)
        assert torch.all(advantage.step == 0)
        assert all(math.isfinite(value) for value in advantage.metrics.values())


# --- bad input ---


@pytest.mark.parametrize("value", [-0.25, 1.5])
@pytest.mark.parametrize(("scores", "field"), [("environment", "turn_reward"), ("served", "turn_score")])
def test_a_score_outside_0_to_1_is_refused_by_turn_and_value(scores, field, value):
    signals = signals_of(episodes_of([[1, 1], [2, 1]], [1, 0], "aa"), **{field: [0.5, 1.0, 0.0, value]})
    with pytest.raises(UserError, match=rf"trajectory t1, turn 1: {field} is {value}.*\[0, 1\].*rescale.*scores=prm"):
        run("prpo", {"scores": scores}, signals)


@pytest.mark.parametrize("scores", ["environment", "served"])
def test_turn_scores_cannot_score_entropy_segments(scores):
    with pytest.raises(ConfigError, match=rf"credit.options.scores='{scores}'.*segmenter=turn"):
        load_credit("prpo", {"segmenter": "entropy", "scores": scores})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ppo", {"gamma": 1.1}),
        ("ppo", {"lam": -0.1}),
        ("ppo", {"level": "word"}),
        ("reinforce_pp", {"kl_coef": -1}),
        ("prime", {"form": "papers"}),
        ("prpo", {"sigma0": 0}),
        ("prpo", {"min_gap": 0}),
        ("prpo", {"temperature": 0}),
    ],
)
def test_impossible_options_are_refused_by_name_and_value(name, options):
    (key, value), *_ = options.items()
    with pytest.raises(ConfigError, match=f"credit.options.{key}={value!r}"):
        load_credit(name, options)


@pytest.mark.parametrize(
    ("name", "options", "needs"),
    [
        ("dr_grpo", {}, set()),
        ("reinforce_pp", {}, set()),
        ("reinforce_pp", {"turn_rewards": True, "kl_coef": 0.1}, {"turn_rewards", "reference"}),
        ("reinforce_pp_baseline", {}, set()),
        ("ppo", {}, {"values"}),
        ("ppo", {"turn_rewards": True, "kl_coef": 0.1}, {"values", "turn_rewards", "reference"}),
        ("prime", {}, {"prm"}),
        ("prpo", {}, {"prm"}),
        ("prpo", {"scores": "environment"}, {"turn_rewards"}),
        ("prpo", {"scores": "served"}, {"turn_scores"}),
        ("prpo", {"segmenter": "entropy"}, {"prm", "entropy"}),
    ],
)
def test_needs_follow_the_options_and_a_missing_one_is_named(name, options, needs):
    method, checked = load_credit(name, options)
    assert method.needs_of(checked) == needs
    bare = signals_of(episodes_of([[1]], [1], "a"), policy_logprob=[-1.0])
    if needs:
        with pytest.raises(UserError, match=f"{name!r} needs {sorted(needs)[0]!r}"):
            method(bare, checked)
    else:
        assert method(bare, checked).token.shape == (1,)


def test_a_kl_penalty_asks_for_the_policys_log_probs():
    signals = signals_of(episodes_of([[1]], [1], "a"), reference_logprob=[-1.0])
    with pytest.raises(UserError, match=r"give Signals\.policy_logprob"):
        run("reinforce_pp", {"kl_coef": 0.1}, signals)


def test_a_value_that_is_not_finite_is_refused_by_turn():
    signals = signals_of(episodes_of([[1], [2, 1]], [1, 0], "aa"), value=[0.0, 0, 0, math.nan])
    with pytest.raises(NonFiniteError, match="trajectory t1, turn 1: value is nan"):
        run("ppo", {}, signals)
