"""Attention on a CPU over sequences that begin alike, exact, forward and backward.

The tokens of a micro-batch are the nodes of a forest in depth-first order: what several sequences begin with stands
once, then what follows it in each. A token attends causally to its own node and to every node above. Those are
softmaxes over parts of its keys, which their log-sum-exps l join to the whole one:

    l = log(exp l_1 + exp l_2)        out = exp(l_1 - l) out_1 + exp(l_2 - l) out_2

so that all that stands below a node attends to it in one call, whose keys and values are never copied. Backwards the
flash kernel needs of its forward pass only out and l, from which it has the probabilities exp(s - l) and their
derivatives: given the *joint* out and l, it returns what each part contributes to the gradient (as ring attention does,
arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

Tensor = torch.Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_GROUPS_HEADS = torch.torch_version.TorchVersion(torch.__version__) >= "2.9"
"""Whether the kernel reads one key head for several query heads."""


@dataclass(frozen=True)
class TokenTree:
    """Which token attends to which, among sequences that begin alike: `RaggedPlan` for scoring and training on a CPU.

    `nodes`: per node, in depth-first order, its tokens and the tokens of all nodes below it. Sequences that share
    nothing are nodes with nothing below.
    """

    nodes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> TokenTree:
        """Returns the plan of whole sequences that share nothing."""
        return cls(tuple((length, 0) for length in lengths))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Returns (T, heads, D) from query (T, heads, D) and key, value (T, kv_heads, D)."""
        if not _GROUPS_HEADS and key.shape[1] != query.shape[1]:
            key, value = repeat_heads(query, key, value)
        out: Tensor = _Attend.apply(query, key, value, self, scale)  # type: ignore[no-untyped-call]
        return out

    @cached_property
    def runs(self) -> list[tuple[slice, int]]:
        """(tokens, nodes): runs of equally long nodes, which attend to themselves in one call. In the order `order`."""
        lengths = [self.nodes[i][0] for i in self._by_length]
        return [(slice(at, at + count * length), count) for at, count, length in runs_of(lengths) if length]

    @cached_property
    def order(self) -> Tensor | None:
        """(T,) the tokens with equally long nodes side by side; None where they stand so already."""
        if self._by_length == sorted(self._by_length):
            return None
        starts = [0, *accumulate(length for length, _ in self.nodes)]
        spans = [torch.arange(starts[i], starts[i] + self.nodes[i][0]) for i in self._by_length]
        return torch.cat(spans)

    @cached_property
    def _by_length(self) -> list[int]:
        lengths = [length for length, _ in self.nodes]
        together = len(runs_of(lengths)) == len(set(lengths))
        return list(range(len(lengths))) if together else sorted(range(len(lengths)), key=lengths.__getitem__)

    @cached_property
    def above(self) -> list[tuple[slice, slice]]:
        """(a node's tokens, those of all nodes below it) of each node that has any below."""
        starts = accumulate((length for length, _ in self.nodes), initial=0)
        return [
            (slice(at, at + length), slice(at + length, at + length + below))
            for at, (length, below) in zip(starts, self.nodes, strict=False)
            if below and length
        ]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: TokenTree, scale: float) -> Tensor:
        order = tree.order
        sides = [query, key, value] if order is None else [x.index_select(0, order) for x in (query, key, value)]
        outs, sums = [], []
        for part, count in tree.runs:
            found, total = _forward(*(_batched(x[part], count) for x in sides), 0.0, True, scale=scale)
            outs.append(found.transpose(1, 2).flatten(0, 1))
            sums.append(total.transpose(1, 2).flatten(0, 1))
        out, lse = torch.cat(outs), torch.cat(sums)
        if order is not None:
            out, lse = (torch.empty_like(x).index_copy_(0, order, x) for x in (out, lse))
        for node, below in tree.above:
            inputs = (_batched(x) for x in (query[below], key[node], value[node]))
            found, total = _forward(*inputs, 0.0, False, scale=scale)
            _join(_batched(out[below]), _batched(lse[below]), found, total)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tree, ctx.scale = tree, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = saved = ctx.saved_tensors
        tree, order = ctx.tree, ctx.tree.order
        sides = [grad, *saved] if order is None else [x.index_select(0, order) for x in (grad, *saved)]
        parts: list[list[Tensor]] = []
        for part, count in tree.runs:
            found = _backward(*(_batched(x[part], count) for x in sides), 0.0, True, scale=ctx.scale)
            parts.append([x.transpose(1, 2).flatten(0, 1) for x in found])
        grads = [torch.cat(column) for column in zip(*parts, strict=True)]
        if order is not None:
            grads = [torch.empty_like(x).index_copy_(0, order, x) for x in grads]
        for node, below in tree.above:
            inputs = (grad[below], query[below], key[node], value[node], out[below], lse[below])
            found = _backward(*map(_batched, inputs), 0.0, False, scale=ctx.scale)
            for whole, place, more in zip(grads, (below, node, node), found, strict=True):
                _batched(whole[place]).add_(more)
        return (*grads, None, None)


def _join(out: Tensor, lse: Tensor, other: Tensor, total: Tensor) -> None:
    """Makes of `out` and `lse`, over some keys, what they are over those of `other` and `total` as well."""
    joint = torch.logaddexp(lse, total)
    share = (total - joint).exp_()[..., None].to(out.dtype)
    out += share * (other - out)
    lse.copy_(joint)


def _batched(x: Tensor, count: int = 1) -> Tensor:
    """(count * L, heads, ...) -> (count, heads, L, ...), as the kernel wants it."""
    out: Tensor = x.unflatten(0, (count, -1)).transpose(1, 2)
    return out


def repeat_heads(query: Tensor, *stores: Tensor) -> list[Tensor]:
    """Repeats the heads (dimension 1) of keys and values until there are as many as the query has."""
    return [x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in stores]


def runs_of(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Returns (first token, number of sequences, length) of each run of equal length."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for length in lengths:
        if runs and runs[-1][2] == length:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, length)
        else:
            runs.append((start, 1, length))
        start += length
    return runs
