"""Attention over ragged batches: many sequences in one row, no padding, through the `transformers` attention interface.

A model loaded with ``attn_implementation="agentrl"`` runs two ways. Without further arguments it is plain SDPA with the
library's own masks. With ``ragged=<plan>`` its input is one row of T tokens, the concatenation of many sequences, and
the plan says which token attends to which: `PackedSequences` here for scoring and training, the slot cache of
`policies.transformers` for sampling. Every architecture that uses the attention interface works unchanged.

On a CPU sequences of equal length are attended in one batched causal call, and what several begin with stands once
(`agentrl.models.tree_attention`); on a GPU in half precision the whole row goes through variable-length flash
attention. Both are exact: a token never sees another sequence.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from agentrl.errors import ModelError
from agentrl.models.tree_attention import TokenTree, repeat_heads, runs_of

NAME = "agentrl"

WORTH_SHARING = 32
"""Tokens saved from which on it pays to read once what several sequences begin with."""
WORTH_TRIMMING = 1 << 27
"""Bytes of a sampler's cache from which on freed memory is handed back to the system before an update, which then has
to ask for its pages anew."""


class RaggedPlan(Protocol):
    """Which token attends to which in a row of concatenated sequences."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Returns (T, heads, head_dim) from query (T, heads, head_dim) and key, value (T, kv_heads, head_dim)."""
        ...


@dataclass(frozen=True)
class PackedSequences:
    """Whole sequences from their first token, each attending to itself causally.

    `lengths` are the sequences' lengths in row order. Runs of equal length share one call: sort by length first.
    """

    lengths: tuple[int, ...]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        if _varlen is not None and _is_half_on_gpu(query):
            return _varlen(query, key, value, _ends(self.lengths, query.device), max(self.lengths), scale)
        if query.device.type == "cpu":
            return self._tree.attend(layer, query, key, value, scale)
        runs, parts = runs_of(self.lengths), []
        # Split, not sliced: the gradient of a slice is as large as the whole row.
        pieces = (x.split([count * length for _, count, length in runs]) for x in (query, key, value))
        for (_, count, length), *inputs in zip(runs, *pieces, strict=True):
            q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in inputs)
            parts.append(sdpa(q, k, v, scale, causal=True).transpose(1, 2).flatten(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @cached_property
    def _tree(self) -> TokenTree:
        return TokenTree.of(self.lengths)


@lru_cache(maxsize=16)
def _ends(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(n + 1,) int32: where each sequence begins, and the end of the last. Cached: every layer asks for the same."""
    ends = torch.tensor((0, *lengths), dtype=torch.int64).cumsum(0)
    return ends.to(device, torch.int32)


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention of (B, heads, L, D) with fewer key heads than query heads allowed."""
    if key.shape[1] != query.shape[1]:
        if query.shape[2] == 1 and not causal:
            # One new token: the heads that share a key head stand where its queries would. Nothing is copied.
            grouped = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
            return F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale).reshape_as(query)
        if query.device.type == "cpu":  # whose kernel reads a key head for several query heads; others copy it for each
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
            )
        key, value = repeat_heads(query, key, value)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)


def _adapt_varlen(function: Any) -> Callable[..., torch.Tensor]:
    """Returns `torch.nn.attention.varlen.varlen_attn`, causal and with grouped heads, whatever its version."""
    known = inspect.signature(function).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        options["enable_gqa"] = True

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int, scale: float
    ) -> torch.Tensor:
        if "enable_gqa" not in known:
            key, value = repeat_heads(query, key, value)
        if "scale" in known:
            own = {"scale": scale}
        else:  # the first version divides by the root of the head's size, whatever the model wants
            own, query = {}, query * (scale * query.shape[-1] ** 0.5)
        out: torch.Tensor = function(query, key, value, ends, ends, longest, longest, **options, **own)
        return out

    return attend


try:
    from torch.nn.attention.varlen import varlen_attn  # torch >= 2.10
except ImportError:
    _varlen = None
else:
    _varlen = _adapt_varlen(varlen_attn)


def _is_half_on_gpu(query: torch.Tensor) -> bool:
    """Whether flash attention can take it: half precision, on a GPU from Ampere on."""
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256
    return half and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    ragged: RaggedPlan | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function behind ``attn_implementation="agentrl"``; shapes as `transformers` gives them (B, heads, L, D)."""
    if ragged is None:
        plain: Any = AttentionInterface()["sdpa"]
        out = plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
        return out[0], None
    for option in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise ModelError(f"{type(module).__name__} uses {option}, which ragged attention does not support yet")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast, norms and rotary positions have made queries and keys float32: back to the values' precision.
    q, k, v = (x[0].to(value.dtype).transpose(0, 1) for x in (query, key, value))
    return ragged.attend(module.layer_idx, q, k, v, scale).unsqueeze(0), None  # type: ignore[arg-type]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def precision(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which the passes of `model` run: autocast if it has a `compute_dtype`, else nothing.

    A model that trains in bfloat16 keeps float32 weights: steps of 1e-6 would be lost in bfloat16 ones. `run_ragged`
    and `lm_logits` enter the context themselves; who calls them often enters it once around all calls, so that the
    weights are cast once. Weights must not change inside.
    """
    dtype = getattr(model, "compute_dtype", None)
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(model.get_input_embeddings().weight.device.type, dtype=dtype)


def run_ragged(model: Any, ids: torch.Tensor, positions: torch.Tensor, plan: RaggedPlan) -> torch.Tensor:
    """Runs the body of a causal LM (no LM head) over one row of concatenated sequences.

    Args:
        model: a causal LM loaded with ``attn_implementation="agentrl"``.
        ids: (T,) int64 token ids.
        positions: (T,) int64 position of each token inside its own sequence.
        plan: which token attends to which.

    Returns:
        (T, H) last hidden states.
    """
    # A ready-made 4-D mask makes the library skip building one; the plan is the mask.
    no_mask = ids.new_zeros((1, 1, 1, 1), dtype=torch.bool)
    with precision(model):
        output = model.base_model(
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_mask=no_mask,
            use_cache=False,
            ragged=plan,
        )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def lm_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Returns (K, V) float32 logits of hidden states (K, H), with the scalings that some architectures apply."""
    with precision(model):
        logits: torch.Tensor = model.get_output_embeddings()(hidden).float()
    config = model.config
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits


@torch.no_grad()
def check_ragged(model: Any) -> None:
    """Compares ragged logits with the model's own on a short input; cheap, done once when a model is loaded.

    Raises:
        ModelError: the architecture does not go through the attention interface, or scales its logits in its own way.
    """
    if not getattr(model, "_supports_attention_backend", True):
        raise ModelError(f"{type(model).__name__} does not use the transformers attention interface")
    device = model.get_input_embeddings().weight.device
    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(7, device=device) * 13 % vocab
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3], device=device)
    ragged = lm_logits(model, run_ragged(model, ids, positions, PackedSequences((3, 4))))
    with precision(model):
        parts = [model(input_ids=part.unsqueeze(0), use_cache=False).logits[0] for part in (ids[:3], ids[3:])]
    plain = torch.cat(parts)
    # Relative: an untrained model's logits are a hundred times smaller than a trained one's.
    tolerance = (1e-3 if ragged.dtype == plain.dtype else 0.05) * plain.abs().max().item()
    error = (ragged - plain.float()).abs().max().item()
    if not error <= tolerance:
        raise ModelError(
            f"{type(model).__name__}: logits of packed sequences differ from the model's own by {error:.3g}; "
            "this architecture cannot be trained exactly here"
        )
