"""Memory of policy, PRM and reference: adapters over one frozen base against three full copies.

    python benchmarks/lora_memory.py                                       # a random model of 110 M parameters
    python benchmarks/lora_memory.py --model models/smollm2-135m --rank 16 --json lora_memory.json

Each side is a fresh process that loads the three models as a run with OPRL and a frozen reference does, then does one
PRM step and one policy update (forward, backward, AdamW) on the same ragged episodes. Reported, in MB:

* *weights*: bytes of all distinct parameter tensors of the three models (what is shared counts once);
* *optimiser*: both AdamWs' moments and the gradients, after the step;
* *resident*: the process's resident set above what it was before the first model was loaded, with all three loaded;
* *peak*: its high-water mark over the whole, above the same.

The resident figures hold allocator slack and activations; the bytes are exact. The seconds are of the two updates, on
whatever else the machine is doing: take their ratio as a hint only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import PeakMemory, show, surroundings, table, write_json

from agentrl.batch import build_batch, score
from agentrl.config.schema import LoRAConfig, PairConfig, PolicyUpdateConfig, PRMConfig
from agentrl.models.lora import load_trainable, reference_of, trained_parameters, twin
from agentrl.prm import ImplicitPRM
from agentrl.train.policy_update import make_optimizer, update_policy
from agentrl.types import Trajectory, Turn

SIDES = ("three copies", "lora")
RANDOM: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "intermediate_size": 2048,
    "tie_word_embeddings": True,
}
"""A Qwen3 of 110 M parameters."""


def episodes(vocab: int, count: int, seed: int) -> list[Trajectory]:
    """Ragged two-turn episodes of random ids in groups of four; every other one is a success."""
    random = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return [int(i) for i in random.integers(vocab, size=random.integers(low, high))]

    made = []
    for n in range(count):
        turns = [
            Turn(
                observation="",
                action="",
                prompt_ids=ids(40, 80),
                action_ids=(acted := ids(8, 16)),
                action_logprobs=[-1.0] * len(acted),
                new_row=number == 0,
            )
            for number in range(2)
        ]
        won = n % 2 == 0
        made.append(
            Trajectory(
                id=str(n), group_id=str(n // 4), env="none", seed=0, outcome=float(won), success=won, turns=turns
            )
        )
    return made


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One side, in this process."""
    torch.manual_seed(options.seed)
    memory = PeakMemory("cpu")
    lora = LoRAConfig(rank=options.rank if options.side == "lora" else 0, alpha=2 * options.rank)
    policy = load_trainable(options.model, device="cpu", dtype="float32", lora=lora)
    reference = reference_of(policy)
    prm_model = twin(policy)
    models = (policy, prm_model, reference)
    resident = memory.now()

    config, prm_config = PolicyUpdateConfig(), PRMConfig(reference="frozen")
    optimizer = make_optimizer(policy, config)
    prm = ImplicitPRM(prm_model, policy, prm_config, PairConfig(), frozen=reference)
    made = episodes(policy.config.vocab_size, options.episodes, options.seed)
    batch = build_batch(made)
    told = iter(score(policy, batch, budget=options.budget).logprob.tolist())
    for turn in (turn for t in made for turn in t.turns):
        turn.action_logprobs = [next(told) for _ in turn.action_ids]
    batch = build_batch(made)
    start = time.perf_counter()
    outcome = torch.tensor([t.outcome for t in made])
    reward, _ = prm.step(batch, outcome, policy, (), 0)
    update_policy(policy, optimizer, batch, reward.float(), config)
    seconds = time.perf_counter() - start

    unique = {p.data_ptr(): p.numel() * p.element_size() for model in models for p in model.parameters()}
    trained = [p for model in models for p in trained_parameters(model)]
    moments = [x for o in (optimizer, prm.optimizer) for s in o.state.values() for x in s.values()]
    extra = sum(t.numel() * t.element_size() for t in (*moments, *(p.grad for p in trained if p.grad is not None)))
    return {
        "parameters": sum(p.numel() for p in reference.parameters()),
        "trained": sum(p.numel() for p in trained),
        "weights_mb": sum(unique.values()) / 2**20,
        "optimiser_mb": extra / 2**20,
        "resident_mb": resident,
        "peak_mb": memory.megabytes() or float("nan"),
        "seconds": seconds,
    }


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides, each in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        if options.model is None:
            torch.manual_seed(options.seed)
            config = transformers.Qwen3Config(**RANDOM)
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(scratch)
        sides = {}
        for side in SIDES:
            given = ("--rank", "--episodes", "--budget", "--seed", "--threads")
            asked = [x for name in given for x in (name, str(getattr(options, name[2:])))]
            command = [sys.executable, __file__, "--side", side, "--model", options.model or scratch, *asked]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            sides[side] = json.loads(done.stdout.splitlines()[-1])
    full, lora = (sides[side] for side in SIDES)
    ratios = {f"ratio_{name}": full[name] / lora[name] for name in ("weights_mb", "optimiser_mb", "peak_mb", "seconds")}
    return {"sides": sides, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="model directory; without: a random model of 110 M parameters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--budget", type=int, default=1024, help="tokens of one forward pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.side:
        print(json.dumps(measure(options)))
        return
    settings = {k: v for k, v in vars(options).items() if k not in ("side", "json")}
    settings["model"] = Path(options.model).name if options.model else "random, 110 M"
    around = surroundings("cpu")
    show("Memory of policy + PRM + reference", settings, around)
    result = compare(options)
    names = ("trained", "weights_mb", "optimiser_mb", "resident_mb", "peak_mb", "seconds")
    rows = [[side, *(f"{result['sides'][side][n]:,.{1 if n == 'seconds' else 0}f}" for n in names)] for side in SIDES]
    last = {n: f"{result['sides'][SIDES[0]][n] / result['sides'][SIDES[1]][n]:.1f}x" for n in names}
    table(["", *names], [*rows, ["ratio", *last.values()]])
    write_json(options.json, {"settings": settings, "surroundings": around, **result})


if __name__ == "__main__":
    main()
