"""The memory that a run will take, by what holds it; `benchmarks/explain_check.py` compares it with real runs'."""

from __future__ import annotations

from collections.abc import Sequence

from agentrl.config import RunConfig
from agentrl.train.estimate import Item, Shape, Work, models_of

ADAM_BYTES = 8
"""Two float32 moments for each trained parameter."""
ADAPTERS = 7
"""Linear layers of a decoder layer, each with an adapter."""
HELD, HELD_ADAPTER = 0.2, 0.45
"""Gaps between live tensors that glibc's allocator keeps, as a share of what an update computes with, for each trained
model. Fitted to real runs, not derived: that adapters leave more was seen, why is a guess (their many narrow tensors
cut up the gaps that a wide one would have fitted). docs/results has shapes that it was not fitted to."""


def memory(config: RunConfig, shape: Shape, work: Work) -> list[Item]:
    """Returns the peak memory of a run by what holds it, in bytes.

    With P parameters, p trained ones (P, or those of a LoRA adapter of rank r), T = min(token budget, tokens of a
    batch) less what its rows share, L layers, and b = 4 bytes (float32) or 2 (bfloat16 autocast):

        weights       4 P for each model (with LoRA b P for the one base, 4 p for each adapter); the policy's engine is
                      the trainer's own model and takes nothing more
        moments       8 p for each trained model (AdamW)
        gradients     4 p: one model is updated at a time
        activations   T x (L x layer + final norm): what a backward pass keeps, see `layer_bytes`. With bfloat16 the
                      cast weights as well, 2 p
        backward      T x (3 I + 2 H) x b: the gradients that are on their way through one layer's MLP
        logits        3 x 4 bytes x min(action tokens of the budget x V, chunk): never more than a chunk
        step          4 p on a GPU, where AdamW works on all tensors at once, when activations are gone; the largest of
                      these counts. On a CPU it takes one tensor at a time: nothing worth naming
        save          4 P with LoRA: the adapter merged into a copy of the base, when activations are gone
        kv cache      2 x L x KV x b x slots x length, while sampling, and given back before the update, so that the
                      largest of these counts. Slots and length double from 32 and 256 until all episodes that are
                      alive and the longest context fit
        allocator     on a CPU, `HELD` x trained models x (activations + backward): freed blocks below 32 MB that glibc
                      keeps; and a kv cache of less than 128 MB, whose pages are not handed back. With
                      ``MALLOC_MMAP_THRESHOLD_=65536`` it is gone, at a page fault for each page of each tensor.
                      Likely, not shown: micro-batches differ in size, and tensors of the next one do not fit the gaps
                      of the last. On a GPU torch's caching allocator may hold some too: how much was not measured, and
                      is left out

    H, Q, KV, I are the widths of the hidden state, all query heads, all key-value heads and the MLP. Python, torch and
    the tokenizer come on top: about 0.5 GB of a process on a CPU.
    """
    from agentrl.batch.scoring import GPU_LOGIT_BUDGET, LOGIT_BUDGET
    from agentrl.models.attention import WORTH_TRIMMING

    others = models_of(config)
    trained = 1 + sum(others.values())
    P, rank = shape.parameters, config.lora.rank
    p = _adapter(shape, rank) if rank else P
    b = 2 if config.model.dtype == "bfloat16" else 4
    gpu = config.model.device != "cpu"
    budget = min(config.policy_update.tokens_per_microbatch, work.rows) * work.read / max(work.rows, 1.0)
    alive = min(config.rollout.concurrency, work.episodes)
    if rank:
        weights = b * P + 4 * p * trained
        how = f"one base of {P:,} parameters and {trained} adapters of {p:,}"
    else:
        weights = 4 * P * (1 + len(others))
        how = ", ".join(["policy", *others]) + f": {P:,} float32 parameters each"
    final_norm = (4 if rank else 12) * shape.hidden
    cast = b * p if b == 2 else 0
    activations = budget * (shape.layers * layer_bytes(shape, rank, b) + final_norm) + cast
    backward = budget * (3 * shape.mlp + 2 * shape.hidden) * b
    share = work.sampled / max(work.read, 1.0)
    logits = 12 * min(budget * share * shape.vocab, GPU_LOGIT_BUDGET if gpu else LOGIT_BUDGET)
    slots, length = _doubled(32, alive), _doubled(256, work.context)
    cache = 2 * shape.layers * shape.kv_width * b * slots * length
    items = [
        Item("weights", weights, how),
        Item("optimiser", ADAM_BYTES * p * trained, f"AdamW's moments of {trained} trained models"),
        Item("gradients", 4 * p, "of the model that is being updated"),
        Item("activations", activations, f"what a micro-batch of {budget:,.0f} tokens keeps for its backward pass"),
        Item("backward", backward, "gradients on their way through one layer"),
        Item("logits", logits, "one chunk, at action positions only"),
    ]
    if rank:
        items.append(Item("save", 4 * P, "the adapter merged into a copy of the base, when activations are gone"))
    if gpu:
        items.append(Item("step", 4 * p, "AdamW's, when activations are gone"))
    else:
        held = (HELD_ADAPTER if rank else HELD) * trained * (activations + backward)
        held += cache if cache < WORTH_TRIMMING else 0
        caution = "; with adapters up to 2.7 x this was measured" if rank else ""
        items.append(
            Item("allocator", held, f"gaps between tensors, which glibc keeps (MALLOC_MMAP_THRESHOLD_){caution}")
        )
    room = f"{slots:,} slots of {length:,} tokens for {alive:,} episodes of up to {work.context:,.0f}, while sampling"
    return [*items, Item("kv cache", cache, room)]


def peak(items: Sequence[Item]) -> float:
    """Returns the bytes that are held at once: sampling, backward pass, optimiser step and saving take turns."""
    parts = {item.name: item.value for item in items}
    step = parts["gradients"] + parts.get("step", 0.0)
    passes = sum(parts.get(name, 0.0) for name in ("gradients", "activations", "backward", "logits", "allocator"))
    return parts["weights"] + parts["optimiser"] + max(passes, step, parts.get("save", 0.0), parts["kv cache"])


def layer_bytes(shape: Shape, rank: int, b: int) -> int:
    """Returns the bytes that one decoder layer keeps of each token for its backward pass.

    Counted with `torch.autograd.graph.saved_tensors_hooks` on ragged rows of Llama and Qwen3, exact in float32 and
    bfloat16, with and without adapters. A frozen norm keeps its input alone, in float32; a trained one also what it
    scales. Linear layers keep their inputs (autocast makes a copy for each, as the hidden state is float32), attention
    queries, keys, values and its output (adapters under autocast cast a copy), and a number per head, left out here;
    the MLP four products.
    """
    full = not rank
    two_norms = 2 * (4 + 4 * full) * shape.hidden + 8
    inputs = (5 if b == 2 else 2) * b * shape.hidden
    attention = b * ((2 if full or b == 4 else 3) * shape.heads_width + 2 * shape.kv_width)
    head_norms = (4 + b * full) * (shape.heads_width + shape.kv_width) if shape.head_norms else 0
    return two_norms + inputs + attention + head_norms + 4 * b * shape.mlp + ADAPTERS * b * rank


def _doubled(start: int, wanted: float) -> int:
    while start < wanted:
        start *= 2
    return start


def _adapter(shape: Shape, rank: int) -> int:
    widths = [
        (shape.hidden, shape.heads_width),
        *[(shape.hidden, shape.kv_width)] * 2,
        (shape.heads_width, shape.hidden),
        *[(shape.hidden, shape.mlp)] * 2,
        (shape.mlp, shape.hidden),
    ]
    return shape.layers * rank * sum(into + out for into, out in widths)
