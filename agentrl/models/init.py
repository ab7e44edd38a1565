"""Tiny models from nothing: a Qwen3-shaped network with random weights and a tokenizer trained on given text.

For work without a hub, on a laptop: warm-started on demonstrations (`agentrl sft`), such a model learns to act in a
text game within minutes. The directory loads with `AutoModelForCausalLM` and `AutoTokenizer` like any other.

The tokenizer is byte-level, so that every text survives encoding and decoding exactly, and lets *symbols stand alone*:
every character but a letter is a token of its own (new lines, digits, ``# . $ @``), so that the cells of a grid always
fall into the same number of tokens. Only words, runs of letters with the space before them, are merged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentrl.errors import ModelError, UnknownNameError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3Config

MAX_CONTEXT = 4096
"""Longest context of the models made here, in tokens."""

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""ChatML as Qwen writes it, without a default system prompt."""


@dataclass(frozen=True)
class Shape:
    """Shape of a Qwen3 network; the sizes in `PRESETS` are with a vocabulary of 512 and tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


PRESETS = {
    "tiny": Shape(hidden=96, layers=3, heads=4, kv_heads=2, mlp=256),  # 0.35 M parameters
    "small": Shape(hidden=128, layers=5, heads=4, kv_heads=2, mlp=384),  # 1.05 M
    "base": Shape(hidden=320, layers=8, heads=8, kv_heads=4, mlp=960),  # 10 M
}


def init_model(
    out: str | Path,
    texts: Iterable[str],
    *,
    preset: str = "tiny",
    hidden: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    vocab: int = 512,
    words: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Writes a randomly initialised model and a tokenizer trained on `texts`.

    The same arguments give the same files. An existing model directory is replaced.

    Args:
        out: directory to write.
        texts: what the model will read and write: instructions, observations, actions. The more often a word occurs,
            the sooner it becomes one token.
        preset: ``tiny`` (0.35 M parameters), ``small`` (1 M) or ``base`` (10 M).
        hidden, layers, heads: override the preset's shape.
        vocab: largest vocabulary, special tokens and the 256 bytes included.
        words: words that must each be one token however rare they are in `texts`, e.g. the actions.
        seed: of the random weights.

    Returns:
        `path`, `preset`, `seed`, and sizes: `parameters`, `vocab`, `hidden`, `layers`, `heads`, `kv_heads`,
        `head_dim`, `mlp`.

    Raises:
        UnknownNameError: no such preset.
        ModelError: a shape that cannot be built, or a vocabulary too small for the bytes or for `words`.
        UserError: `out` cannot be written, or holds something that is no model.
    """
    import torch
    from transformers import GenerationConfig, Qwen3ForCausalLM

    from agentrl.models.load import save_model

    shape = _shape(preset, hidden, layers, heads)
    tokenizer = train_tokenizer(texts, vocab=vocab, words=words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(_network_config(shape, tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    save_model(model, tokenizer, out)
    return {
        "path": str(out),
        "preset": preset,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocab": len(tokenizer),
        **{name: getattr(shape, name) for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "mlp")},
    }


def _network_config(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def train_tokenizer(texts: Iterable[str], *, vocab: int = 512, words: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Trains the tokenizer described above on `texts`.

    Args:
        texts: training text.
        vocab: largest vocabulary, special tokens and the 256 bytes included.
        words: words that must each be one token, beside the names of the chat roles.

    Raises:
        ModelError: `vocab` is too small, or a word holds something else than letters.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len((PAD, START, END))
    if vocab < smallest:
        raise ModelError(f"vocab={vocab} cannot hold the 256 bytes and 3 special tokens; give at least {smallest}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\P{L}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=1,
        show_progress=False,
        special_tokens=[PAD, START, END],
        initial_alphabet=alphabet,
    )
    wanted = list(dict.fromkeys([*_ROLES, *words]))
    backend.train_from_iterator(_weighted(texts, wanted), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=MAX_CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    _check_words(tokenizer, wanted, vocab)
    return tokenizer


def _weighted(texts: Iterable[str], wanted: Sequence[str]) -> Iterator[str]:
    """Yields `texts`, then the wanted words more often than any word there, so that their merges come first."""
    counts: Counter[str] = Counter()
    texts = [texts] if isinstance(texts, str) else texts
    for text in texts:
        counts.update(re.findall(r"[^\W\d_]+", text))
        yield text
    times = max(counts.values(), default=0) + 1
    phrase = "\n".join(wanted)
    for _ in range(times):
        yield phrase


def _check_words(tokenizer: PreTrainedTokenizerBase, wanted: Sequence[str], vocab: int) -> None:
    split = [word for word in wanted if len(tokenizer(word, add_special_tokens=False)["input_ids"]) != 1]
    symbols = [word for word in split if not word.isalpha()]
    if symbols:
        raise ModelError(f"{symbols[0]!r} cannot be one token: only letters are merged, every symbol stands alone")
    if split:
        raise ModelError(f"vocab={vocab} is too small for {', '.join(map(repr, split))} to be one token; raise it")


def _shape(preset: str, hidden: int | None, layers: int | None, heads: int | None) -> Shape:
    if preset not in PRESETS:
        raise UnknownNameError("preset", preset, PRESETS)
    base = PRESETS[preset]
    new_hidden = base.hidden if hidden is None else hidden
    new_layers = base.layers if layers is None else layers
    new_heads = base.heads if heads is None else heads
    if min(new_hidden, new_layers, new_heads) < 1:
        raise ModelError(f"hidden={new_hidden}, layers={new_layers}, heads={new_heads}: all must be at least 1")
    if new_hidden % new_heads or new_hidden // new_heads % 2:
        raise ModelError(
            f"hidden={new_hidden} with heads={new_heads}: rotary positions need heads of equal, even size; "
            f"take hidden a multiple of {2 * new_heads}"
        )
    kv_heads = base.kv_heads if heads is None else new_heads // 2 if new_heads % 2 == 0 else new_heads
    mlp = base.mlp if hidden is None else max(32, round(new_hidden * 8 / 3 / 32) * 32)
    return Shape(new_hidden, new_layers, new_heads, kv_heads, mlp)
