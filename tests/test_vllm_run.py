"""Whole runs with vLLM, one start each: ``make vllm-test``."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXTS
from test_vllm_engine import check_adapters
from toys import run_config

from agentrl.errors import UserError
from agentrl.models.init import init_model
from agentrl.train import train
from agentrl.train.metrics import read_metrics
from policies.vllm import VLLMPolicy

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make vllm-test"),
]

SMALL: dict[str, Any] = {"threads": 1, "kv_cache_gib": 0.25, "max_num_seqs": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with heads that vLLM has kernels for."""
    path = tmp_path_factory.mktemp("vllm") / "base"
    init_model(path, TEXTS, hidden=128, layers=2, heads=4)
    return path


@pytest.mark.parametrize("kind", ["local", "server"])
def test_a_run_samples_from_the_weights_it_trains(kind: str, base: Path, tmp_path: Path) -> None:
    options = {"mode": kind, **SMALL}
    run = run_config(tmp_path / "run", base, iterations=2, model__engine="vllm", model__engine_options=options)
    torch.manual_seed(0)
    train(run)
    records = [record for record in read_metrics(tmp_path / "run") if "policy_loss" in record]
    assert len(records) == 2
    assert all(record["logprob_mismatch"] < 1e-4 for record in records)


def test_adapters_are_swapped_in_this_process_too(base: Path) -> None:
    policy = VLLMPolicy(str(base), mode="local", lora_rank=8, **SMALL)
    try:
        with pytest.raises(UserError, match="a vLLM engine in this process already"):
            VLLMPolicy(str(base), mode="local", **SMALL)
        check_adapters(policy, base)
    finally:
        asyncio.run(policy.aclose())


def test_too_little_memory_is_refused_with_the_way_to_mend_it(base: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)vLLM cannot start with.*kv_cache_gib"):
        VLLMPolicy(str(base), mode="local", **{**SMALL, "kv_cache_gib": 1e-3})
