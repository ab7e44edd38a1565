"""bfloat16 passes over float32 weights, and variable-length attention in all its versions."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers import difference, episodes, flat_gradient, flat_parameters, played_by

from agentrl.batch import build_batch, score, score_microbatch, scoring
from agentrl.config.schema import PolicyUpdateConfig
from agentrl.models import attention
from agentrl.models.attention import PackedSequences, check_ragged, precision
from agentrl.models.load import fingerprint, load_model
from agentrl.policy import PolicyRequest, Sampling
from agentrl.train.policy_update import make_optimizer, update_policy
from policies.transformers.sampler import Sampler


@pytest.fixture
def half(model_dir):
    """A model as the trainer loads it with ``model.dtype=bfloat16``."""
    return load_model(model_dir, dtype="bfloat16", train=True)


def gradient(model, batch, budget=10**6):
    weight = torch.linspace(-1, 1, batch.index.K)
    model.zero_grad()
    for micro in batch.microbatches(budget):
        (weight[micro.tokens] * score_microbatch(model, micro).logprob).sum().backward()
    return flat_gradient(model)


def test_a_model_for_training_keeps_float32_weights_and_computes_in_bfloat16(half, model, monkeypatch):
    seen = []
    plain = PackedSequences.attend
    monkeypatch.setattr(
        PackedSequences, "attend", lambda self, *a: seen.extend(x.dtype for x in a[1:4]) or plain(self, *a)
    )
    batch = build_batch(episodes(0))
    ours, exact = (score(m, batch, budget=10**6).logprob for m in (half, model))
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert fingerprint(half) == fingerprint(model)
    assert set(seen[: len(seen) // 2]) == {torch.bfloat16}
    assert set(seen[len(seen) // 2 :]) == {torch.float32}
    assert 1e-4 < (ours - exact).abs().mean() < 0.1
    check_ragged(half)


def test_the_gradient_is_float32_near_the_exact_one_and_free_of_chunks(half, model, monkeypatch):
    batch = build_batch(episodes(1))
    exact, whole = gradient(model, batch), gradient(half, batch)
    assert {p.grad.dtype for p in half.parameters()} == {torch.float32}
    assert F.cosine_similarity(whole, exact, dim=0) > 0.99
    monkeypatch.setattr(scoring, "LOGIT_BUDGET", 3 * half.config.vocab_size)
    assert difference(gradient(half, batch), whole) < 0.02


def test_steps_far_below_the_resolution_of_bfloat16_are_not_lost(half):
    batch = build_batch(played_by(half, episodes(2)))
    before, config = flat_parameters(half), PolicyUpdateConfig(lr=1e-6)
    metrics = update_policy(half, make_optimizer(half, config), batch, torch.ones(batch.index.K), config)
    assert metrics["logprob_mismatch"] == 0
    moved = (flat_parameters(half) - before).abs()
    assert 1e-7 < moved.max() < 2e-6
    # Half of the weights or more would not have moved as bfloat16.
    assert (flat_parameters(half).bfloat16() == before.bfloat16()).float().mean() > 0.5


def test_a_copy_computes_in_the_same_precision(half):
    batch = build_batch(episodes(3))
    other = copy.deepcopy(half).requires_grad_(False)
    assert torch.equal(score(half, batch, budget=99).logprob, score(other, batch, budget=99).logprob)


def test_the_sampler_draws_from_what_the_trainer_scores(half):
    sampler = Sampler(half, frozenset())
    sampling = Sampling(max_new_tokens=8)
    requests = [PolicyRequest(str(n), 0, "", (), context_ids=[7, n, 5], seed=n, sampling=sampling) for n in range(8)]
    answers = sampler.sample(requests)
    with precision(half), torch.no_grad():
        for request, (ids, logprobs, _) in zip(requests, answers, strict=True):
            logits = half(torch.tensor([request.context_ids + ids])).logits[0, 2:-1].float()
            plain = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
            assert (torch.tensor(logprobs) - plain).abs().mean() < 0.1


# --- variable-length attention: the kernel needs a GPU, what surrounds it does not ---


def kernel(query, key, value, ends, scale, grouped):
    """What flash attention computes, sequence by sequence."""
    assert ends.dtype == torch.int32
    assert grouped or key.shape[1] == query.shape[1]
    ends = ends.tolist()
    parts = []
    for start, end in pairwise(ends):
        q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def first(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    assert max_q == max_k == int(cu_seq_q.diff().max())
    return kernel(query, key, value, cu_seq_q, None, False)


def latest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert window_size == (-1, 0)
    assert torch.equal(cu_seq_q, cu_seq_k)
    return kernel(query, key, value, cu_seq_q, scale, enable_gqa)


@pytest.mark.parametrize("version", [first, latest])
def test_every_version_of_variable_length_attention_gives_what_sdpa_gives(version, model, monkeypatch):
    batch = build_batch(episodes(4))
    exact, exact_gradient = score(model, batch, budget=200).logprob, gradient(model, batch, 200)
    monkeypatch.setattr(attention, "_varlen", attention._adapt_varlen(version))
    monkeypatch.setattr(attention, "_is_half_on_gpu", lambda query: True)
    torch.testing.assert_close(score(model, batch, budget=200).logprob, exact, atol=1e-5, rtol=0)
    assert difference(gradient(model, batch, 200), exact_gradient) < 1e-5
    plan, q, k = PackedSequences((2, 3)), torch.randn(5, 4, 8), torch.randn(5, 2, 8)
    odd = plan.attend(0, q, k, k, 0.3)
    monkeypatch.setattr(attention, "_varlen", None)
    torch.testing.assert_close(odd, plan.attend(0, q, k, k, 0.3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_bfloat16_passes_are_near_float32_on_the_cpu(model_dir, model):
    batch, on_gpu = build_batch(episodes(5)), build_batch(episodes(5), device="cuda")
    half = load_model(model_dir, dtype="bfloat16", device="cuda", train=True)
    exact = score(model, batch, budget=99).logprob
    assert (score(half, on_gpu, budget=99).logprob - exact).abs().mean() < 0.1
    weight = torch.linspace(-1, 1, batch.index.K)
    for micro in on_gpu.microbatches(99):
        scores = score_microbatch(half, micro).logprob
        (weight[micro.tokens].to(scores) * scores).sum().backward()
    assert F.cosine_similarity(flat_gradient(half).cpu(), gradient(model, batch), dim=0) > 0.99
