"""Our sampler against `model.generate`: the same weights, the same episodes, several turns, a batch at a time.

    python benchmarks/sampler.py
    python benchmarks/sampler.py --device cuda --shape 0.5b --dtype bfloat16 --json sampler.json

Each episode is some turns of a random observation (ragged lengths) and an action, which ends at one of a few stop
tokens (one id in 32, so that actions are ragged too) or at the token limit. Ours keeps the KV cache between turns and
reads only what is new. `generate` gets left-padded prompts, its own KV cache and its own stop at the end tokens; the
whole conversation is sent again at every turn, since its cache cannot grow unevenly. Ours also returns the log-prob of
every token; `generate` is spared that.

Greedy, both must say the same: any difference ends the run (in float32; in half precision they may part where two
tokens are equally likely, and how many agree is printed). Then both draw at temperature 1.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from common import SHAPES, command, generate, make_model, paired, show, surroundings, table

from agentrl.policy import PolicyRequest, Sampling
from policies.transformers.sampler import Sampler

Actions = list[list[list[int]]]
"""Sampled ids by episode and turn."""
Act = Callable[[list[list[int]], int], list[list[int]]]
"""Contexts of all episodes and the number of the turn -> an action each."""


class Episodes:
    """Random observations, and the two ways to answer them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = make_model(options.shape, dtype=options.dtype, device=options.device, seed=options.seed)
        vocab = SHAPES[options.shape]["vocab_size"]
        self.stop = frozenset(range(0, vocab, 32))
        random = np.random.default_rng(options.seed)
        sizes = random.integers(
            options.observation // 2, options.observation * 3 // 2 + 1, (options.batch, options.turns)
        )
        self.observations = [[random.integers(1, vocab, size=max(1, n)).tolist() for n in row] for row in sizes]

    def ours(self, temperature: float) -> Actions:
        options = self.options
        sampler = Sampler(self.model, self.stop)
        sampling = Sampling(temperature=temperature, max_new_tokens=options.max_new_tokens)

        def act(contexts: list[list[int]], turn: int) -> list[list[int]]:
            seeds = [options.seed + 1000 * n + turn for n in range(len(contexts))]
            requests = [
                PolicyRequest(str(n), turn, "", (), context_ids=list(context), seed=seed, sampling=sampling)
                for n, (context, seed) in enumerate(zip(contexts, seeds, strict=True))
            ]
            return [ids for ids, _, _ in sampler.sample(requests)]

        return self._play(act)

    def generate(self, temperature: float) -> Actions:
        torch.manual_seed(self.options.seed)
        limit = self.options.max_new_tokens
        return self._play(
            lambda contexts, _: generate(self.model, contexts, limit, stop=self.stop, pad=0, temperature=temperature)
        )

    def _play(self, act: Act) -> Actions:
        contexts: list[list[int]] = [[] for _ in self.observations]
        said: Actions = [[] for _ in contexts]
        for turn in range(self.options.turns):
            for context, observed in zip(contexts, self.observations, strict=True):
                context += observed[turn]
            for context, actions, ids in zip(contexts, said, act(contexts, turn), strict=True):
                context += ids
                actions.append(ids)
        return said


def agreement(ours: Actions, theirs: Actions, exact: bool) -> float:
    """Returns the share of actions on which both agree.

    Raises:
        SystemExit: `exact`, and they do not agree on all.
    """
    same = [a == b for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)]
    if exact and not all(same):
        episode, turn = divmod(same.index(False), len(ours[0]))
        raise SystemExit(
            f"greedy actions differ, first in episode {episode}, turn {turn}: "
            f"ours {ours[episode][turn]}, generate {theirs[episode][turn]}"
        )
    return sum(same) / len(same)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark, prints it and returns it."""
    settings, around = vars(options), surroundings(options.device)
    show("Sampling: ours against model.generate", settings, around)
    episodes = Episodes(options)
    result: dict[str, Any] = {"settings": settings, "surroundings": around}
    rows = []
    for name, temperature in (("greedy", 0.0), ("temperature 1", 1.0)):
        said: dict[str, Actions] = {}

        def play(side: str, at: float = temperature, said: dict[str, Actions] = said) -> None:
            said[side] = getattr(episodes, side)(at)

        sides = {side: (lambda side=side: play(side)) for side in ("ours", "generate")}
        paired(sides, 1, options.device)  # warm-up
        both = paired(sides, options.repeat, options.device)
        tokens = {side: sum(len(ids) for actions in said[side] for ids in actions) for side in sides}
        # Drawn actions differ, and so do their numbers of tokens: rates are compared, not seconds.
        rates = {side: [tokens[side] / s for s in both[side][0]] for side in sides}
        figures: dict[str, Any] = {
            side: {
                "tokens": tokens[side],
                "tokens_per_second": statistics.median(rates[side]),
                "peak_mb": both[side][1],
            }
            for side in sides
        }
        figures["ratio"] = statistics.median(a / b for a, b in zip(rates["ours"], rates["generate"], strict=True))
        if temperature == 0:
            figures["same_actions"] = agreement(said["ours"], said["generate"], options.dtype == "float32")
        result[name.replace(" ", "_")] = figures
        rows.append([name, *(f"{figures[s]['tokens_per_second']:,.0f}" for s in sides), f"{figures['ratio']:.1f}x"])
    print(
        f"  same greedy actions: {result['greedy']['same_actions']:.0%} of {options.batch * options.turns}, "
        f"{result['greedy']['ours']['tokens']:,} tokens\n"
    )
    table(["", "tokens/s ours", "generate", "ours/generate"], rows)
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of passes; weights: float32"
    )
    parser.add_argument("--batch", type=int, default=32, help="episodes")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--observation", type=int, default=64, help="mean tokens of an observation")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="token limit of an action")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads on a CPU (tiny: 1)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    return command(parse(arguments), run)


if __name__ == "__main__":
    main()
