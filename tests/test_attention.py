"""Ragged attention: many sequences in one row, each as if it were alone."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from helpers import difference, flat_gradient

from agentrl.errors import ModelError
from agentrl.models import tree_attention
from agentrl.models.attention import NAME, PackedSequences, check_ragged, lm_logits, run_ragged

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
WORKING = {
    "qwen3": tf.Qwen3Config(**GROUPED, head_dim=8),
    "qwen3 ungrouped": tf.Qwen3Config(**SHAPE, num_key_value_heads=4, head_dim=16),
    "qwen3_moe": tf.Qwen3MoeConfig(
        **GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "llama": tf.LlamaConfig(**GROUPED),
    "qwen2": tf.Qwen2Config(**GROUPED),
    "mistral": tf.MistralConfig(**GROUPED, sliding_window=None),
    "phi3": tf.Phi3Config(**GROUPED),
    "granite": tf.GraniteConfig(**GROUPED, logits_scaling=3.0, attention_multiplier=0.3),
    "cohere": tf.CohereConfig(**GROUPED, logit_scale=0.3),
    "gpt_neox": tf.GPTNeoXConfig(**SHAPE),
    "gpt2": tf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2),
}
WINDOWED = {
    "mistral": tf.MistralConfig(**GROUPED, sliding_window=16),
    "qwen2": tf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=16, max_window_layers=0),
    "qwen3": tf.Qwen3Config(**GROUPED, use_sliding_window=True, sliding_window=16, max_window_layers=0),
    "gemma2": tf.Gemma2Config(**GROUPED, head_dim=8),
    "gemma3": tf.Gemma3TextConfig(**GROUPED, head_dim=8),
}


def build(config, attention=NAME, sharpness=5):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(sharpness)
    return model


def ragged_logits(model, sequences):
    flat = torch.tensor([i for ids in sequences for i in ids])
    positions = torch.cat([torch.arange(len(ids)) for ids in sequences])
    plan = PackedSequences(tuple(map(len, sequences)))
    return lm_logits(model, run_ragged(model, flat, positions, plan))


SEQUENCES = [
    torch.randint(64, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (3, 3, 1, 8, 8, 8, 40, 2)
]


@pytest.mark.parametrize("name", WORKING)
def test_a_ragged_row_equals_separate_runs_with_the_librarys_own_sdpa(name):
    ragged, plain = build(WORKING[name]), build(WORKING[name], "sdpa")
    check_ragged(ragged)
    ours = ragged_logits(ragged, SEQUENCES)
    theirs = torch.cat([plain(input_ids=torch.tensor([ids])).logits[0] for ids in SEQUENCES])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    assert difference(flat_gradient(ragged), flat_gradient(plain)) < 1e-5


def test_without_a_plan_the_model_is_plain_sdpa_padding_included():
    ours, theirs = build(WORKING["qwen3"]), build(WORKING["qwen3"], "sdpa")
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    a, b = (model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in (ours, theirs))
    assert torch.equal(a, b)


def test_no_token_sees_another_sequence_or_its_own_future():
    model = build(WORKING["qwen3"])
    base = ragged_logits(model, SEQUENCES)
    changed = [list(ids) for ids in SEQUENCES]
    changed[4][5] = (changed[4][5] + 1) % 64
    start = sum(map(len, SEQUENCES[:4]))
    moved = (ragged_logits(model, changed) - base).abs().amax(-1) > 1e-6
    assert moved.nonzero()[:, 0].tolist() == [start + 5, start + 6, start + 7]


@pytest.mark.parametrize("sharpness", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_passes_in_both_precisions_and_notices_a_plan_that_is_ignored(dtype, sharpness, monkeypatch):
    model = build(WORKING["llama"], sharpness=sharpness).to(dtype)
    check_ragged(model)
    monkeypatch.setattr(tree_attention, "runs_of", lambda lengths: [(0, 1, sum(lengths))])
    with pytest.raises(ModelError, match="differ from the model's own"):
        check_ragged(model)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_sliding_window_is_refused_even_where_a_short_input_would_not_show_it(name):
    with pytest.raises(ModelError, match="sliding_window"):
        check_ragged(build(WINDOWED[name]))


def test_an_architecture_outside_the_attention_interface_is_refused():
    config = tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ModelError, match="BloomForCausalLM does not use the transformers attention interface"):
        check_ragged(build(config))


def test_logits_scaled_in_a_way_of_the_models_own_are_noticed():
    model = build(WORKING["llama"])
    plain = model.forward

    def scaled(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    model.forward = scaled
    with pytest.raises(ModelError, match="logits of packed sequences differ"):
        check_ragged(model)
