"""`TransformersPolicy`: the in-process engine."""

from __future__ import annotations

import asyncio
import ctypes
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch

from agentrl.errors import PolicyFailure, UserError
from agentrl.models.attention import WORTH_TRIMMING, check_ragged
from agentrl.models.chat import ChatCodec
from agentrl.models.load import fingerprint, load_model, load_tokenizer
from agentrl.models.vision import check_visual, reader_of
from agentrl.policy import ModelPolicy, PolicyAction, PolicyRequest
from policies.transformers.sampler import Aborted, Sampler, to_action

_trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
"""Hands freed memory back (glibc): what the engine's thread has freed is of no use to the trainer's tensors."""


class TransformersPolicy(ModelPolicy):
    """A causal LM sampled in this process.

    Args:
        model: a model directory or hub name, or a loaded model (then `tokenizer` too): the trainer passes its own, and
            weight sync costs nothing.
        tokenizer: for a loaded model.
        dtype: ``float32`` or ``bfloat16``.
        device: e.g. ``cpu``, ``cuda``.
        threads: torch threads on a CPU; None leaves the setting alone.
        prefill_budget: new tokens per forward pass.

    Raises:
        ModelError: the directory lacks something; the message says what and how to set it.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        tokenizer: Any = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str = "cpu",
        threads: int | None = None,
        prefill_budget: int = 16384,
    ) -> None:
        if model is None or model == "":
            raise UserError("the transformers policy needs a model: give a directory (--model DIR, or model.path=DIR)")
        if threads is not None:
            torch.set_num_threads(threads)
        if isinstance(model, str) or hasattr(model, "__fspath__"):
            self.name = str(model)
            tokenizer = load_tokenizer(model)
            model = load_model(model, dtype=dtype, device=device)
        else:
            self.name = "transformers"
        check_ragged(model)
        if (reader := reader_of(model)) is not None:
            check_visual(model)
        self.model = model
        self.tokenizer = tokenizer
        self.chat = ChatCodec(tokenizer, images=reader)
        self.version = 0
        self.sampler = Sampler(model, self.chat.stop_ids, prefill_budget=prefill_budget)
        # One thread: the engine answers one batch at a time, while environments go on in the event loop.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampler")
        self._released: deque[str] = deque()
        self._running = threading.Event()
        """Abort event of the call that the engine is working on."""

    async def act(self, requests: Sequence[PolicyRequest]) -> list[PolicyAction]:
        # Each call has its own: the next one must not clear it before the engine has noticed.
        abort = threading.Event()
        future = self._thread.submit(self._act, list(requests), abort)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            abort.set()
            raise
        except Aborted:
            raise PolicyFailure("the transformers policy was closed while it was sampling") from None

    def _act(self, requests: list[PolicyRequest], abort: threading.Event) -> list[PolicyAction]:
        self._running = abort
        while self._released:
            self.sampler.release(self._released.popleft())
        for request in requests:
            if not request.context_ids:
                raise PolicyFailure(f"episode {request.episode}: the transformers policy got no context ids")
        answers = self.sampler.sample(requests, abort)
        return [to_action(self.chat, *answer, self.version) for answer in answers]

    def release(self, episode: str) -> None:
        self._released.append(episode)

    def rest(self) -> None:
        # On the engine's thread: a call that was cancelled may still be at work.
        self._thread.submit(self._rest).result()

    def _rest(self) -> None:
        freed = self.sampler.cache.nbytes
        self.sampler.forget()
        if _trim_heap is not None and freed >= WORTH_TRIMMING:
            _trim_heap(0)

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        own = self.model.state_dict()
        if unknown := sorted(set(weights) - set(own)):
            raise UserError(f"weights that {type(self.model).__name__} does not have: {', '.join(unknown[:3])}")
        with torch.no_grad():
            for name, tensor in weights.items():
                if tensor.data_ptr() != own[name].data_ptr():
                    own[name].copy_(tensor)
        self.sampler.forget()
        self.version = version

    def fingerprint(self) -> str:
        return fingerprint(self.model)

    async def aclose(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._running.set()
