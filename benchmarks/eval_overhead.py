"""What `agentrl.evaluate` costs over a bare Python loop, for scripted agents in an environment that steps in
microseconds.

Both sides play the same tasks with the same agent, by turns in one process; the successes must be equal. The bare loop
resets, asks the agent, steps and counts successes, and does nothing else. `evaluate` also checks what comes back, keeps
every turn of an episode until it is counted, times it, and computes intervals. Three agents:

    expert   a plain function observation -> move: a best move, from the distance table of the level
    random   a plain function observation -> move: drawn anew each time
    request  as random, as a function of the whole request (what registered policies read)

    python benchmarks/eval_overhead.py --json eval_overhead.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from agentrl.config import RolloutConfig
from agentrl.envs import make
from agentrl.evaluate import evaluate
from agentrl.policy import FunctionPolicy, Policy, PolicyRequest
from environments.sokoban.agents import best_moves
from environments.sokoban.board import MOVES

ENV = "Sokoban-v0"
Agent = Callable[[Any], str]


def expert(observation: str) -> str:
    """Returns a best move; the first one where nothing leads on."""
    return (best_moves(observation) or list(MOVES))[0]


def make_agent(name: str) -> Agent:
    """Returns a fresh agent: both sides start from the same random state."""
    if name == "expert":
        return expert
    rng, moves = random.Random(0), list(MOVES)
    return lambda _: moves[int(rng.random() * 4)]


def bare(env: Any, agent: Agent, episodes: int, seed: int, *, request: bool) -> int:
    """The loop that one would write without a framework. Returns the successes."""
    successes = 0
    for task in range(seed, seed + episodes):
        observation, info = env.reset(seed=task)
        done, turn = False, 0
        while not done:
            given = PolicyRequest(str(task), turn, observation, (), info, seed=turn) if request else observation
            observation, _, terminated, truncated, info = env.step(agent(given))
            done, turn = terminated or truncated, turn + 1
        successes += info["success"]
    return successes


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times both sides by turns. Returns seconds and episodes per second of each, and the ratio of each pair."""
    env, request = make(ENV), name == "request"
    rollout = RolloutConfig(concurrency=options.concurrency)
    pairs: list[dict[str, dict[str, float]]] = []
    for repeat in range(options.repeat + 1):  # the first warms caches up
        pair: dict[str, dict[str, float]] = {}
        found: dict[str, int] = {}
        for side in ("bare", "evaluate") if repeat % 2 else ("evaluate", "bare"):
            agent = make_agent(name)
            policy: Policy = FunctionPolicy(agent, name, reads="request" if request else "observation")
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            if side == "bare":
                found[side] = bare(env, agent, options.episodes, options.seed, request=request)
            else:
                result = evaluate(policy, ENV, episodes=options.episodes, seed=options.seed, rollout=rollout)
                found[side] = round(result.success.value * options.episodes)
            pair[side] = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        if found["bare"] != found["evaluate"]:
            raise SystemExit(f"{name}: the sides disagree: {found}")
        if repeat:
            pairs.append(pair)
    env.close()
    ratios = {kind: median(pair["evaluate"][kind] / pair["bare"][kind] for pair in pairs) for kind in ("cpu", "wall")}
    rates = {
        f"{side}_episodes_per_second": options.episodes / median(pair[side]["cpu"] for pair in pairs)
        for side in ("bare", "evaluate")
    }
    return {"agent": name, "successes": found["bare"], "ratio": ratios, **rates, "pairs": pairs}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; prints the table, and keeps all figures where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1000, metavar="N")
    parser.add_argument("--repeat", type=int, default=9, metavar="N", help="pairs that are timed")
    parser.add_argument("--concurrency", type=int, default=64, metavar="N")
    parser.add_argument("--seed", type=int, default=10**12, metavar="N", help="of the first task")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures in this file")
    options = parser.parse_args(arguments)
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    around = {"python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine()}
    print(f"{ENV}: evaluate against a bare loop\n  {settings}\n  {around}")
    print(f"{'agent':8} {'bare ep/s':>10} {'evaluate ep/s':>14} {'overhead, CPU':>14} {'overhead, wall':>15}")
    results = []
    for name in ("expert", "random", "request"):
        found = measure(name, options)
        results.append(found)
        over = {kind: f"{100 * (ratio - 1):.1f} %" for kind, ratio in found["ratio"].items()}
        rates = f"{found['bare_episodes_per_second']:10,.0f} {found['evaluate_episodes_per_second']:14,.0f}"
        print(f"{name:8} {rates} {over['cpu']:>14} {over['wall']:>15}")
    result = {"env": ENV, "settings": settings, "surroundings": around, "agents": results}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
