"""Training on served environments against local ones: what the way over HTTP costs a run.

    python benchmarks/remote_training.py --json remote_training.json

The demo's configuration and a base model made as the demo makes it (fewer demonstrations); a few iterations with local
environments and the same ones with an environment server in a process of its own on this machine, by turns. Both sides
deal the same tasks and draw the same actions. The ratio is the median over the pairs; wall time of the iterations, the
server's share of the machine included.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from common import command, show, surroundings, table

from agentrl.cli.demo import make_base
from agentrl.config import RunConfig, load_config
from agentrl.train import Trainer

SIDES = ("local", "remote")


@contextlib.contextmanager
def served(env_id: str) -> Iterator[str]:
    """Serves `env_id` from a process of its own; yields the URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "agentrl", "serve", env_id, "--port", str(port), "--rate", "0"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}/ready").raise_for_status()
                break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"agentrl serve {env_id}: no server came up")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/{env_id}"
    finally:
        process.kill()
        process.wait()


def settings_of(config: RunConfig, folder: Path, env_id: str, iterations: int) -> RunConfig:
    """Returns the run's configuration: only the environment's id differs between the sides."""
    settings = config.model_copy(deep=True)
    settings.run_dir, settings.iterations, settings.env.id = str(folder), iterations, env_id
    settings.eval.every = 0
    settings.log.tensorboard = settings.log.progress = False
    return settings


def train(settings: RunConfig) -> list[float]:
    """Trains. Returns wall seconds of each iteration."""
    shutil.rmtree(settings.run_dir, ignore_errors=True)
    seconds = []
    trainer = Trainer(settings)
    try:
        for _ in range(settings.iterations):
            started = time.perf_counter()
            trainer.iterate()
            seconds.append(time.perf_counter() - started)
    finally:
        trainer.close()
    return seconds


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trains on both sides by turns, prints the table, and returns the figures."""
    folder = Path(options.work or tempfile.mkdtemp(prefix="remote-training-"))
    config = load_config(
        options.config, [*options.override, f"seed={options.seed}", f"model.threads={options.threads}"]
    )
    config.model.path = options.base or str(folder / "base")
    if not options.base:
        make_base(config, folder, options.demonstrations)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    with served(config.env.id) as url:
        ids = {"local": config.env.id, "remote": url}
        for repeat in range(options.repeat):
            for side in SIDES[:: -1 if repeat % 2 else 1]:
                each = train(settings_of(config, folder / side, ids[side], options.iterations))
                seconds[side].append(sum(each))
                print(f"{side:6}  repeat {repeat}: " + "  ".join(f"{s:.2f}" for s in each), flush=True)
    ratios = [remote / local for local, remote in zip(seconds["local"], seconds["remote"], strict=True)]
    result = {"seconds": seconds, "ratios": ratios, "ratio": statistics.median(ratios)}
    around = surroundings("cpu") | {"load": round(os.getloadavg()[0], 1)}
    show(
        "Training, local against served environments", {"iterations": options.iterations, "seed": options.seed}, around
    )
    rows = [[side, f"{statistics.median(seconds[side]):.2f}"] for side in SIDES]
    table(["environments", f"seconds of {options.iterations} iterations"], rows)
    print(f"remote / local: {result['ratio']:.3f}  (pairs: {', '.join(f'{ratio:.3f}' for ratio in ratios)})")
    return result | {"settings": {k: v for k, v in vars(options).items() if k != "json"}, "surroundings": around}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark with command-line `arguments` and returns its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("override", nargs="*", metavar="KEY=VALUE", help="settings of the run")
    parser.add_argument("--config", default="configs/sokoban_oprl.yaml", metavar="FILE")
    parser.add_argument("--base", metavar="DIR", help="base model (the demo's runs/demo/base); made if not given")
    parser.add_argument("--demonstrations", type=int, default=2000, help="episodes that a new base is made from")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--work", metavar="DIR", help="folder of models and runs; a temporary one if not given")
    parser.add_argument("--json", metavar="FILE", help="keep the figures there")
    options = parser.parse_args(arguments)
    return command(options, run)


if __name__ == "__main__":
    main()
