"""Does a run with vLLM end where a run with transformers ends? The same base, task and seeds; the engine differs.

    python benchmarks/vllm_agreement.py --json docs/results/vllm_agreement.json
    python benchmarks/vllm_agreement.py --out runs/try --seeds 0 --iterations 2 --demonstrations 500

Each run is a process of its own (``agentrl train configs/sokoban_oprl_vllm.yaml``, and the same with
``model.engine=transformers``), one after the other; runs that are there already are read, not repeated, and an
interrupted one goes on. The engines draw different random numbers, so that two runs of one seed differ as two seeds do:
what is compared is the mean of the final held-out success over the seeds, and their difference with the spread of the
seeds (Welch's standard error; the engines agree where zero lies within two of it). Beside it, per engine: the largest
difference of log-probs recorded while sampling from the trainer's own in any iteration, and seconds per iteration by
part.

The base model is made first: the demo's two lessons, in a network whose attention heads vLLM has kernels for on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import set_threads, show, surroundings, table, write_json

from agentrl.cli.demo import LESSONS
from agentrl.config import load_config
from agentrl.train.base import Lesson, make_base
from agentrl.train.metrics import read_metrics

CONFIG = "configs/sokoban_oprl_vllm.yaml"
ENGINES = {"transformers": ["model.engine=transformers", "model.engine_options={}"], "vllm": []}


def main() -> None:
    options = parse()
    set_threads(options)
    settings = {name: str(value) if name == "out" else value for name, value in vars(options).items() if name != "json"}
    around = surroundings("cpu")
    show("vLLM against transformers: where does a run end?", settings, around)
    base = ensure_base(options)
    runs = {
        name: [read(train(name, seed, base, options)) for seed in options.seeds] for name in ("transformers", "vllm")
    }
    result = {"settings": settings, "around": around, "runs": runs, **compare(runs)}
    report(result)
    write_json(options.json, result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="where the figures go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument(
        "--demonstrations", type=int, default=18_000, help="episodes that the base model is cloned from"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/vllm_agreement"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of both engines' runs")
    parser.add_argument("--vllm", nargs="*", default=[], metavar="KEY=VALUE", help="settings of vLLM's runs")
    parser.add_argument("--threads", type=int, default=1, help="of trainer and engine")
    return parser.parse_args()


def ensure_base(options: argparse.Namespace) -> Path:
    """Makes the base model unless it is there."""
    base: Path = options.out / "base"
    if not (base / "config.json").exists():
        settings = load_config(CONFIG)
        lessons = [
            Lesson(policy="sokoban-noisy-solver", options={"skill": skill}, episodes=max(1, n), lr=lr)
            for share, skill, lr in LESSONS
            for n in [round(share * options.demonstrations)]
        ]
        options.out.mkdir(parents=True, exist_ok=True)
        history = settings.rollout.history
        make_base(settings.env, base, lessons, history=history, preset="small", threads=options.threads)
    return base


def train(name: str, seed: int, base: Path, options: argparse.Namespace) -> Path:
    """Trains with engine `name`; returns the run's folder."""
    folder: Path = options.out / f"{name}-seed-{seed}"
    if (folder / "model" / "config.json").exists():
        print(f"{folder}: there already")
        return folder
    given = [f"run_dir={folder}", f"model.path={base}", f"seed={seed}", f"iterations={options.iterations}"]
    given += [f"model.threads={options.threads}", *options.set]
    if name == "vllm":
        given += [f"model.engine_options.threads={options.threads}", *options.vllm]
    given += ["--resume"] if folder.exists() else []
    subprocess.run([sys.executable, "-m", "agentrl", "train", CONFIG, *given, *ENGINES[name]], check=True)
    return folder


def read(folder: Path) -> dict[str, Any]:
    """What the comparison needs of a run."""
    records = read_metrics(folder / "metrics.jsonl")
    trained = [record for record in records if "policy_loss" in record]
    parts: dict[str, float] = {}
    for record in trained:
        for part, seconds in record["seconds"].items():
            parts[part] = parts.get(part, 0.0) + seconds / len(trained)
    return {
        "run": folder.name,
        "success": [record["eval"]["success"]["value"] for record in records if record.get("eval")],
        "logprob_mismatch": max(record["logprob_mismatch"] for record in trained),
        "seconds_per_iteration": parts,
    }


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The difference of the final success, with its standard error over the seeds."""
    final = {name: [run["success"][-1] for run in engine] for name, engine in runs.items()}
    difference = statistics.mean(final["vllm"]) - statistics.mean(final["transformers"])
    if min(map(len, final.values())) < 2:
        return {"final": final, "difference": difference, "standard_error": None, "agree": None}
    error = sum(statistics.variance(values) / len(values) for values in final.values()) ** 0.5
    return {
        "final": final,
        "difference": difference,
        "standard_error": error,
        "agree": abs(difference) <= 2 * error,
    }


def report(result: dict[str, Any]) -> None:
    rows: list[Sequence[str]] = []
    for name, engine in result["runs"].items():
        for run in engine:
            seconds = run["seconds_per_iteration"]
            rows.append(
                [
                    run["run"],
                    name,
                    " -> ".join(f"{value:.1%}" for value in run["success"]),
                    f"{run['logprob_mismatch']:.1e}",
                    f"{sum(seconds.values()):.1f}",
                ]
            )
    table(["run", "engine", "held-out success", "mismatch, nats", "s per iteration"], rows)
    error = result["standard_error"]
    spread = "" if error is None else f", standard error over seeds {error:.1%}: agree = {result['agree']}"
    print(f"\nfinal success, vllm minus transformers: {result['difference']:+.1%}{spread}")


if __name__ == "__main__":
    main()
