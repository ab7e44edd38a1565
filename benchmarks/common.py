"""What the benchmarks share: models, paired timing, peak memory, the measured peak of a device, the print-out."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from agentrl.models.attention import NAME, precision
from agentrl.models.init import PRESETS

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": PRESETS["tiny"].hidden,
        "num_hidden_layers": PRESETS["tiny"].layers,
        "num_attention_heads": PRESETS["tiny"].heads,
        "num_key_value_heads": PRESETS["tiny"].kv_heads,
        "head_dim": PRESETS["tiny"].head_dim,
        "intermediate_size": PRESETS["tiny"].mlp,
    },
    "0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 4864,
    },
    "1.5b": {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 8960,
    },
}
"""Qwen3 networks with tied embeddings: the package's own tiny one, and the shapes of Qwen2.5-0.5B and -1.5B."""


def make_model(shape: str, *, dtype: str, device: str, seed: int, attention: str = NAME) -> Any:
    """Returns a randomly initialised causal LM, trainable: float32 weights, passes in `dtype`.

    The same shape and seed give the same weights whatever the attention implementation.
    """
    torch.manual_seed(seed)
    # Logits of unit spread: neither flat nor certain.
    spread = SHAPES[shape]["hidden_size"] ** -0.5
    config = transformers.Qwen3Config(
        **SHAPES[shape], tie_word_embeddings=True, initializer_range=spread, max_position_embeddings=32_768
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if dtype == "bfloat16":
        model.compute_dtype = torch.bfloat16
    return model.to(device).eval()


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Runs `model` with another attention implementation for a while."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def generate(
    model: Any, contexts: Sequence[list[int]], limit: int, *, stop: Collection[int], pad: int, temperature: float
) -> list[list[int]]:
    """`model.generate` on left-padded contexts; returns what it added to each, up to its stop token."""
    longest = max(map(len, contexts))
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[pad] * (longest - len(c)) + c for c in contexts], device=device)
    mask = torch.tensor([[0] * (longest - len(c)) + [1] * len(c) for c in contexts], device=device)
    drawing: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with attention(model, "sdpa"), precision(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=limit,
            eos_token_id=sorted(stop) or None,
            pad_token_id=pad,
            use_cache=True,
            **drawing,
        )
    return [_upto_stop(row, stop) for row in out[:, longest:].tolist()]


def _upto_stop(ids: list[int], stop: Collection[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
    return ids[: end + 1]


def set_threads(options: argparse.Namespace) -> None:
    """Sets torch's threads: those asked for; else one for the tiny model, which a busy neighbour would slow most."""
    if options.threads is None and options.shape == "tiny":
        options.threads = 1
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def synchronise(device: str) -> None:
    """Waits for a GPU; nothing to do on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def paired(
    sides: Mapping[str, Callable[[], Any]], repeat: int, device: str
) -> dict[str, tuple[list[float], float | None]]:
    """Times the sides by turns, so that a busy machine slows all of them alike; the order turns round each time.

    Returns:
        per side the seconds of each repeat, and its peak memory in MB.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    peak: dict[str, float | None] = dict.fromkeys(sides)
    for number in range(repeat):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            memory = PeakMemory(device)
            start = time.perf_counter()
            sides[name]()
            synchronise(device)
            seconds[name].append(time.perf_counter() - start)
            if (used := memory.megabytes()) is not None:
                peak[name] = max(used, peak[name] or 0.0)
    return {name: (seconds[name], peak[name]) for name in sides}


class PeakMemory:
    """The most memory in use since this was made, above what was in use then.

    GPU: of torch's allocator. CPU: the process's resident set, by the kernel's own high-water mark (Linux).
    """

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start: int | None = torch.cuda.memory_allocated()
        else:
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # what earlier work has freed goes back to the system first
            self.start = None
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
                self.start = _resident("VmRSS")

    def now(self) -> float | None:
        """Megabytes in use at this moment, above the start; None where the system does not tell."""
        if self.start is None:
            return None
        return ((torch.cuda.memory_allocated() if self.cuda else _resident("VmRSS")) - self.start) / 2**20

    def megabytes(self) -> float | None:
        """Returns None where the system does not tell."""
        if self.start is None:
            return None
        return ((torch.cuda.max_memory_allocated() if self.cuda else _resident("VmHWM")) - self.start) / 2**20


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def matmul_peak(device: str, dtype: str) -> float:
    """Returns the floating-point operations per second of a large matrix product: what the device can really do."""
    size = 8192 if torch.device(device).type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(8):
        synchronise(device)
        start = time.perf_counter()
        a @ a
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def surroundings(device: str) -> dict[str, Any]:
    """What the figures depend on besides the code: versions, threads, device."""
    cuda = torch.device(device).type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
    }


def show(title: str, settings: Mapping[str, Any], around: Mapping[str, Any]) -> None:
    """Prints what was run, and where."""
    print(title)
    for values in (settings, around):
        print("  " + "  ".join(f"{name}={value}" for name, value in values.items()))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns, the first to the left and the others to the right."""
    width = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, width, strict=True))
            )
        )


def write_json(path: str | None, result: Mapping[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")


def command(options: argparse.Namespace, run: Callable[[argparse.Namespace], dict[str, Any]]) -> dict[str, Any]:
    """Runs a benchmark with its options and keeps the figures where they say."""
    set_threads(options)
    result = run(options)
    write_json(options.json, result)
    return result
