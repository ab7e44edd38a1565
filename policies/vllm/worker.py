"""What runs inside vLLM's workers: how new weights get into a running engine. Imported by vLLM, never by the trainer.

vLLM has the frame (`WeightTransferEngineFactory`, layer-by-layer reloading) and back ends for GPUs, but none for a CPU.
Here is one that reads a file, which on a tmpfs is shared memory, and two things that each back end of ours adds:

* a fingerprint of the tensors as they arrived, to compare with the trainer's;
* tied LM heads are tied and packed again. On a CPU linear weights are packed for the matrix library. Reloading packs
  what it loads, and a tied head is not loaded: it would go on with the old weights, 2-4 nats off, and no error.

vLLM takes `WeightSync` as ``--worker-extension-cls``: importing this module registers the back ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from agentrl.models.load import Fingerprint

Weights = Iterable[tuple[str, torch.Tensor]]


def repack_heads(model: Any) -> None:
    """Ties LM heads to their embeddings again, where the model does so, and packs them from the weights they now have.

    Where nothing is packed (GPUs) the second part does nothing.
    """
    modules = list(model.modules())
    embeddings = [m for m in modules if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)]
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    for head in (m for m in modules if isinstance(m, ParallelLMHead)):
        if tied and len(embeddings) == 1:
            head.tie_weights(embeddings[0])
        head.quant_method.process_weights_after_loading(head)


class _Recorder:
    """A model that takes the fingerprint of weights on their way in."""

    def __init__(self, model: Any, receipt: Fingerprint) -> None:
        self._model, self._receipt = model, receipt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def load_weights(self, weights: Weights) -> Any:
        def seen() -> Weights:
            for name, tensor in weights:
                self._receipt.add(name, tensor)
                yield name, tensor

        return self._model.load_weights(seen())


class Recorded:
    """Mixin before a `WeightTransferEngine`: fingerprint and heads."""

    model: Any
    receipt: Fingerprint | None = None
    """Of the last weights received."""

    def start_weight_update(self) -> None:
        self.receipt = Fingerprint()
        super().start_weight_update()  # type: ignore[misc]

    def receive_weights(self, update_info: Any) -> None:
        assert self.receipt is not None
        model, self.model = self.model, _Recorder(self.model, self.receipt)
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        super().finish_weight_update()  # type: ignore[misc]
        repack_heads(self.model)


@dataclass
class FileInit(WeightTransferInitInfo):
    """The folder that weights will come from; nothing outside it is read."""

    folder: str


@dataclass
class FileUpdate(WeightTransferUpdateInfo):
    """A safetensors file in the folder, and the order of its tensors."""

    file: str
    names: list[str]


class _Reloading(WeightTransferEngine[FileInit, FileUpdate]):
    init_info_cls = FileInit
    update_info_cls = FileUpdate

    def init_transfer_engine(self, init_info: FileInit) -> None:
        self.folder = Path(init_info.folder).resolve()

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdate) -> None:
        path = (self.folder / update_info.file).resolve()
        if path.parent != self.folder:
            raise ValueError(f"{update_info.file!r} is not a file in {self.folder}")
        with safe_open(path, framework="pt", device="cpu") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in update_info.names)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Holds nothing."""


class FileEngine(Recorded, _Reloading):
    """Weights from a file."""

    def receive_tensors(self, weights: Weights) -> None:
        """Weights from this very process."""
        assert self.receipt is not None
        _Recorder(self.model, self.receipt).load_weights(weights)


class WeightSync:
    """Further methods of vLLM's worker (``--worker-extension-cls``), called through `collective_rpc`."""

    weight_transfer_engine: Any
    vllm_config: Any
    start_weight_update: Any
    finish_weight_update: Any

    def agentrl_load(self, weights: Weights) -> None:
        """Replaces the weights by tensors of this process."""
        self.start_weight_update()
        with set_current_vllm_config(self.vllm_config):
            self.weight_transfer_engine.receive_tensors(weights)
        self.finish_weight_update()

    def agentrl_fingerprint(self) -> str:
        """Fingerprint of the last weights received; empty before the first."""
        receipt = self.weight_transfer_engine.receipt
        return "" if receipt is None else receipt.hexdigest()


WeightTransferEngineFactory.register_engine("agentrl-file", FileEngine)
# By name: their modules need CUDA and are imported where they are used.
WeightTransferEngineFactory.register_engine("agentrl-ipc", "policies.vllm.gpu", "IPCEngine")
WeightTransferEngineFactory.register_engine("agentrl-nccl", "policies.vllm.gpu", "NCCLEngine")
