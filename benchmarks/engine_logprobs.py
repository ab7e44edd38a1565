"""Do the log-probs that an engine records while sampling agree with the trainer's? On a real model, at temperature 1.

    python benchmarks/engine_logprobs.py --model models/smollm2-135m --json engine_logprobs.json

Each engine plays the same tasks; every sampled token is then scored by the trainer's forward pass (float32). vLLM has
to be in the environment of this command (`make vllm-test` makes one: ``.venv-vllm/bin/python``), or is left out with
``--engines transformers``.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

import torch
from common import set_threads, show, surroundings, table, write_json

from agentrl import collect
from agentrl.batch import build_batch, score
from agentrl.config import EnvConfig, RolloutConfig
from agentrl.models.load import load_model
from agentrl.policy import load_policy

VLLM = {"kv_cache_gib": 1, "max_num_seqs": 8, "max_model_len": 2048}


def measure(engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """Plays with `engine` and scores its tokens; differences in nats."""
    policy = load_policy(engine, model=options.model, **(VLLM if engine == "vllm" else {}))
    rollout = RolloutConfig(temperature=1.0, max_new_tokens=options.max_new_tokens, max_context_tokens=2048)
    env = EnvConfig(id=options.env, max_turns=options.max_turns)
    try:
        played = collect(policy, env, episodes=options.episodes, seed=options.seed, rollout=rollout)
    finally:
        asyncio.run(policy.aclose())
    batch = build_batch([one for one in played.trajectories if one.scorable])
    model = load_model(options.model, dtype="float32", device="cpu")
    ours = score(model, batch, budget=options.budget).logprob
    difference = (ours - batch.behaviour).abs()
    return {
        "engine": engine,
        "tokens": batch.index.K,
        "mean_logprob": float(ours.mean()),
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures the engines; prints the table, and keeps the figures where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--engines", nargs="+", default=["transformers", "vllm"])
    parser.add_argument("--env", default="Lock-v0")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--max-turns", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a scoring pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    options = parser.parse_args(arguments)
    set_threads(options)
    torch.set_grad_enabled(False)
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    around = surroundings("cpu")
    show("Log-probs of engines against the trainer's", settings, around)
    found = [measure(engine, options) for engine in options.engines]
    rows = [[f["engine"], str(f["tokens"]), f"{f['mean_logprob']:.3f}", f"{f['largest']:.2g}"] for f in found]
    table(["engine", "tokens", "mean log-prob", "largest difference, nats"], rows)
    result = {"settings": settings, "around": around, "engines": found}
    write_json(options.json, result)
    return result


if __name__ == "__main__":
    main()
