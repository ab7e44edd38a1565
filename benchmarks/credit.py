"""What does credit cost? Every registered method on one synthetic batch with all signals.

Eight trajectories a group, ragged: turns per trajectory and action tokens per turn are spread as widely as their means
allow. Prints the milliseconds of each method with its default options, and of the options that work on tokens, over
the repeats: the least (what it takes on a quiet machine) and the median. One thread, unless told otherwise.

    python benchmarks/credit.py
    python benchmarks/credit.py --turns 100000 --tokens 10000000 --method oprl --json credit.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from common import command, show, surroundings, table

from agentrl.batch import Index
from agentrl.credit import Signals, credit_names, load_credit

GROUP = 8
"""Trajectories per group."""
TURNS = 8
"""Mean turns per trajectory."""
REQUIRED: dict[str, dict[str, Any]] = {"spro": {"beta": 0.05}}
"""Options without a default."""
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("oprl", {"granularity": "token"}),
    ("oprl", {"granularity": "token", "step_norm": "rank"}),
    ("oprl", {"combine": "merged"}),
    ("spro", {"beta": 0.05, "align": "token"}),
    ("gigpo", {"scale": True}),
    ("gigpo", {"similarity": 0.95}),
    ("ppo", {"level": "turn"}),
    ("prime", {"form": "recipe", "gamma": 0.99}),
    ("prpo", {"segmenter": "entropy"}),
    ("reinforce_pp", {"gamma": 0.99, "turn_rewards": True, "kl_coef": 0.01}),
]
"""Timed besides the defaults."""


def synthetic(turns: int, tokens: int, seed: int) -> Signals:
    """Returns all signals of a ragged batch of about `turns` turns and `tokens` action tokens, in whole groups."""
    draw = torch.Generator().manual_seed(seed)
    trajs = max(1, round(turns / (TURNS * GROUP))) * GROUP
    group_of_traj = torch.arange(trajs) // GROUP
    traj_of_turn = torch.repeat_interleave(ragged(trajs, turns / trajs, draw))
    turn_of_token = torch.repeat_interleave(ragged(len(traj_of_turn), tokens / len(traj_of_turn), draw))
    index = Index(turn_of_token, traj_of_turn, group_of_traj)

    def normal(size: int) -> torch.Tensor:
        return torch.randn(size, generator=draw)

    return Signals(
        index,
        torch.randint(2, (index.N,), generator=draw).double(),
        policy_logprob=-normal(index.K).abs(),
        token_reward=0.05 * normal(index.K),
        reference_logprob=-normal(index.K).abs(),
        entropy=normal(index.K).abs(),
        value=normal(index.K),
        turn_reward=normal(index.M),
        state_key=boards(index.group_of_turn, draw),
        turn_score=torch.rand(index.M, generator=draw),
        names=[str(i) for i in range(index.N)],
    )


def boards(group_of_turn: torch.Tensor, draw: torch.Generator, side: int = 8, states: int = 20) -> list[str]:
    """Returns a state for each turn: one of `states` boards of its group, which differ in where the agent stands."""
    wall = torch.rand(int(group_of_turn.max()) + 1, side * side, generator=draw) < 0.3
    maps = ["".join("#" if cell else "." for cell in row) for row in wall.tolist()]
    places = torch.randint(states, (len(group_of_turn),), generator=draw) * (side * side // states)
    return [
        maps[g][:place] + "@" + maps[g][place + 1 :]
        for g, place in zip(group_of_turn.tolist(), places.tolist(), strict=True)
    ]


def ragged(size: int, mean: float, draw: torch.Generator) -> torch.Tensor:
    """Returns (size,) whole numbers around `mean`, from 1 to twice it."""
    return (1 + 2 * (mean - 1) * torch.rand(size, generator=draw)).round().long().clamp(min=1)


def seconds(name: str, options: dict[str, Any], signals: Signals, repeat: int) -> list[float]:
    """Returns the seconds of each call, checks of the signals included."""
    method, checked = load_credit(name, options)
    method(signals, checked)  # warm-up; and the index's own vectors, which the trainer has made as well
    out = []
    for _ in range(repeat):
        start = time.perf_counter()
        method(signals, checked)
        out.append(time.perf_counter() - start)
    return out


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Times the methods and prints the table; returns every figure."""
    signals = synthetic(options.turns, options.tokens, options.seed)
    index = signals.index
    settings = {
        "groups": index.G,
        "trajectories": index.N,
        "turns": index.M,
        "tokens": index.K,
        "seed": options.seed,
        "repeat": options.repeat,
    }
    result: dict[str, Any] = {"settings": settings, "surroundings": surroundings("cpu"), "methods": []}
    show("credit", settings, result["surroundings"])
    chosen = options.method or credit_names()
    cases = [(name, REQUIRED.get(name, {})) for name in chosen]
    cases += [(name, extra) for name, extra in VARIANTS if name in chosen]
    rows = []
    for name, extra in cases:
        taken = seconds(name, extra, signals, options.repeat)
        best, median = 1000 * min(taken), 1000 * statistics.median(taken)
        result["methods"].append({"method": name, "options": extra, "ms": best, "ms_median": median})
        said = " ".join(f"{key}={value}" for key, value in extra.items())
        rows.append([f"{name} {said}".strip(), f"{best:,.1f}", f"{median:,.1f}"])
    table(["method", "ms least", "ms median"], rows)
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="action tokens")
    parser.add_argument("--method", action="append", help="only this one; may be repeated")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    return command(parse(arguments), run)


if __name__ == "__main__":
    main()
