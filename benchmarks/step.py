"""One training iteration, ours against padded rows, on the same fixed trajectories and the same weights.

    python benchmarks/step.py                                       # tiny model, CPU
    python benchmarks/step.py --device cuda --shape 0.5b --dtype bfloat16 --json step.json

Trajectories: 10 turns each, 80 % of the tokens are observations, ragged, so that rows padded to the longest are 36 %
full; random ids and random weights, seeded. The actions are what the model samples there, with their log-probs.

Phases: *sampling* all turns; *scoring* every action token; the *PRM update* (pass 1 without gradient, pass 2 with,
AdamW); the *policy update* (clipped surrogate, AdamW). The learning rate is 1e-9: the weights stay, and every repeat
does the same work.

The padded side is what one writes with the library alone, at its best: sampling is `generate` on left-padded prompts
with a KV cache, the whole context sent again at each turn; the rest is rows padded at the right to the longest, in
micro-batches of the same token budget, with an attention mask (SDPA), logits at every position and one fused
cross-entropy over them. It computes no entropies and keeps no log-probs while sampling; ours does both. Before anything
is timed, both sides' log-probs and gradients are compared in float32; a difference above 1e-4 ends the run.

Tokens per second: sampled tokens for sampling, read tokens (padding never counts) for the rest. Model FLOPs are those
the work needs on either side: 2 per parameter and token (the head: only at action tokens) and causal attention, once
for a forward pass, three times with its backward; MFU is their share of a large matrix product's measured rate.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    SHAPES,
    attention,
    command,
    generate,
    make_model,
    matmul_peak,
    paired,
    show,
    surroundings,
    table,
)

from agentrl.batch import Batch, build_batch, score
from agentrl.batch.index import Index, segment_sum
from agentrl.buffer.pairs import preference_pairs
from agentrl.config.schema import PairConfig, PolicyUpdateConfig, PRMConfig
from agentrl.models.attention import precision
from agentrl.policy import PolicyRequest, Sampling
from agentrl.prm import ImplicitPRM, PairObjective
from agentrl.prm.loss import PairTensors, pair_loss
from agentrl.train.policy_loss import policy_loss, token_weights
from agentrl.train.policy_update import update_policy
from agentrl.types import Trajectory, Turn
from policies.transformers.sampler import Sampler

Tensor = torch.Tensor

TURNS = 10
FILL = 0.36
OBSERVED = 0.8
GROUP = 8
TOLERANCE = 1e-4
LR = 1e-9
AS_PUBLISHED: dict[str, Any] = {"lr": LR, "score": "sum", "centred": False, "reference": "behaviour", "loss": "dpo"}
"""The PRM's loss: trajectory-level DPO against the policy that played."""
PHASES = {"sampling": 1, "scoring": 1, "PRM update": 4, "policy update": 3}
"""Each phase's cost in forward passes."""


class Task:
    """What is done: observations to read, action lengths, weights; and what both sides train with."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.budget, self.seed = options.device, options.budget, options.seed
        self.model = make_model(options.shape, dtype=options.dtype, device=options.device, seed=options.seed)
        self.observations, self.limits = ragged_episodes(
            options.trajectories, options.action_tokens, SHAPES[options.shape]["vocab_size"], options.seed
        )
        self.policy_config = PolicyUpdateConfig(lr=LR, tokens_per_microbatch=options.budget)
        self.prm = ImplicitPRM(self.model, None, PRMConfig(**AS_PUBLISHED), PairConfig(), budget=options.budget)
        self.trajectories = Ours(self).sampling()
        self.outcome = torch.tensor([t.outcome for t in self.trajectories])
        self.pairs = PairTensors.of(preference_pairs(self.trajectories, PairConfig(), seed=0))
        tokens = sum(t.action_tokens for t in self.trajectories)
        self.advantage = torch.randn(tokens, generator=torch.Generator().manual_seed(options.seed))

    @property
    def lengths(self) -> list[int]:
        return [sum(len(turn.prompt_ids) + len(turn.action_ids) for turn in t.turns) for t in self.trajectories]

    def flops(self) -> float:
        """Floating-point operations of one forward pass over the work."""
        config, head = self.model.config, self.model.get_output_embeddings().weight.numel()
        body = sum(p.numel() for p in self.model.parameters()) - head  # tied: the embedding is the head
        spans = sum(length * (length + 1) / 2 for length in self.lengths)
        attended = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * spans
        return float(2 * body * sum(self.lengths) + 2 * head * len(self.advantage) + attended)


def ragged_episodes(n: int, action: int, vocab: int, seed: int) -> tuple[list[list[list[int]]], np.ndarray]:
    """Returns observations (ids by episode and turn) and action lengths (n, TURNS).

    Actions are `action` tokens long on average and know nothing of the episode. Observations grow from episode to
    episode by a power law that fixes both their share and the fill.
    """
    random = np.random.default_rng(seed)
    limits = random.integers(max(1, action // 2), action + action // 2 + 1, size=(n, TURNS))
    total = action / (1 - OBSERVED)  # tokens of a turn
    longest = total / FILL - action
    rank = np.arange(n) / (n - 1)
    power = min(np.linspace(0.5, 8, 751), key=lambda p: abs((rank**p).mean() - total * OBSERVED / longest))
    scale = random.permutation(longest * rank**power)[:, None] * random.uniform(0.75, 1.25, size=(n, TURNS))
    sizes = np.maximum(1, scale.round().astype(int))
    return [[random.integers(vocab, size=size).tolist() for size in row] for row in sizes], limits


class Ours:
    """The package's own path: slot cache, packed rows, logits at action positions only."""

    batch: Batch

    def __init__(self, task: Task) -> None:
        self.task = task

    def sampling(self) -> list[Trajectory]:
        task = self.task
        sampler = Sampler(task.model, frozenset(), prefill_budget=task.budget)
        contexts: list[list[int]] = [[] for _ in task.observations]
        turns: list[list[Turn]] = [[] for _ in contexts]
        for t in range(TURNS):
            for context, observed in zip(contexts, task.observations, strict=True):
                context += observed[t]
            requests = [
                PolicyRequest(
                    str(n),
                    t,
                    "",
                    (),
                    context_ids=list(context),
                    seed=task.seed + 1000 * n + t,
                    sampling=Sampling(max_new_tokens=int(task.limits[n, t])),
                )
                for n, context in enumerate(contexts)
            ]
            for n, (ids, logprobs, _) in enumerate(sampler.sample(requests)):
                turns[n].append(
                    Turn(
                        observation="",
                        action="",
                        prompt_ids=task.observations[n][t],
                        action_ids=ids,
                        action_logprobs=logprobs,
                        new_row=t == 0,
                    )
                )
                contexts[n] += ids
        return [
            Trajectory(
                id=str(n), group_id=str(n // GROUP), env="", seed=0, turns=steps, outcome=n % 2, success=n % 2 == 1
            )
            for n, steps in enumerate(turns)
        ]

    def scoring(self) -> Tensor:
        self.batch = build_batch(self.task.trajectories, device=self.task.device)
        return score(self.task.model, self.batch, budget=self.task.budget).logprob

    def prm_update(self) -> None:
        task = self.task
        task.prm.update(self.batch, PairObjective(task.pairs, task.outcome), self.batch.behaviour)

    def policy_update(self) -> None:
        task = self.task
        update_policy(task.model, task.prm.optimizer, self.batch, task.advantage, task.policy_config)


class Padded:
    """Rows padded to the longest, an attention mask, logits over the vocabulary at every position."""

    micros: list[tuple[Tensor, Tensor, Tensor, slice]]
    """Ids (b, L), mask (b, L), flat positions that predict an action token, and which of the K tokens they are."""
    index: Index
    behaviour: Tensor

    def __init__(self, task: Task) -> None:
        self.task = task

    @torch.no_grad()
    def sampling(self) -> None:
        task = self.task
        contexts: list[list[int]] = [[] for _ in task.observations]
        for t in range(TURNS):
            for context, observed in zip(contexts, task.observations, strict=True):
                context += observed[t]
            limits = task.limits[:, t].tolist()
            rows = generate(task.model, contexts, max(limits), stop=[], pad=0, temperature=1.0)
            for context, ids, limit in zip(contexts, rows, limits, strict=True):
                context += ids[:limit]

    def scoring(self) -> Tensor:
        self._collate()
        return self._score()

    def prm_update(self) -> None:
        task, config, traj = self.task, self.task.prm.config, self.index.traj_of_token
        scores = config.beta * segment_sum(self._score() - self.behaviour, traj, self.index.N)
        scores.requires_grad_(True)
        (slope,) = torch.autograd.grad(pair_loss(scores, task.pairs), scores)
        weight = config.beta * slope[traj]
        self._step(config.grad_clip, lambda new, k: (new * weight[k].to(new)).sum())

    def policy_update(self) -> None:
        task, index = self.task, self.index
        config = task.policy_config
        weight = token_weights(index, config, torch.arange(index.N))

        def loss(new: Tensor, k: slice) -> Tensor:
            old, advantage = self.behaviour[k].to(new), task.advantage[k].to(new)
            return policy_loss(new, old, advantage, weight[k], index.turn_of_token[k], config).loss

        self._step(config.grad_clip, loss)

    def _collate(self) -> None:
        task = self.task
        rows = [[i for turn in t.turns for i in (*turn.prompt_ids, *turn.action_ids)] for t in task.trajectories]
        acts = [
            [a for turn in t.turns for a in [0] * len(turn.prompt_ids) + [1] * len(turn.action_ids)]
            for t in task.trajectories
        ]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        act = torch.tensor([a + [0] * (longest - len(a)) for a in acts], dtype=torch.bool)
        step = max(1, task.budget // longest)
        self.micros, first = [], 0
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            last = first + int(act[part].sum())
            predict = act[part].flatten().nonzero()[:, 0] - 1
            row, seen, at = (x.to(task.device) for x in (ids[part], mask[part], predict))
            self.micros.append((row, seen, at, slice(first, last)))
            first = last
        turns = [turn for t in task.trajectories for turn in t.turns]
        counts = torch.tensor([len(turn.action_ids) for turn in turns])
        self.index = Index(
            torch.arange(len(turns)).repeat_interleave(counts),
            torch.arange(len(rows)).repeat_interleave(TURNS),
            torch.arange(len(rows)) // GROUP,
        )
        self.behaviour = torch.tensor([p for turn in turns for p in turn.action_logprobs])

    def _logprobs(self, ids: Tensor, mask: Tensor, predict: Tensor) -> Tensor:
        model = self.task.model
        with attention(model, "sdpa"), precision(model):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        following = ids.roll(-1, dims=1)
        return -F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")[predict]

    @torch.no_grad()
    def _score(self) -> Tensor:
        return torch.cat([self._logprobs(*inputs).cpu() for *inputs, _ in self.micros])

    def _step(self, clip: float, loss: Callable[[Tensor, slice], Tensor]) -> None:
        optimizer = self.task.prm.optimizer
        optimizer.zero_grad(set_to_none=True)
        for *inputs, k in self.micros:
            loss(self._logprobs(*inputs), k).backward()
        torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), clip)
        optimizer.step()


def compare(task: Task, ours: Ours, padded: Padded) -> dict[str, float]:
    """Runs every phase on both sides in float32 and returns the largest differences.

    Log-probs: absolute, nats. Gradients: relative to the largest entry.
    """
    trained_in = getattr(task.model, "compute_dtype", None)
    task.model.compute_dtype = None
    try:
        found = {"logprob": float((ours.scoring() - padded.scoring()).abs().max())}
        for phase in ("prm_update", "policy_update"):
            gradients = []
            for side in (ours, padded):
                getattr(side, phase)()
                gradients.append([p.grad.clone() for p in task.model.parameters()])
            largest = max(float(g.abs().max()) for g in gradients[1])
            apart = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
            found[f"{phase}_gradient"] = apart / largest
    finally:
        task.model.compute_dtype = trained_in
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark, prints it and returns it."""
    settings, around = vars(options), surroundings(options.device)
    show("One iteration: ours against padded rows and full-vocabulary logits", settings, around)
    task = Task(options)
    ours, padded = Ours(task), Padded(task)
    difference = compare(task, ours, padded)
    recorded = score(task.model, ours.batch, budget=task.budget).logprob
    sampled = float((recorded - ours.batch.behaviour).abs().max())
    lengths, actions = task.lengths, ours.batch.index.K
    fill = sum(lengths) / (len(lengths) * max(lengths))
    print(
        f"  {len(lengths)} trajectories of {TURNS} turns, {sum(lengths):,} tokens, {1 - actions / sum(lengths):.0%} "
        f"observed; longest {max(lengths):,}: padded rows are {fill:.0%} full"
    )
    print("  largest difference ours - padded (float32): " + ", ".join(f"{k} {v:.1e}" for k, v in difference.items()))
    print(f"  largest difference of log-probs, sampled - scored: {sampled:.1e}")
    if not max(difference.values()) <= TOLERANCE:
        raise SystemExit(f"the two sides do not compute the same thing (tolerance {TOLERANCE}): nothing was timed")
    peak = matmul_peak(options.device, options.dtype)
    print(f"  peak: {peak / 1e12:.3g} TFLOP/s, measured on a large {options.dtype} matrix product\n")
    phases: dict[str, Any] = {}
    for phase, passes in PHASES.items():
        name = phase.lower().replace(" ", "_")
        both = paired({"ours": getattr(ours, name), "padded": getattr(padded, name)}, options.repeat, options.device)
        counted = actions if name == "sampling" else sum(lengths)
        row: dict[str, Any] = {}
        for side, (seconds, memory) in both.items():
            typical = statistics.median(seconds)
            row[side] = {
                "seconds": typical,
                "tokens_per_second": counted / typical,
                "mfu": passes * task.flops() / typical / peak,
                "peak_mb": memory,
            }
        row["ratio"] = statistics.median([p / o for o, p in zip(both["ours"][0], both["padded"][0], strict=True)])
        phases[name] = row
    total = {side: sum(row[side]["seconds"] for row in phases.values()) for side in ("ours", "padded")}
    result = {
        "settings": settings,
        "surroundings": around,
        "peak_flops": peak,
        "fill": fill,
        "tokens": sum(lengths),
        "action_tokens": actions,
        "difference": difference | {"sampled_logprob": sampled},
        "phases": phases,
        "seconds": total | {"ratio": total["padded"] / total["ours"]},
    }
    report(result)
    return result


def report(result: dict[str, Any]) -> None:
    def memory(value: float | None) -> str:
        return "n/a" if value is None else f"{value:,.0f}"

    rows = [
        [
            name.replace("_", " "),
            *(f"{row[side]['tokens_per_second']:,.0f}" for side in ("ours", "padded")),
            f"{row['ratio']:.1f}x",
            *(f"{row[side]['mfu']:.1%}" for side in ("ours", "padded")),
            *(memory(row[side]["peak_mb"]) for side in ("ours", "padded")),
        ]
        for name, row in result["phases"].items()
    ]
    table(["", "tokens/s ours", "padded", "ours/padded", "MFU ours", "padded", "peak MB ours", "padded"], rows)
    seconds = result["seconds"]
    print(f"iteration: ours {seconds['ours']:.2f} s, padded {seconds['padded']:.2f} s, {seconds['ratio']:.1f}x")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of passes; weights: float32"
    )
    parser.add_argument("--trajectories", type=int, default=32, help=f"a multiple of {GROUP}")
    parser.add_argument("--action-tokens", type=int, help="mean length of an action (4; 32 for the large shapes)")
    parser.add_argument("--budget", type=int, default=16384, help="tokens of one forward pass, padding included")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads on a CPU (tiny: 1)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    if options.trajectories < GROUP or options.trajectories % GROUP:
        parser.error(f"--trajectories {options.trajectories}: give a multiple of {GROUP}")
    if options.action_tokens is None:
        options.action_tokens = 4 if options.shape == "tiny" else 32
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    return command(parse(arguments), run)


if __name__ == "__main__":
    main()
