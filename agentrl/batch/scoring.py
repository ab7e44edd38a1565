"""Log-probs at action positions, and nowhere else.

Hidden states are gathered where the agent spoke *before* the LM head, and log-softmax runs in chunks: no tensor of
(rows, length, vocabulary) ever exists. `score` returns one flat vector (K,) whatever the micro-batches were.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from agentrl.batch.rows import Batch, MicroBatch
from agentrl.models.attention import PackedSequences, lm_logits, precision, run_ragged
from agentrl.models.vision import rope_positions, run_visual

Tensor = torch.Tensor

LOGIT_BUDGET = 1 << 24
"""Largest number of logits held at once on a CPU (64 MiB in float32)."""
GPU_LOGIT_BUDGET = 1 << 28
"""The same on a GPU (1 GiB): every chunk reads the whole LM head, so that small ones would wait for memory."""


class Centre(NamedTuple):
    """The distribution that centred log-probs are centred on: hidden states of one model at every action position."""

    model: Any
    hidden: Tensor
    """(K, H) as `hidden_states` returns."""


class TokenScores(NamedTuple):
    """Per action token; None where not asked for."""

    logprob: Tensor
    """(k,) float32 nats, of the tempered distribution."""
    entropy: Tensor | None
    """(k,) float32 nats."""
    centred: Tensor | None
    """(k,) float32 nats: logprob minus its expectation under the centre's distribution (zero mean under it)."""


def _head(
    model: Any,
    hidden: Tensor,
    target: Tensor,
    temperature: float,
    want_entropy: bool,
    entropy_gradient: bool,
    centre: Any,
    around: Tensor | None,
) -> tuple[Tensor, ...]:
    logp = torch.log_softmax(_tempered(lm_logits(model, hidden), temperature), dim=-1)
    out = [logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)]
    if want_entropy:
        spread = logp if entropy_gradient else logp.detach()
        out.append(-(spread.exp() * spread).sum(-1))
    if around is not None:
        with torch.no_grad():
            p = torch.softmax(_tempered(lm_logits(centre, around), temperature), dim=-1)
        out.append(out[0] - (p * logp).sum(-1))
    return tuple(out)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def run_rows(model: Any, micro: MicroBatch) -> Tensor:
    """Returns the last hidden states (T, H) of a micro-batch, its pictures seen.

    Raises:
        ModelError: there are pictures, and the model reads text only.
    """
    if not micro.images:
        return run_ragged(model, micro.ids, micro.positions, micro.plan)
    assert isinstance(micro.plan, PackedSequences)  # rows with pictures share no beginnings
    rows = micro.ids.cpu().split(list(micro.plan.lengths))
    starts = [0, *itertools.accumulate(micro.plan.lengths)]
    positions = [rope_positions(model, row.tolist(), spans) for row, spans in zip(rows, micro.images, strict=True)]
    flat = [span.moved(start) for start, spans in zip(starts, micro.images, strict=False) for span in spans]
    return run_visual(model, micro.ids, torch.cat(positions, dim=1), micro.plan, flat)


def score_microbatch(
    model: Any,
    micro: MicroBatch,
    *,
    temperature: float = 1.0,
    want_entropy: bool = False,
    entropy_gradient: bool = True,
    centre: Centre | None = None,
) -> TokenScores:
    """Scores the tokens of one micro-batch, in the order of `micro.tokens` (j,), with gradient if it is enabled.

    Entropies that are only reported need no gradient: it would keep another (k, V) tensor.
    """
    with precision(model):
        return _score_microbatch(model, micro, temperature, want_entropy, entropy_gradient, centre)


def _score_microbatch(
    model: Any,
    micro: MicroBatch,
    temperature: float,
    want_entropy: bool,
    entropy_gradient: bool,
    centre: Centre | None,
) -> TokenScores:
    hidden = run_rows(model, micro)[micro.predict_at]
    around = None if centre is None else centre.hidden[_first_owner(micro)].to(hidden.device)
    vocab = model.get_output_embeddings().weight.shape[0]
    chunk = max(1, (GPU_LOGIT_BUDGET if hidden.is_cuda else LOGIT_BUDGET) // vocab)
    parts = []
    for start in range(0, len(hidden), chunk):
        piece = slice(start, start + chunk)
        arguments = (
            model,
            hidden[piece],
            micro.target[piece],
            temperature,
            want_entropy,
            entropy_gradient,
            None if centre is None else centre.model,
            None if around is None else around[piece],
        )
        # One chunk is held anyway; several are recomputed in the backward pass instead of being kept.
        if torch.is_grad_enabled() and len(hidden) > chunk:
            parts.append(checkpoint(_head, *arguments, use_reentrant=False))
        else:
            parts.append(_head(*arguments))
    columns = [torch.cat(column)[micro.slot.to(hidden.device)] for column in zip(*parts, strict=True)]
    rest = columns[1:]
    entropy = rest.pop(0) if want_entropy else None
    return TokenScores(columns[0], entropy, rest.pop(0) if centre is not None else None)


def _first_owner(micro: MicroBatch) -> Tensor:
    """(k,) for each distinct position one action token that sits there."""
    owner = torch.empty(len(micro.target), dtype=torch.int64)
    owner[micro.slot] = micro.tokens
    return owner


@torch.no_grad()
def score(
    model: Any,
    batch: Batch,
    *,
    budget: int,
    temperature: float = 1.0,
    want_entropy: bool = False,
    centre: Centre | None = None,
    trajectories: Sequence[int] | None = None,
) -> TokenScores:
    """Scores a whole batch without gradient.

    Args:
        model: causal LM with ragged attention.
        batch: what to score.
        budget: tokens per forward pass; no effect on the result beyond float rounding.
        temperature: logits are divided by it, on both sides of every ratio.
        want_entropy: also return entropies.
        centre: also return centred log-probs.
        trajectories: positions to restrict to; other tokens come back as 0.

    Returns:
        vectors (K,) float32 on the CPU.
    """
    wanted = [True, want_entropy, centre is not None]
    out = [torch.zeros(batch.index.K) if want else None for want in wanted]
    for micro in batch.microbatches(budget, trajectories):
        scores = score_microbatch(model, micro, temperature=temperature, want_entropy=want_entropy, centre=centre)
        for column, values in zip(out, scores, strict=True):
            if column is not None and values is not None:
                column[micro.tokens] = values.float().cpu()
    return TokenScores(*out)  # type: ignore[arg-type]


@torch.no_grad()
def hidden_states(model: Any, batch: Batch, *, budget: int) -> Tensor:
    """Returns (K, H): the model's last hidden state at the position that predicts each action token."""
    out: Tensor | None = None
    for micro in batch.microbatches(budget):
        hidden = run_rows(model, micro)[micro.predict_at]
        if out is None:
            out = hidden.new_zeros((batch.index.K, hidden.shape[-1]))
        out[micro.tokens.to(out.device)] = hidden[micro.slot.to(hidden.device)]
    return torch.zeros((batch.index.K, 0)) if out is None else out
