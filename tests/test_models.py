"""Model directories: made, written, loaded, checked."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentrl.errors import ModelError, UnknownNameError, UserError
from agentrl.models.init import init_model, train_tokenizer
from agentrl.models.load import check_model_dir, fingerprint, load_model, load_tokenizer, save_model

BOARD = "######\n#@ $.#\n# *+ #\n######"
TEXTS = ["You push boxes. Answer with one of up, down, left, right.", *[BOARD, "up", "down", "left", "right"] * 5]
TOKENIZER = train_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    return path, init_model(path, TEXTS)


@pytest.fixture
def directory(made, tmp_path):
    """A copy to break."""
    return shutil.copytree(made[0], tmp_path / "model")


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- tiny models ---


def test_a_tiny_model_loads_with_the_auto_classes_and_generates(made):
    path, facts = made
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert 300_000 < facts["parameters"] < 400_000
    assert facts["vocab"] == len(tokenizer) == model.config.vocab_size <= 512
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (
        model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
    assert tokenizer.pad_token == "<|endoftext|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": BOARD}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 3


@pytest.mark.parametrize(("preset", "low", "high"), [("small", 0.9e6, 1.2e6), ("base", 9e6, 11e6)])
def test_presets_have_the_sizes_they_claim(tmp_path, preset, low, high):
    assert low < init_model(tmp_path / preset, TEXTS, preset=preset)["parameters"] < high


def test_shape_overrides(tmp_path):
    facts = init_model(tmp_path / "m", TEXTS, hidden=48, layers=2, heads=3)
    assert (facts["hidden"], facts["layers"], facts["heads"], facts["head_dim"]) == (48, 2, 3, 16)
    assert load_model(tmp_path / "m").config.num_key_value_heads == facts["kv_heads"]


def test_the_same_seed_gives_the_same_files_and_leaves_the_global_generator_alone(made, tmp_path):
    state = torch.random.get_rng_state()
    init_model(tmp_path / "again", TEXTS)
    init_model(tmp_path / "other", TEXTS, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for file in made[0].iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    assert fingerprint(load_model(made[0])) != fingerprint(load_model(tmp_path / "other"))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"preset": "tinny"}, UnknownNameError, ["tinny", "'tiny'"]),
        ({"hidden": 50}, ModelError, ["hidden=50", "heads=4", "multiple of 8"]),
        ({"layers": 0}, ModelError, ["layers=0"]),
        ({"vocab": 100}, ModelError, ["vocab=100", "259"]),
        ({"vocab": 262}, ModelError, ["vocab=262", "'assistant'"]),
        ({"words": ["up!"]}, ModelError, ["'up!'", "letters"]),
    ],
)
def test_shapes_that_cannot_be_built(tmp_path, options, error, words):
    with pytest.raises(error) as caught:
        init_model(tmp_path / "m", TEXTS, **options)
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "m").exists()


# --- their tokenizer ---


@given(text=st.text())
def test_any_text_survives_the_tokenizer(text):
    assert TOKENIZER.decode(ids_of(TOKENIZER, text)) == text


def test_the_saved_tokenizer_is_the_trained_one(made):
    loaded = load_tokenizer(made[0])
    for text in (*TEXTS, "Ünïcode 漢字 🙂\r\n\t", "<|im_start|>user\n"):
        assert ids_of(loaded, text) == ids_of(TOKENIZER, text)
        assert loaded.decode(ids_of(loaded, text)) == text
    assert loaded.chat_template == TOKENIZER.chat_template
    assert loaded.model_max_length == TOKENIZER.model_max_length


@given(board=st.text(alphabet="#.@$*+-0123456789| \n"))
def test_every_cell_of_a_board_is_one_token(board):
    assert len(ids_of(TOKENIZER, board)) == len(board)


def test_symbols_are_not_merged_with_words():
    assert [TOKENIZER.decode([i]) for i in ids_of(TOKENIZER, "#up.down down")] == ["#", "up", ".", "down", " down"]


@pytest.mark.parametrize("word", ["up", "down", "left", "right", "system", "user", "assistant"])
def test_frequent_words_are_one_token(word):
    assert len(ids_of(TOKENIZER, word)) == 1


def test_wanted_words_are_one_token_however_rare():
    many = [f"{a}{b}{c}" for a in "bcdfghjklm" for b in "aeiou" for c in "npqrstvwxz"] * 3
    plain, wanting = train_tokenizer([*many, "teleport"]), train_tokenizer([*many, "teleport"], words=["teleport"])
    assert len(ids_of(plain, "teleport")) > 1
    assert len(ids_of(wanting, "teleport")) == 1
    assert len(plain) == len(wanting) == 512


# --- loading ---


def test_load_model_gives_the_saved_model_in_the_asked_form(made):
    path = made[0]
    model = load_model(path)
    assert model.config._attn_implementation == "agentrl"
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in load_model(path, train=True).parameters())
    assert {p.dtype for p in load_model(path, dtype="bfloat16").parameters()} == {torch.bfloat16}
    ids = torch.arange(20).view(2, 10)
    torch.testing.assert_close(model(ids).logits, load_model(path, attn_implementation="eager")(ids).logits)


@pytest.mark.parametrize(("options", "word"), [({"dtype": "float8"}, "float8"), ({"device": "gpu"}, "'gpu'")])
def test_options_that_cannot_be_had(made, options, word):
    with pytest.raises(ModelError, match=word):
        load_model(made[0], **options)


def test_weights_that_are_not_all_there_are_refused_instead_of_random(directory):
    config = json.loads((directory / "config.json").read_text())
    config.update(num_hidden_layers=4, layer_types=["full_attention"] * 4)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model\.layers\.3\..*config\.json"):
        load_model(directory)


def test_truncated_weights_are_named(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="model could not be loaded"):
        load_model(directory)


CPU_FULL = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "17179869184 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError(CPU_FULL),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
)
@pytest.mark.parametrize(
    "where", ["transformers.AutoModelForCausalLM.from_pretrained", "torch.nn.Module.to", "torch.empty"]
)
def test_where_memory_does_not_suffice_the_message_says_how_much_is_needed_and_how_to_lower_it(
    made, monkeypatch, error, where
):
    model = load_model(made[0])
    size = 4 * sum(p.numel() for p in model.parameters())

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        for train, way in (
            (True, r"lora\.rank=16 .*tokens_per_microbatch and rollout\.groups"),
            (False, "smaller model"),
        ):
            with pytest.raises(ModelError, match=rf"not enough memory for .*take .* GiB \({size:,} bytes\)") as caught:
                load_model(made[0], train=train)
            assert re.search(way, str(caught.value))
            assert "dtype=bfloat16" in str(caught.value)
            assert "\n" not in str(caught.value)
        with pytest.raises(ModelError, match=rf"{size // 2:,} bytes") as caught:
            load_model(made[0], dtype="bfloat16")
        assert "takes half" not in str(caught.value)


def test_other_faults_of_a_device_are_not_taken_for_a_lack_of_memory(made, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("torch.nn.Module.to", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        load_model(made[0])


def test_save_then_load_keeps_every_weight(made, tmp_path):
    model = load_model(made[0])
    save_model(model, load_tokenizer(made[0]), tmp_path / "a" / "b")
    check_model_dir(tmp_path / "a" / "b")
    assert fingerprint(load_model(tmp_path / "a" / "b")) == fingerprint(model)
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["b"], "no temporary directory is left"


def test_a_failed_save_leaves_the_old_model(directory, made, monkeypatch):
    model, before = load_model(made[0]), fingerprint(load_model(directory))
    torch.nn.init.zeros_(model.model.norm.weight)

    def full_disk(path):
        raise OSError(28, "No space left on device")

    tokenizer = load_tokenizer(made[0])
    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    with pytest.raises(UserError, match="No space left"):
        save_model(model, tokenizer, directory)
    assert fingerprint(load_model(directory)) == before
    assert [entry.name for entry in directory.parent.iterdir()] == [directory.name]
    monkeypatch.undo()
    save_model(model, tokenizer, directory)
    assert fingerprint(load_model(directory)) == fingerprint(model) != before


def test_what_is_no_model_is_never_replaced(made, tmp_path):
    precious = tmp_path / "thesis.tex"
    precious.write_text("words")
    model, tokenizer = load_model(made[0]), load_tokenizer(made[0])
    for target in (tmp_path, precious, precious / "model"):
        with pytest.raises(UserError, match="cannot write a model"):
            save_model(model, tokenizer, target)
    assert precious.read_text() == "words"


# --- checking ---


def edit(directory, file, **changes):
    content = json.loads((directory / file).read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key)
        else:
            content[key] = value
    (directory / file).write_text(json.dumps(content))


def without_tokenizer(directory):
    (directory / "tokenizer.json").unlink()


def without_weights(directory):
    (directory / "model.safetensors").unlink()


def without_a_shard(directory):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def adapter_only(directory):
    (directory / "config.json").rename(directory / "adapter_config.json")


BREAKS = [
    (lambda d: (d / "config.json").unlink(), ["no config.json", "save_pretrained"]),
    (adapter_only, ["no config.json", "LoRA", "merge"]),
    (without_weights, ["no weights", "model.safetensors", "incomplete"]),
    (without_a_shard, ["model-00002.safetensors", "missing"]),
    (without_tokenizer, ["no tokenizer", "tokenizer.json"]),
    (lambda d: (d / "chat_template.jinja").unlink(), ["no chat template", "chat_template.jinja"]),
    (lambda d: edit(d, "tokenizer_config.json", pad_token=None), ["no pad token", "pad_token"]),
    (lambda d: edit(d, "tokenizer_config.json", eos_token=None), ["no end token", "eos_token"]),
    (lambda d: edit(d, "config.json", vocab_size=100), ["vocabulary", "100", "resize_token_embeddings"]),
    (lambda d: (d / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}"), ["several turns"]),
]


@pytest.mark.parametrize(("damage", "words"), BREAKS)
def test_what_a_directory_lacks_is_named_with_the_way_out(directory, damage, words):
    check_model_dir(directory)
    damage(directory)
    with pytest.raises(ModelError) as caught:
        check_model_dir(directory)
    for word in [str(directory), *words]:
        assert word in str(caught.value)


def test_everything_that_is_missing_is_said_at_once(directory):
    without_weights(directory)
    (directory / "chat_template.jinja").unlink()
    edit(directory, "tokenizer_config.json", pad_token=None)
    with pytest.raises(ModelError, match=r"no weights.*no chat template.*no pad token"):
        check_model_dir(directory)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_loading_says_what_is_missing_too(directory, load):
    without_weights(directory)
    without_tokenizer(directory)
    with pytest.raises(ModelError, match=r"no (weights|tokenizer)"):
        load(directory)


def test_a_mistyped_directory_gets_the_nearest_names(directory, monkeypatch):
    for load in (check_model_dir, load_tokenizer, load_model):
        with pytest.raises(ModelError, match=r"no model directory .*did you mean '.*model'"):
            load(directory.parent / "modle")
    monkeypatch.chdir(directory.parent)
    with pytest.raises(ModelError, match="did you mean 'model'"):
        check_model_dir("modl")
    with pytest.raises(ModelError, match="is a file"):
        check_model_dir(directory / "config.json")


def test_a_hub_name_passes_the_check_and_says_the_way_out_when_the_hub_is_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    check_model_dir("nobody/no-such-model")
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match=r"hf download nobody/no-such-model --local-dir"):
            load("nobody/no-such-model")
    (tmp_path / "nobody").mkdir()
    with pytest.raises(ModelError, match="no model directory"):
        check_model_dir("nobody/no-such-model")


# --- fingerprint ---


def test_the_fingerprint_sees_one_optimiser_step_of_any_tensor(made):
    model = load_model(made[0], train=True)
    seen = {fingerprint(model)}
    model(torch.arange(8).unsqueeze(0)).logits.logsumexp(-1).sum().backward()
    for parameter in model.parameters():
        torch.optim.AdamW([parameter], lr=1e-6).step()
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_the_fingerprint_sees_single_elements_and_their_places():
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    seen = {fingerprint(weights)}
    for i in range(6):
        changed = weights["a"].clone()
        changed.view(-1)[i] = torch.nextafter(changed.view(-1)[i], torch.tensor(9.0))
        seen.add(fingerprint({**weights, "a": changed}))
    seen.add(fingerprint({**weights, "a": weights["a"].flip(1)}))
    seen.add(fingerprint({**weights, "a": weights["a"].view(3, 2)}))
    seen.add(fingerprint({"c": weights["a"], "b": weights["b"]}))
    assert len(seen) == 10


def test_the_fingerprint_depends_on_values_alone(made):
    model = load_model(made[0])
    before = fingerprint(model)
    assert len(before) == 16
    assert fingerprint(model.state_dict()) == before
    assert fingerprint(load_model(made[0], train=True)) == before
    a = torch.randn(4, 6)
    assert fingerprint({"a": a.t().contiguous().t()}) == fingerprint({"a": a}), "memory layout does not matter"


def test_the_fingerprint_in_chunks_is_the_fingerprint(monkeypatch):
    weights = {"a": torch.randn(1000), "b": torch.randn(77).bfloat16()}
    whole = fingerprint(weights)
    monkeypatch.setattr("agentrl.models.load._CHUNK", 64)
    assert fingerprint(weights) == whole


# --- layering ---


def test_importing_the_package_is_cheap():
    code = (
        "import sys, agentrl.models.chat, agentrl.models.load, agentrl.models.init\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
