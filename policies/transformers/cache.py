"""A preallocated KV cache with one slot per live episode, kept across the episode's turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from agentrl.models.attention import sdpa

Tensor = torch.Tensor


class SlotCache:
    """Keys and values of every layer, (slots, kv_heads, length, head_dim), grown by doubling where it is too small.

    A head's tokens stand together: reading them for one new token is most of the work of sampling.
    """

    def __init__(self, layers: int, *, slots: int = 32, length: int = 256) -> None:
        self.slots, self.length = slots, length
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers

    def __len__(self) -> int:
        """Number of layers."""
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """Memory of all keys and values."""
        return sum(layer.nbytes for store in (self._keys, self._values) for layer in store if layer is not None)

    def reserve(self, slots: int, length: int) -> None:
        """Makes room for `slots` episodes of `length` tokens; what is cached stays."""
        if slots <= self.slots and length <= self.length:
            return
        while self.slots < slots:
            self.slots *= 2
        while self.length < length:
            self.length *= 2
        for store in (self._keys, self._values):
            for layer, old in enumerate(store):
                if old is not None:
                    new = old.new_zeros((self.slots, old.shape[1], self.length, old.shape[3]))
                    new[: old.shape[0], :, : old.shape[2]] = old
                    store[layer] = new

    def write(self, layer: int, slot: Tensor, position: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (T, kv_heads, head_dim) at (slot, position) and returns the layer's whole stores."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            shape = (self.slots, key.shape[1], self.length, key.shape[2])
            keys = self._keys[layer] = key.new_zeros(shape)
            values = self._values[layer] = value.new_zeros(shape)
        keys[slot, :, position] = key
        values[slot, :, position] = value
        return keys, values

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Gives `targets` the first `length` tokens of slot `source`."""
        self.reserve(max(targets) + 1, length)
        for store in (self._keys, self._values):
            for layer in store:
                assert layer is not None  # `source` has been written
                for target in targets:
                    layer[target, :, :length] = layer[source, :, :length]

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchanges the first `length` tokens of two slots."""
        length = min(length, self.length)
        for store in (self._keys, self._values):
            for layer in store:
                if layer is not None:
                    kept = layer[a, :, :length].clone()
                    layer[a, :, :length] = layer[b, :, :length]
                    layer[b, :, :length] = kept


@dataclass(slots=True)
class _Run:
    """Sequences of one forward pass that stand together and have the same number of new tokens."""

    count: int
    new: int
    where: slice | Tensor | None
    """Their slots; None where nothing is cached yet."""
    longest: int
    """Tokens of the longest, new ones included."""
    mask: Tensor | None
    """(count, 1, new, longest): what each new token sees, as booleans, then as what is added to the scores."""


class SlotPlan:
    """Which new tokens go to which slots in one forward pass: `RaggedPlan` for sampling.

    Args:
        cache: where keys and values live.
        slots: slot of each sequence.
        past: tokens of each sequence that are cached already.
        new: tokens of each sequence in this pass; sequences with equal `new` should stand together.
        device: of the model.
    """

    def __init__(
        self, cache: SlotCache, slots: Sequence[int], past: Sequence[int], new: Sequence[int], device: str
    ) -> None:
        self.cache = cache
        cache.reserve(max(slots) + 1, max(p + n for p, n in zip(past, new, strict=True)))
        self.slot, self.positions = (torch.tensor(x, device=device) for x in (slots, past))
        if max(new) > 1:
            total, length = sum(new), torch.tensor(new, device=device)
            inside = torch.arange(total, device=device) - _repeat(length.cumsum(0) - length, length, total)
            self.slot = _repeat(self.slot, length, total)
            self.positions = _repeat(self.positions, length, total) + inside
        self._runs = [self._run(first, last, slots, past, new, device) for first, last in _equal_runs(new)]

    def _run(
        self, first: int, last: int, slots: Sequence[int], past: Sequence[int], new: Sequence[int], device: str
    ) -> _Run:
        n, mine, before = new[first], slots[first:last], past[first:last]
        longest = max(before) + n
        if max(before) == 0:
            return _Run(last - first, n, None, longest, None)
        consecutive = list(range(mine[0], mine[0] + len(mine))) == list(mine)
        where = slice(mine[0], mine[0] + len(mine)) if consecutive else torch.tensor(mine, device=device)
        if n == 1 and min(before) == max(before):
            return _Run(last - first, n, where, longest, None)
        query_at = torch.tensor(before, device=device)[:, None] + torch.arange(n, device=device)
        mask = torch.arange(longest, device=device) <= query_at[:, :, None]
        return _Run(last - first, n, where, longest, mask[:, None])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self.cache.write(layer, self.slot, self.positions, key, value)
        parts, start = [], 0
        for run in self._runs:
            tokens = slice(start, start + run.count * run.new)
            start = tokens.stop
            q = query[tokens].unflatten(0, (run.count, run.new)).transpose(1, 2)
            if run.where is None:
                k, v = (x[tokens].unflatten(0, (run.count, run.new)).transpose(1, 2) for x in (key, value))
                out = sdpa(q, k, v, scale, causal=True)
            else:
                if run.mask is not None and run.mask.dtype == torch.bool:
                    # Once for all layers: SDPA would do it in each.
                    run.mask = torch.zeros_like(run.mask, dtype=q.dtype).masked_fill_(~run.mask, -torch.inf)
                k, v = (_rows(x[:, :, : run.longest], run.where) for x in (keys, values))
                out = sdpa(q, k, v, scale, mask=run.mask)
            parts.append(out.transpose(1, 2).flatten(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _repeat(values: Tensor, times: Tensor, total: int) -> Tensor:
    # Told the total, a GPU need not wait for it.
    return values.repeat_interleave(times, output_size=total)


def _rows(store: Tensor, where: slice | Tensor) -> Tensor:
    # On a CPU `index_select` is several times as fast as indexing with a tensor.
    return store[where] if isinstance(where, slice) else store.index_select(0, where)


def _equal_runs(values: Sequence[int]) -> list[tuple[int, int]]:
    bounds = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return list(pairwise(bounds))
