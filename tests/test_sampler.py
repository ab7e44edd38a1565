"""The transformers policy: what it samples, what it says about it, and what it keeps between turns."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch
import transformers as tf
from helpers import perturbed, trajectory, turn

from agentrl.batch import build_batch, score
from agentrl.errors import ModelError, PolicyFailure, UserError
from agentrl.models.attention import NAME
from agentrl.models.load import fingerprint, load_model
from agentrl.policy import PolicyRequest, Sampling
from agentrl.rollout.context import ContextBuilder
from policies.transformers import TransformersPolicy, sampler
from policies.transformers.cache import SlotPlan
from policies.transformers.sampler import Sampler, truncate, uniforms

GREEDY = Sampling(temperature=0, max_new_tokens=8)


@pytest.fixture
def policy(model_dir):
    return TransformersPolicy(str(model_dir))


def request(episode, context, turn=0, seed=0, sampling=GREEDY):
    return PolicyRequest(
        episode=str(episode),
        turn=turn,
        observation="",
        messages=(),
        context_ids=None if context is None else list(context),
        seed=seed,
        sampling=sampling,
    )


def act(policy, requests):
    return asyncio.run(policy.act(requests))


def random_contexts(seed, n, longest=30, vocab=300):
    random = np.random.default_rng(seed)
    return [random.integers(5, vocab, size=random.integers(1, longest + 1)).tolist() for _ in range(n)]


def requests_of(contexts, sampling=None, seed=1000, turn=0):
    sampling = sampling or Sampling(temperature=1.0, max_new_tokens=10)
    return [request(i, c, turn, seed + i, sampling) for i, c in enumerate(contexts)]


# --- greedy, against the library ---


def generated(model, contexts, limit, stop_ids, pad):
    """What `generate` answers to left-padded contexts: ids up to and including the first stop token."""
    longest = max(map(len, contexts))
    ids = torch.tensor([[pad] * (longest - len(c)) + c for c in contexts])
    mask = torch.tensor([[0] * (longest - len(c)) + [1] * len(c) for c in contexts])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, eos_token_id=sorted(stop_ids), pad_token_id=pad
    )[:, longest:].tolist()
    ends = [next((k + 1 for k, i in enumerate(row) if i in stop_ids), limit) for row in out]
    return [row[:end] for row, end in zip(out, ends, strict=True)]


def test_greedy_tokens_equal_generate_over_four_growing_turns_and_only_new_tokens_are_read(policy, model_dir):
    plain = load_model(model_dir, attn_implementation="sdpa")
    stop, pad, limit = policy.chat.stop_ids, policy.chat.pad_id, 12
    contexts = random_contexts(0, 32)
    expected_reads, ends = sum(map(len, contexts)), set()
    for step in range(4):
        answers = act(policy, requests_of(contexts, Sampling(temperature=0, max_new_tokens=limit), turn=step))
        assert [a.ids for a in answers] == generated(plain, contexts, limit, stop, pad)
        assert policy.sampler.prefilled_tokens == expected_reads
        ends |= {a.finish for a in answers}
        observations = random_contexts(step + 1, 32, longest=9)
        contexts = [c + a.ids + o for c, a, o in zip(contexts, answers, observations, strict=True)]
        # Beside the new observation, the last sampled id: it was never fed back.
        expected_reads += sum(len(o) + 1 for o in observations)
    assert ends == {"length", "stop"}, "the model is sharp enough to end some actions by itself"


def test_contexts_longer_than_the_first_cache_equal_generate(policy, model_dir):
    """The cache doubles while an action is being sampled."""
    plain = load_model(model_dir, attn_implementation="sdpa")
    contexts = [random_contexts(1, 1, vocab=300)[0] * 200, *random_contexts(2, 40)]
    contexts[0] = contexts[0][:250]
    first = policy.sampler.cache.length, policy.sampler.cache.slots
    answers = act(policy, requests_of(contexts, Sampling(temperature=0, max_new_tokens=12)))
    assert policy.sampler.cache.length > first[0]
    assert policy.sampler.cache.slots > first[1]
    assert [a.ids for a in answers] == generated(plain, contexts, 12, policy.chat.stop_ids, policy.chat.pad_id)


@pytest.mark.parametrize("budget", [1, 40])
def test_the_prefill_budget_changes_nothing(model_dir, budget):
    contexts = random_contexts(3, 12)
    whole = act(TransformersPolicy(str(model_dir)), requests_of(contexts))
    parts = act(TransformersPolicy(str(model_dir), prefill_budget=budget), requests_of(contexts))
    assert [a.ids for a in parts] == [a.ids for a in whole]


def test_a_long_context_of_several_episodes_is_read_once_and_they_go_on_apart(model_dir, monkeypatch):
    prompt, other = random_contexts(5, 2, longest=1)
    prompt, other = prompt * 40, other * 50
    contexts = [prompt, other, prompt, [3, 4], prompt, [3, 4]]
    sampling = Sampling(temperature=1.0, max_new_tokens=6)

    def played(policy):
        first = act(policy, requests_of(contexts, sampling))
        grown = [[*c, *a.ids, 9] for c, a in zip(contexts, first, strict=True)]
        return first, act(policy, requests_of(grown, sampling, seed=2000, turn=1))

    apart, together = (TransformersPolicy(str(model_dir)) for _ in range(2))
    monkeypatch.setattr(sampler, "WORTH_SHARING", 10**9)
    expected = played(apart)
    monkeypatch.setattr(sampler, "WORTH_SHARING", 30)
    found = played(together)
    for ours, plain in zip(found, expected, strict=True):
        assert [a.ids for a in ours] == [a.ids for a in plain]
        for a, b in zip(ours, plain, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert len({tuple(a.ids) for a, c in zip(found[0], contexts, strict=True) if c == prompt}) > 1
    assert apart.sampler.prefilled_tokens - together.sampler.prefilled_tokens == 2 * len(prompt)


# --- recorded log-probs ---


@pytest.mark.parametrize("window", [None, 0, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_recorded_while_sampling_equal_the_trainers(policy, pristine, window, temperature):
    sampling = Sampling(temperature=temperature, max_new_tokens=9)
    texts = ["#@ $.#", "up", "# *+ #\n######", "You push boxes.", "left right"]
    random = np.random.default_rng(0)
    members = range(24)
    builders = [ContextBuilder(policy.chat, "Answer with one word.", window) for _ in members]
    turns = [[] for _ in members]
    for step in range(4):
        playing = [i for i in members if step < 1 + i % 4]
        contexts = {i: builders[i].observe(str(random.choice(texts))) for i in playing}
        answers = act(policy, [request(i, contexts[i].ids, step, 100 * i + step, sampling) for i in playing])
        for i, answer in zip(playing, answers, strict=True):
            builders[i].act(answer.ids)
            turns[i].append(turn(contexts[i].prompt_ids, answer.ids, answer.logprobs, new_row=contexts[i].new_row))
    batch = build_batch([trajectory(str(i), "g", 0.0, turns[i]) for i in members])
    rows = {None: 24, 0: 60, 1: 42}
    assert len({tuple(row) for row in batch.rows}) == len(batch.rows) <= rows[window]
    again = score(pristine, batch, budget=200, temperature=temperature).logprob
    assert batch.index.K > 200
    assert (batch.behaviour - again).abs().max() < 1e-4


def test_greedy_actions_are_certain(policy):
    (answer,) = act(policy, [request("a", [5, 6, 7])])
    assert answer.logprobs == [0.0] * len(answer.ids)


# --- distributions ---

TOY = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
}
CONTEXT = [3, 1, 4]


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(1)
    model = tf.AutoModelForCausalLM.from_config(tf.Qwen3Config(**TOY), attn_implementation=NAME).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


def toy_logits(model, context=CONTEXT):
    with torch.no_grad():
        return model(input_ids=torch.tensor([context])).logits[0, -1].double()


def kept_distribution(logits, temperature, top_k, top_p):
    """Temperature, then the k likeliest, then of these the fewest that reach top_p; renormalised. One by one."""
    p = (logits / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])[: top_k or len(p)]
    total, kept, mass = sum(p[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        mass += p[i] / total
        if mass >= top_p:
            break
    out = torch.zeros(len(p), dtype=torch.float64)
    out[kept] = torch.tensor([p[i] for i in kept], dtype=torch.float64)
    return out / out.sum()


SETTINGS = [
    Sampling(temperature=1.0, max_new_tokens=1),
    Sampling(temperature=0.5, max_new_tokens=1),
    Sampling(temperature=2.0, top_k=5, max_new_tokens=1),
    Sampling(temperature=1.0, top_p=0.7, max_new_tokens=1),
    Sampling(temperature=1.5, top_p=0.6, top_k=6, max_new_tokens=1),
    Sampling(temperature=1.0, top_p=1e-6, max_new_tokens=1),
    Sampling(temperature=1.0, top_k=1, max_new_tokens=1),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda s: f"T={s.temperature},p={s.top_p},k={s.top_k}")
def test_tokens_are_drawn_from_the_truncated_distribution_and_carry_its_log_prob(toy, sampling):
    """Chi-square over 4,000 draws of one token (fixed seeds), all settings of the others present in the batch."""
    expected = kept_distribution(toy_logits(toy), sampling.temperature, sampling.top_k, sampling.top_p)
    sampler = Sampler(toy, frozenset())
    counts = torch.zeros(16, dtype=torch.float64)
    others = [request(f"other {i}", CONTEXT, seed=i, sampling=s) for i, s in enumerate([*SETTINGS, GREEDY])]
    for start in range(0, 4000, 500):
        mine = [request(i, CONTEXT, seed=start + i, sampling=sampling) for i in range(500)]
        for ids, logprobs, _ in sampler.sample([*mine, *others])[:500]:
            assert logprobs[0] == pytest.approx(float(expected[ids[0]].log()), abs=1e-5)
            counts[ids[0]] += 1
    possible = expected > 0
    assert torch.all(counts[~possible] == 0)
    statistic = ((counts - 4000 * expected)[possible] ** 2 / (4000 * expected[possible])).sum()
    freedom = int(possible.sum()) - 1
    if freedom:
        p_value = torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), statistic / 2)
        assert float(p_value) > 1e-3
    else:
        assert float(statistic) == 0


def test_the_tokens_of_one_action_are_drawn_independently(toy):
    """Chi-square over the 16 pairs of two tokens, each one of the four likeliest in its own context."""
    first = kept_distribution(toy_logits(toy), 2.0, 4, 1.0)
    expected = torch.zeros(16, 16, dtype=torch.float64)
    for token in first.nonzero()[:, 0].tolist():
        expected[token] = first[token] * kept_distribution(toy_logits(toy, [*CONTEXT, token]), 2.0, 4, 1.0)
    sampler = Sampler(toy, frozenset())
    counts = torch.zeros(16, 16, dtype=torch.float64)
    sampling = Sampling(temperature=2.0, top_k=4, max_new_tokens=2)
    for start in range(0, 4000, 500):
        for ids, _, _ in sampler.sample([request(i, CONTEXT, seed=start + i, sampling=sampling) for i in range(500)]):
            counts[tuple(ids)] += 1
    possible = expected > 0
    assert int(possible.sum()) == 16
    assert torch.all(counts[~possible] == 0)
    statistic = ((counts - 4000 * expected)[possible] ** 2 / (4000 * expected[possible])).sum()
    assert float(torch.special.gammaincc(torch.tensor(15 / 2.0).double(), statistic / 2)) > 1e-3


def test_truncation_settings_differ_on_the_toy(toy):
    """The settings above keep different numbers of tokens, none of them trivial."""
    sizes = [int((kept_distribution(toy_logits(toy), s.temperature, s.top_k, s.top_p) > 0).sum()) for s in SETTINGS]
    assert sizes[:2] == [16, 16]
    assert sizes[5:] == [1, 1]
    assert all(1 < size < 16 for size in sizes[2:5])


def test_truncation_renormalises_and_keeps_at_least_one_token():
    logp = torch.log_softmax(torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3, dim=-1)
    top_k, top_p = torch.tensor([0, 3, 50, 0, 1, 4]), torch.tensor([1.0, 1.0, 0.5, 1e-9, 1.0, 0.6])
    cut = truncate(logp, top_k, top_p)
    torch.testing.assert_close(cut.exp().sum(-1), torch.ones(6))
    for row in range(6):
        expected = kept_distribution(logp[row].double(), 1.0, int(top_k[row]), float(top_p[row]))
        torch.testing.assert_close(cut[row].exp().double(), expected, atol=1e-5, rtol=1e-5)


def test_random_streams_are_uniform_and_do_not_repeat_across_seeds_or_steps():
    draws = np.stack([uniforms(np.arange(2000, dtype=np.uint64), step) for step in range(20)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert len(np.unique(draws)) == draws.size
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    expected = draws.size / 100
    statistic = torch.tensor(((counts - expected) ** 2 / expected).sum())
    assert float(torch.special.gammaincc(torch.tensor(99 / 2.0).double(), statistic / 2)) > 1e-3
    for a, b in ((draws[:, :-1], draws[:, 1:]), (draws[:-1], draws[1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


# --- reproducibility ---


def played(policy, turns=3, n=16):
    contexts, out = random_contexts(4, n), []
    for step in range(turns):
        answers = act(policy, requests_of(contexts, seed=50 + 100 * step, turn=step))
        out.append([(a.ids, a.logprobs, a.text) for a in answers])
        contexts = [c + a.ids + [7, 8] for c, a in zip(contexts, answers, strict=True)]
    return out


def test_the_same_seeds_reproduce_bit_for_bit_and_others_do_not(model_dir):
    one, two = (played(TransformersPolicy(str(model_dir))) for _ in range(2))
    assert one == two
    contexts = random_contexts(4, 16)
    policy = TransformersPolicy(str(model_dir))
    assert [a.ids for a in act(policy, requests_of(contexts, seed=0))] != [
        a.ids for a in act(policy, requests_of(contexts, seed=1))
    ]


def test_an_actions_tokens_do_not_depend_on_who_else_is_in_the_batch(model_dir):
    contexts = random_contexts(5, 20)
    requests = requests_of(contexts)
    together = act(TransformersPolicy(str(model_dir)), requests)
    backwards = act(TransformersPolicy(str(model_dir)), requests[::-1])[::-1]
    single = TransformersPolicy(str(model_dir))
    alone = [act(single, [one])[0] for one in requests]
    for other in (backwards, alone):
        assert [a.ids for a in other] == [a.ids for a in together]
        for a, b in zip(other, together, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_requests_keep_their_own_token_limits(model_dir):
    policy = TransformersPolicy(str(model_dir))
    policy.sampler.stop_ids = frozenset()
    contexts = random_contexts(6, 6)
    requests = [request(i, c, seed=i, sampling=Sampling(max_new_tokens=i + 1)) for i, c in enumerate(contexts)]
    assert [len(a.ids) for a in act(policy, requests)] == [1, 2, 3, 4, 5, 6]


def test_an_action_ends_with_a_stop_token_or_at_its_limit(policy):
    answers = act(policy, requests_of(random_contexts(7, 64), Sampling(max_new_tokens=40)))
    stop = policy.chat.stop_ids
    for answer in answers:
        assert len(answer.ids) == len(answer.logprobs)
        assert not stop & set(answer.ids[:-1])
        assert answer.finish == ("stop" if answer.ids[-1] in stop else "length")
        assert answer.finish == "stop" or len(answer.ids) == 40
        assert answer.text == policy.chat.decode(answer.ids)
    assert {a.finish for a in answers} == {"stop", "length"}


# --- what is kept between turns ---


def test_a_context_that_was_rewritten_is_read_from_where_it_changed(policy, model_dir):
    """A window history drops turns in the middle: the shared head is kept, the rest read anew, nothing stale seen."""
    contexts = [[20, 21, 22, *c] for c in random_contexts(8, 8)]
    act(policy, requests_of(contexts))
    before = policy.sampler.prefilled_tokens
    rewritten = [[*c[:3], 290 + i % 3, 33, 34] for i, c in enumerate(contexts)]
    answers = act(policy, requests_of(rewritten, turn=1))
    shared = [
        next((k for k, (x, y) in enumerate(zip(old, new, strict=False)) if x != y), min(len(old), len(new)))
        for old, new in zip(contexts, rewritten, strict=True)
    ]
    assert policy.sampler.prefilled_tokens - before <= sum(
        len(new) - k for new, k in zip(rewritten, shared, strict=True)
    )
    fresh = act(TransformersPolicy(str(model_dir)), requests_of(rewritten, turn=1))
    assert [a.ids for a in answers] == [a.ids for a in fresh]


def test_asking_again_reads_one_token_and_gives_the_same_answer(policy):
    contexts = random_contexts(9, 8)
    first = act(policy, requests_of(contexts))
    before = policy.sampler.prefilled_tokens
    again = act(policy, requests_of(contexts))
    assert policy.sampler.prefilled_tokens - before == 8
    assert [a.ids for a in again] == [a.ids for a in first]


def test_open_actions_stand_together_whoever_ends_first_and_read_their_own_past(policy, model_dir, monkeypatch):
    random, copied = np.random.default_rng(3), []
    real = SlotPlan._run

    def run(self, first, last, slots, past, new, device):
        made = real(self, first, last, slots, past, new, device)
        copied.append(new[first] == 1 and isinstance(made.where, torch.Tensor))
        return made

    monkeypatch.setattr(SlotPlan, "_run", run)
    alone = TransformersPolicy(str(model_dir))
    contexts = {str(i): context for i, context in enumerate(random_contexts(5, 12))}
    for number in range(4):
        acting = [key for key in contexts if random.random() < 0.6]
        requests = [
            request(key, contexts[key], number, 7 * number + int(key), Sampling(1.0, max_new_tokens=int(limit)))
            for key, limit in zip(acting, random.integers(1, 14, len(acting)), strict=True)
        ]
        copied.clear()
        actions = act(policy, requests)
        assert copied
        assert not any(copied)
        for one, action in zip(requests, actions, strict=True):
            [wanted] = act(alone, [one])
            assert action.ids == wanted.ids
            assert action.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
            contexts[one.episode] = [*one.context_ids, *action.ids, 11, 12]
        slots = sorted([*policy.sampler._slot.values(), *policy.sampler._free])
        assert slots == list(range(len(slots)))
        for key in [key for key in contexts if random.random() < 0.2]:
            del contexts[key]
            policy.release(key)
            alone.release(key)
            contexts[f"{key}{number}"] = random_contexts(number, 1)[0]


def test_released_slots_are_used_again_and_leave_nothing_behind(policy, model_dir):
    slots = policy.sampler.cache.slots
    for number in range(6):
        contexts = random_contexts(10 + number, 20, longest=30 if number % 2 else 5)
        names = [f"{number}/{i}" for i in range(20)]
        requests = [
            request(name, c, seed=i, sampling=Sampling(max_new_tokens=6))
            for i, (name, c) in enumerate(zip(names, contexts, strict=True))
        ]
        fresh = act(TransformersPolicy(str(model_dir)), requests)
        assert [a.ids for a in act(policy, requests)] == [a.ids for a in fresh]
        for name in names:
            policy.release(name)
    assert policy.sampler.cache.slots == slots
    policy.release("never seen")
    act(policy, [request("last", [5])])


def test_an_engine_at_rest_holds_no_cache_and_answers_as_before(policy):
    contexts = random_contexts(12, 4)
    first = act(policy, requests_of(contexts, GREEDY))
    policy.rest()
    assert all(store is None for store in (*policy.sampler.cache._keys, *policy.sampler.cache._values))
    assert [a.ids for a in act(policy, requests_of(contexts, GREEDY))] == [a.ids for a in first]


def test_a_slot_given_back_is_taken_by_one_episode_only_and_its_old_one_starts_anew(policy, model_dir):
    contexts = dict(zip("abcd", random_contexts(16, 4), strict=True))

    def ask(engine, *names):
        return [a.ids for a in act(engine, [request(name, contexts[name], seed=ord(name)) for name in names])]

    ask(policy, "a", "b", "c")
    policy.release("a")
    ask(policy, "d")
    for name in contexts:
        contexts[name] = [*contexts[name], 9, 8, 7]
    before = policy.sampler.prefilled_tokens
    assert ask(policy, "a", "b", "c", "d") == ask(TransformersPolicy(str(model_dir)), "a", "b", "c", "d")
    assert policy.sampler.prefilled_tokens - before == len(contexts["a"]) + 3 * 3


def test_without_release_every_episode_keeps_its_own_slot(policy):
    contexts = random_contexts(11, 50)
    for i, context in enumerate(contexts):
        act(policy, [request(i, context)])
    before = policy.sampler.prefilled_tokens
    act(policy, requests_of(contexts, GREEDY))
    assert policy.sampler.prefilled_tokens - before == 50
    assert policy.sampler.cache.slots >= 50


# --- weights ---


def test_new_weights_are_used_at_once_and_nothing_cached_survives_them(policy, model_dir, pristine):
    other = perturbed(pristine, 0.2)
    contexts = random_contexts(12, 10)
    old = act(policy, requests_of(contexts))
    assert {a.version for a in old} == {0}
    read = policy.sampler.prefilled_tokens
    before = policy.fingerprint()
    policy.load_weights(other.state_dict(), 7)
    assert policy.fingerprint() == fingerprint(other) != before
    new = act(policy, requests_of(contexts))
    assert {a.version for a in new} == {7} == {policy.version}
    assert policy.sampler.prefilled_tokens - read == sum(map(len, contexts))
    fresh = TransformersPolicy(str(model_dir))
    fresh.load_weights(other.state_dict(), 7)
    assert [a.ids for a in act(fresh, requests_of(contexts))] == [a.ids for a in new] != [a.ids for a in old]


def test_a_model_trained_in_place_is_sampled_as_it_is_now(model, model_dir):
    from agentrl.models.load import load_tokenizer

    policy = TransformersPolicy(model, tokenizer=load_tokenizer(model_dir))
    contexts = random_contexts(13, 10)
    act(policy, requests_of(contexts))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    policy.load_weights(model.state_dict(), 1)
    fresh = TransformersPolicy(str(model_dir))
    fresh.load_weights(model.state_dict(), 1)
    assert [a.ids for a in act(policy, requests_of(contexts))] == [a.ids for a in act(fresh, requests_of(contexts))]


def test_weights_of_another_model_are_refused(policy):
    with pytest.raises(UserError, match="Qwen3ForCausalLM does not have: nonsense"):
        policy.load_weights({"nonsense": torch.zeros(1)}, 1)
    assert policy.version == 0


# --- faults ---


@pytest.mark.parametrize("context", [None, []])
def test_a_request_without_context_ids_is_the_policys_failure_and_names_the_episode(policy, context):
    with pytest.raises(PolicyFailure, match=r"episode lost: .*no context ids"):
        act(policy, [request("found", [5, 6]), request("lost", context)])
    (answer,) = act(policy, [request("found", [5, 6])])
    assert answer.ids


def test_no_model_and_a_model_that_cannot_be_sampled_exactly_are_refused(tmp_path, model_dir):
    with pytest.raises(UserError, match="needs a model"):
        TransformersPolicy()
    from agentrl.models.load import load_tokenizer

    config = tf.MistralConfig(**{k: v for k, v in TOY.items() if k != "head_dim"}, sliding_window=4)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    with pytest.raises(ModelError, match="sliding_window"):
        TransformersPolicy(model, tokenizer=load_tokenizer(model_dir))


class Gate:
    """Holds the model's forward pass number `at`, so that a test can act while the engine is busy."""

    def __init__(self, policy, at):
        self.entered, self.go, self.calls, self.at = threading.Event(), threading.Event(), 0, at
        self.hook = policy.model.base_model.register_forward_pre_hook(self._hold)

    def _hold(self, *_):
        self.calls += 1
        if self.calls == self.at:
            self.entered.set()
            assert self.go.wait(60)


@pytest.mark.parametrize("at", [1, 3])
def test_a_cancelled_call_stops_at_its_next_token_and_the_next_call_is_sound(policy, model_dir, at):
    """Cancelled while reading or while sampling; the next call is waiting already when the engine notices."""
    policy.sampler.stop_ids = frozenset()
    contexts = random_contexts(14, 6)
    gate = Gate(policy, at)
    long = Sampling(max_new_tokens=400)

    async def scenario():
        loop = asyncio.get_running_loop()
        doomed = asyncio.create_task(policy.act(requests_of(contexts, long)))
        assert await loop.run_in_executor(None, gate.entered.wait, 60)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        following = asyncio.create_task(policy.act(requests_of(contexts)))
        await asyncio.sleep(0)
        gate.go.set()
        return await following

    answers = asyncio.run(scenario())
    assert gate.calls <= at + 11, "one forward pass of the cancelled call at most, then ten tokens of the next"
    gate.hook.remove()
    fresh = TransformersPolicy(str(model_dir))
    fresh.sampler.stop_ids = frozenset()
    assert [a.ids for a in answers] == [a.ids for a in act(fresh, requests_of(contexts))]


def test_closing_aborts_what_is_under_way(policy):
    policy.sampler.stop_ids = frozenset()
    gate = Gate(policy, 2)

    async def scenario():
        loop = asyncio.get_running_loop()
        running = asyncio.create_task(policy.act(requests_of(random_contexts(15, 3), Sampling(max_new_tokens=400))))
        assert await loop.run_in_executor(None, gate.entered.wait, 60)
        await policy.aclose()
        gate.go.set()
        with pytest.raises(PolicyFailure, match="closed"):
            await running

    asyncio.run(scenario())
    assert gate.calls <= 3


def test_closing_a_policy_that_never_acted_is_no_error(policy):
    asyncio.run(policy.aclose())
