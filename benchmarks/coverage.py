"""Do the intervals and tests of an evaluation keep their promises? Longer than the tests have time for.

Tasks of different difficulty are drawn, episodes of them are played by coin, and it is counted how often a 95 %
interval holds the truth, and how often `compare` calls two equal policies different at p <= 0.05. The standard error of
each share is about 0.2 percentage points with 10,000 trials.

    python benchmarks/coverage.py --trials 10000 --json coverage.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from agentrl.evaluate import bootstrap_mean, cluster_proportion, sign_flip_p, wilson

RATE = 0.4
"""Mean success rate of all tasks there could be."""


def simulate(tasks: int, per_task: int, trials: int, seed: int = 0) -> dict[str, float]:
    """Returns the share of trials in which each interval holds the truth, and in which `compare` errs."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(tasks), per_task).tolist()
    hits = {"success": 0, "outcome": 0, "difference": 0, "false positives": 0}
    for trial in range(trials):
        difficulty = rng.beta(2, 3, tasks)[:, None]
        a, b = (rng.random((tasks, per_task)) < difficulty for _ in range(2))
        if per_task > 1:
            success = cluster_proportion(a.ravel().tolist(), owner, seed=trial)
        else:
            success = wilson(int(a.sum()), tasks)
        hits["success"] += success.low <= RATE <= success.high
        values = rng.normal(size=(tasks, 1)) + rng.normal(size=(tasks, per_task))
        hits["outcome"] += _holds(bootstrap_mean(values.ravel().tolist(), owner, seed=trial))
        differences = (b.mean(axis=1) - a.mean(axis=1)).tolist()
        hits["difference"] += _holds(bootstrap_mean(differences, range(tasks), seed=trial))
        hits["false positives"] += sign_flip_p(differences, draws=2000, seed=trial) <= 0.05
    return {name: count / trials for name, count in hits.items()}


def _holds(found: Any) -> bool:
    if found.low is None:  # no spread seen
        return bool(found.value == 0)
    return bool(found.low <= 0 <= found.high)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the simulation; prints the table, and keeps the shares where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the shares in this file")
    options = parser.parse_args(arguments)
    print(f"{options.trials:,} trials; intervals should hold the truth in 95 %, and 5 % be false positives")
    print(f"{'tasks':>5} {'each':>4} {'success':>8} {'outcome':>8} {'difference':>10} {'false positives':>15}")
    results = []
    for tasks, per_task in ((20, 1), (50, 4), (100, 4), (256, 1)):
        found = simulate(tasks, per_task, options.trials)
        results.append({"tasks": tasks, "per_task": per_task, **found})
        shares = [f"{100 * found[name]:.1f} %" for name in ("success", "outcome", "difference", "false positives")]
        print(f"{tasks:5} {per_task:4} {shares[0]:>8} {shares[1]:>8} {shares[2]:>10} {shares[3]:>15}")
    result = {"trials": options.trials, "results": results}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
