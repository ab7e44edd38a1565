"""What `agentrl.evaluate` costs over a bare Python loop, for scripted agents in an environment that steps in
microseconds.

Both sides play the same tasks with the same agent; the successes must be equal. The bare loop resets, asks the agent,
steps and counts successes, and does nothing else. `evaluate` also checks what comes back, times it, counts turns,
stop reasons and invalid actions, and computes intervals. The speed of a shared machine drifts by a third within a
second: the two sides take turns every hundred episodes, inside one call of `evaluate`, whose whole cost (environment
made, statistics) counts. Four agents:

    expert   a plain function observation -> move: a best move, from the distance table of the level
    solver   the registered policy sokoban-noisy-solver with skill 1: a function of the whole request
    random   a plain function observation -> move: drawn anew each time
    request  as random, as a function of the whole request, of which it reads nothing: what making requests costs

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
from environments.sokoban.agents import best_moves, noisy_solver_policy
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
    if name == "solver":
        policy = noisy_solver_policy(skill=1.0)
        assert isinstance(policy, FunctionPolicy)
        return policy.function
    rng, moves = random.Random(0), list(MOVES)
    return lambda _: moves[int(rng.random() * 4)]


def bare(env: Any, agent: Agent, tasks: range, *, request: bool) -> int:
    """The loop that one would write without a framework. Returns the successes."""
    successes = 0
    for task in tasks:
        observation, info = env.reset(seed=task)
        done, turn = False, 0
        while not done:
            given = PolicyRequest(str(task), turn, observation, (), info, seed=turn) if request else observation
            observation, _, terminated, truncated, info = env.step(agent(given))
            done, turn = terminated or truncated, turn + 1
        successes += info["success"]
    return successes


def clocks() -> tuple[float, float]:
    """Returns CPU and wall seconds."""
    return time.process_time(), time.perf_counter()


class Alternating:
    """Plays a slice of tasks with the bare loop whenever `evaluate` has played one (``on_summary``)."""

    def __init__(self, env: Any, name: str, options: argparse.Namespace) -> None:
        self.env, self.agent, self.request = env, make_agent(name), name in ("solver", "request")
        self.slice, self.next, self.last = options.slice, options.seed, options.seed + options.episodes
        self.waiting = self.successes = 0
        self.cpu = self.wall = 0.0

    def __call__(self, _: Any) -> None:
        self.waiting += 1
        if self.waiting == self.slice or self.next + self.waiting == self.last:
            cpu, wall = clocks()
            tasks = range(self.next, self.next + self.waiting)
            self.successes += bare(self.env, self.agent, tasks, request=self.request)
            self.next, self.waiting = tasks.stop, 0
            now = clocks()
            self.cpu += now[0] - cpu
            self.wall += now[1] - wall


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Times both sides. Returns seconds and episodes per second of each, and the ratio of each pair."""
    env = make(ENV)
    rollout = RolloutConfig(concurrency=options.concurrency)
    pairs: list[dict[str, dict[str, float]]] = []
    for repeat in range(options.repeat + 1):  # the first warms caches up
        agent, other = make_agent(name), Alternating(env, name, options)
        policy: Policy = FunctionPolicy(agent, name, reads="request" if other.request else "observation")
        gc.collect()
        cpu, wall = clocks()
        result = evaluate(policy, ENV, episodes=options.episodes, seed=options.seed, rollout=rollout, on_summary=other)
        now = clocks()
        found = round(result.success.value * options.episodes)
        if found != other.successes:
            raise SystemExit(f"{name}: the sides disagree: evaluate {found}, bare loop {other.successes}")
        mine = {"cpu": now[0] - cpu - other.cpu, "wall": now[1] - wall - other.wall}
        if repeat:
            pairs.append({"bare": {"cpu": other.cpu, "wall": other.wall}, "evaluate": mine})
    env.close()
    ratios = {kind: median(pair["evaluate"][kind] / pair["bare"][kind] for pair in pairs) for kind in ("cpu", "wall")}
    rates = {
        f"{side}_episodes_per_second": options.episodes / median(pair[side]["cpu"] for pair in pairs)
        for side in ("bare", "evaluate")
    }
    return {"agent": name, "successes": found, "ratio": ratios, **rates, "pairs": pairs}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; prints the table, and keeps all figures where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1000, metavar="N")
    parser.add_argument("--repeat", type=int, default=9, metavar="N", help="pairs that are timed")
    parser.add_argument("--concurrency", type=int, default=64, metavar="N")
    parser.add_argument("--slice", type=int, default=100, metavar="N", help="episodes between two changes of sides")
    parser.add_argument("--seed", type=int, default=10**12, metavar="N", help="of the first task")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures in this file")
    options = parser.parse_args(arguments)
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    around = {"python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine()}
    print(f"{ENV}: evaluate against a bare loop\n  {settings}\n  {around}")
    print(f"{'agent':8} {'bare ep/s':>10} {'evaluate ep/s':>14} {'overhead, CPU':>14} {'overhead, wall':>15}")
    results = []
    for name in ("expert", "solver", "random", "request"):
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
