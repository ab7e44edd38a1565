"""Weights from GPU to GPU, through vLLM's own back ends: CUDA IPC on one GPU, NCCL between two.

Written to vLLM 0.32's interface and not run yet: it needs a GPU. `fingerprint` and the canary check each transfer, as
everywhere; ``transfer=file`` works on GPUs too.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLWeightTransferEngine

from policies.vllm.worker import Recorded

Post = Callable[[str, Any], Any]


class IPCEngine(Recorded, IPCWeightTransferEngine):
    """Receives handles of the trainer's tensors on the same GPU."""


class NCCLEngine(Recorded, NCCLWeightTransferEngine):
    """Receives a broadcast."""


class _Source(WeightSource):
    """The trainer's weights of the moment."""

    def __init__(self) -> None:
        self.weights: Mapping[str, torch.Tensor] = {}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.weights.items())


class _Client(HTTPVLLMWeightSyncClient):
    """vLLM's client over our connection; ends an update with its version."""

    def __init__(self, post: Post) -> None:
        super().__init__("")
        self.post, self.version = post, 0

    def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
        self.post(f"/{path}", json)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        super().finish_weight_update(weight_version or str(self.version))


class Sender:
    """The trainer's side of a transfer.

    Args:
        kind: ``ipc`` or ``nccl``.
        post: ``(path, JSON body)`` to the server.
        workers: number of the engine's GPUs.
        weights: to start with.
    """

    def __init__(
        self, kind: Literal["ipc", "nccl"], post: Post, workers: int, weights: Mapping[str, torch.Tensor]
    ) -> None:
        self._client, self._source = _Client(post), _Source()
        self._source.weights = weights
        if kind == "ipc":
            info: Any = IPCTrainerInitInfo(rank=0)
        else:
            info = NCCLTrainerInitInfo(
                rank=0, master_address="127.0.0.1", master_port=_free_port(), world_size=1 + workers
            )
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self._source)

    def send(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """One whole update."""
        self._source.weights, self._client.version = weights, version
        self._engine.send_weights()

    def close(self) -> None:
        """Ends the communicator."""
        self._engine.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
