"""The batched sampler: ragged prefill of what is new, then one token a step for every action still open.

* Only new tokens are prefilled: an episode's slot keeps the keys and values of the context it has already read, and a
  long context with which several episodes begin (the members of a group: the same prompt) is read once for all.
* The log-prob returned is that of the distribution truly sampled from (after temperature, top-k and top-p).
* Each action has its own counter-based random stream: the same seed, weights and context give the same action whatever
  else is in the batch (up to float rounding, which on a CPU is reproducible for the same batch).
* A token is drawn by inverting the cumulative distribution: at this size `torch.multinomial` is a third of the time.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from agentrl.models.attention import WORTH_SHARING, lm_logits, precision, run_ragged
from agentrl.models.vision import rope_positions, run_visual
from agentrl.policy import PolicyAction, PolicyRequest
from policies.transformers.cache import SlotCache, SlotPlan

Tensor = torch.Tensor


class Aborted(Exception):
    """The caller no longer wants the answer (deadline, cancellation)."""


class Sampler:
    """Draws actions from a causal LM loaded with ragged attention.

    Args:
        model: the model; read at every call, so that weights updated in place are used at once.
        stop_ids: ids that end an action.
        prefill_budget: new tokens per forward pass while prefilling.
    """

    def __init__(self, model: Any, stop_ids: frozenset[int], *, prefill_budget: int = 16384) -> None:
        self.model = model
        self.stop_ids = stop_ids
        self.prefill_budget = prefill_budget
        self.device = str(model.get_input_embeddings().weight.device)
        self.cache = SlotCache(model.config.get_text_config().num_hidden_layers)
        self._slot: dict[str, int] = {}
        self._cached: dict[str, list[int]] = {}
        self._free: list[int] = []
        self.prefilled_tokens = 0
        self.sampled_tokens = 0

    def release(self, episode: str) -> None:
        """Gives the episode's slot back."""
        slot = self._slot.pop(episode, None)
        self._cached.pop(episode, None)
        if slot is not None:
            self._free.append(slot)
            self._free.sort(reverse=True)

    def forget(self) -> None:
        """Drops all cached keys and values, and gives their memory back."""
        self._cached.clear()
        self.cache = SlotCache(len(self.cache))

    @torch.inference_mode()  # a tenth faster than no_grad: small operations skip autograd's bookkeeping
    def sample(
        self, requests: Sequence[PolicyRequest], abort: threading.Event | None = None
    ) -> list[tuple[list[int], list[float], bool]]:
        """Returns (ids, log-probs, stopped) per request, in order; `stopped` is False where the token limit cut in.

        Raises:
            Aborted: `abort` was set meanwhile.
        """
        with precision(self.model):
            return self._sample(requests, abort or threading.Event())

    def _sample(
        self, requests: Sequence[PolicyRequest], abort: threading.Event
    ) -> list[tuple[list[int], list[float], bool]]:
        draw = _Draw(requests, self.device)
        slots = [self._slot_of(request.episode) for request in requests]
        logits = self._prefill(requests, slots, abort)
        ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        limit = [request.sampling.max_new_tokens for request in requests]
        length = [len(request.context_ids or ()) for request in requests]
        shift = self._shift(requests)
        open_ = list(range(len(requests)))
        for step in range(max(limit)):
            tokens, logps = draw(logits, open_, step)
            for i, token, logp in zip(open_, tokens, logps, strict=True):
                ids[i].append(token)
                logprobs[i].append(logp)
            open_ = [i for i in open_ if ids[i][-1] not in self.stop_ids and step + 1 < limit[i]]
            if not open_:
                break
            if abort.is_set():
                raise Aborted
            open_ = self._close_ranks(open_, [requests[i].episode for i in open_], max(length) + step)
            slots = [self._slot[requests[i].episode] for i in open_]
            plan = SlotPlan(self.cache, slots, [length[i] + step for i in open_], [1] * len(open_), self.device)
            last = torch.tensor([ids[i][-1] for i in open_], device=self.device)
            positions = plan.positions if shift is None else plan.positions + shift[open_]
            logits = lm_logits(self.model, run_ragged(self.model, last, positions, plan))
        for request, new in zip(requests, ids, strict=True):
            # The last sampled token has no keys yet: it is prefilled with the next turn's observation.
            self._cached[request.episode] = [*_keys(request), *new[:-1]]
            self.sampled_tokens += len(new)
        return [(i, p, i[-1] in self.stop_ids) for i, p in zip(ids, logprobs, strict=True)]

    def _slot_of(self, episode: str) -> int:
        if episode not in self._slot:
            self._slot[episode] = self._free.pop() if self._free else len(self._slot)
        return self._slot[episode]

    def _close_ranks(self, rows: list[int], episodes: Sequence[str], longest: int) -> list[int]:
        """Lets the slots of `episodes` stand together, so that their keys and values need not be copied in each step.

        Args:
            rows: what to sort. episodes: of each. longest: no more tokens are cached of any of them.

        Returns:
            `rows` in the order of the slots.
        """
        row_at = {self._slot[episode]: row for episode, row in zip(episodes, rows, strict=True)}
        first, count = min(row_at), len(rows)
        if max(row_at) - first >= count:
            used = max(longest, *map(len, self._cached.values()), 0)
            owner = {slot: episode for episode, slot in self._slot.items()}
            holes = [slot for slot in range(count) if slot not in row_at]
            for hole, far in zip(holes, [slot for slot in row_at if slot >= count], strict=True):
                self.cache.swap(hole, far, used)
                self._slot[owner[far]] = hole
                row_at[hole] = row_at.pop(far)
                if hole in owner:
                    self._slot[owner[hole]] = far
                else:
                    self._free[self._free.index(hole)] = far
            self._free.sort(reverse=True)
        return [row_at[slot] for slot in sorted(row_at)]

    def _prefill(self, requests: Sequence[PolicyRequest], slots: list[int], abort: threading.Event) -> Tensor:
        """Reads every request's new context tokens; returns the logits (n, V) after each last one."""
        past, new = [], []
        for request in requests:
            context = request.context_ids or []
            shared = _common_prefix(self._cached.get(request.episode, []), _keys(request))
            # At least one token must be read to have logits.
            past.append(min(shared, len(context) - 1))
            new.append(context[past[-1] :])
            self._cached.pop(request.episode, None)
        twins = _twins(requests, past)
        alike = {i for copies in twins.values() for i in copies}
        order = sorted(set(range(len(requests))) - alike, key=lambda i: (len(new[i]), slots[i]))
        out: Tensor | None = None
        start = 0
        while start < len(order):
            if abort.is_set():
                raise Aborted
            stop, size = start, 0
            while stop < len(order) and (stop == start or size + len(new[order[stop]]) <= self.prefill_budget):
                size += len(new[order[stop]])
                stop += 1
            part = order[start:stop]
            counts = [len(new[i]) for i in part]
            plan = SlotPlan(self.cache, [slots[i] for i in part], [past[i] for i in part], counts, self.device)
            flat = torch.tensor([token for i in part for token in new[i]], device=self.device)
            read = [(requests[i], past[i]) for i in part]
            if any(request.context_images for request, _ in read):
                hidden = self._see(flat, plan, read)
            else:
                hidden = run_ragged(self.model, flat, plan.positions, plan)
            ends = torch.tensor(counts, device=self.device).cumsum(0) - 1
            logits = lm_logits(self.model, hidden[ends])
            if out is None:
                out = logits.new_empty((len(requests), logits.shape[-1]))
            out[torch.tensor(part, device=self.device)] = logits
            self.prefilled_tokens += size
            start = stop
        assert out is not None
        for first, copies in twins.items():
            self.cache.copy(slots[first], [slots[i] for i in copies], len(new[first]))
            out[copies] = out[first].clone()
        return out

    def _see(self, flat: Tensor, plan: SlotPlan, read: Sequence[tuple[PolicyRequest, int]]) -> Tensor:
        """One pass over the new tokens of requests with pictures; `read`: each with its number of cached tokens."""
        positions, spans, offset = [], [], 0
        for request, past in read:
            ids = request.context_ids or []
            positions.append(rope_positions(self.model, ids, request.context_images)[:, past:])
            spans += [span.moved(offset - past) for span in request.context_images if span.start >= past]
            offset += len(ids) - past
        return run_visual(self.model, flat, torch.cat(positions, dim=1), plan, spans)

    def _shift(self, requests: Sequence[PolicyRequest]) -> Tensor | None:
        """(n,) what sampled tokens' rotary positions have over their places; None without pictures."""
        if not any(request.context_images for request in requests):
            return None
        last = [
            int(rope_positions(self.model, request.context_ids or [], request.context_images)[:, -1].max()) + 1
            for request in requests
        ]
        places = [len(request.context_ids or ()) for request in requests]
        return torch.tensor(last, device=self.device) - torch.tensor(places, device=self.device)


class _Draw:
    """Turns logits into tokens, request by request settings and random streams."""

    def __init__(self, requests: Sequence[PolicyRequest], device: str) -> None:
        sampling = [request.sampling for request in requests]
        self.device = device
        self.seeds = np.array([request.seed % 2**64 for request in requests], dtype=np.uint64)
        self.temperature = torch.tensor([s.temperature for s in sampling], device=device)
        self.top_k = torch.tensor([s.top_k for s in sampling], device=device)
        self.top_p = torch.tensor([s.top_p for s in sampling], device=device)
        self.greedy = all(s.temperature == 0 for s in sampling)
        self.plain = all(s.temperature == 1 for s in sampling)
        self.truncates = any(s.top_k > 0 or s.top_p < 1 for s in sampling)

    def __call__(self, logits: Tensor, rows: list[int], step: int) -> tuple[list[int], list[float]]:
        """Draws one token for each of `rows`; logits (len(rows), V)."""
        if self.greedy:
            return logits.argmax(-1).tolist(), [0.0] * len(rows)
        at = torch.tensor(rows, device=self.device)
        temperature = self.temperature[at, None]
        if not self.plain:
            logits = logits / torch.where(temperature == 0, 1.0, temperature)
        logp = torch.log_softmax(logits, dim=-1)
        if self.truncates:
            logp = truncate(logp, self.top_k[at], self.top_p[at])
        cdf = logp.double().exp().cumsum(-1)
        u = torch.from_numpy(uniforms(self.seeds[rows], step)).to(self.device)
        target = torch.minimum(u * cdf[:, -1], cdf[:, -1].nextafter(cdf.new_zeros(())))
        # NaN logits end at the last token, with a NaN log-prob: whoever reads it says so.
        token = torch.searchsorted(cdf, target[:, None], right=True)[:, 0].clamp(max=cdf.shape[-1] - 1)
        chosen = logp.gather(-1, token[:, None])[:, 0]
        if not self.plain:
            greedy = temperature[:, 0] == 0
            token = torch.where(greedy, logits.argmax(-1), token)
            chosen = torch.where(greedy, 0.0, chosen)
        return token.tolist(), chosen.tolist()


def truncate(logp: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keeps each row's top-k tokens, of these the smallest set with mass top_p, and renormalises.

    Args:
        logp: (n, V) log-probs. top_k: (n,) int64, 0 = off. top_p: (n,), 1 = off.

    Returns:
        (n, V) log-probs of the truncated distribution, -inf where a token is out.
    """
    ordered, order = logp.sort(dim=-1, descending=True)
    rank = torch.arange(logp.shape[-1], device=logp.device)
    keep = (top_k[:, None] == 0) | (rank < top_k[:, None])
    p = ordered.exp() * keep
    p = p / p.sum(-1, keepdim=True)
    # A token stays while the mass before it is below top_p: the first one always does.
    keep &= (top_p[:, None] >= 1) | (p.cumsum(-1) - p < top_p[:, None])
    kept = torch.zeros_like(keep).scatter(-1, order, keep)
    return torch.log_softmax(logp.masked_fill(~kept, -torch.inf), dim=-1)


def uniforms(seeds: np.ndarray, counter: int) -> np.ndarray:
    """Returns one uniform in [0, 1) per seed: SplitMix64 of seed and counter (Steele et al. 2014), 53 bits."""
    with np.errstate(over="ignore"):
        z = seeds.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(counter + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _twins(requests: Sequence[PolicyRequest], past: Sequence[int]) -> dict[int, list[int]]:
    """Returns requests with nothing cached and the same context, where sharing it saves enough: first -> others."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        if past[i] == 0:
            found.setdefault(tuple(_keys(request)), []).append(i)
    return {
        first: others for keys, (first, *others) in found.items() if others and len(keys) * len(others) >= WORTH_SHARING
    }


def _keys(request: PolicyRequest) -> list[int]:
    """The ids of a context with a picture's own number for each of its placeholders, which are all the same id."""
    keys = list(request.context_ids or ())
    for span in request.context_images:
        # Negative numbers are no ids; one number for the whole span, so that a prefix ends before a picture or after.
        number = -1 - int(hashlib.sha256(span.image.path.encode()).hexdigest()[:15], 16)
        keys[span.start : span.start + span.length] = [number] * span.length
    return keys


def _common_prefix(a: list[int], b: list[int]) -> int:
    if len(a) <= len(b) and b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def to_action(chat: Any, ids: list[int], logprobs: list[float], stopped: bool, version: int) -> PolicyAction:
    """Wraps sampled ids as an action with its text."""
    return PolicyAction(
        text=chat.decode(ids), ids=ids, logprobs=logprobs, version=version, finish="stop" if stopped else "length"
    )
