"""How far off is the memory that `agentrl explain` foretells? Real runs of small models, each in a process of its own.

The child first trains on two episodes, so that all libraries are loaded, then on the batch, watches its resident memory
and tells by how much the peak lay above the start. Python, torch and the tokenizer are thereby left out, as they are in
the estimate. Each run is measured twice: as it is, and with an allocator that gives all freed memory back at once
(glibc, ``MALLOC_MMAP_THRESHOLD_``), which shows what tensors alone hold; the estimate's own item `allocator` is the
difference.

    python benchmarks/explain_check.py --grid --json explain_check.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from agentrl.envs import TextEnv
from agentrl.envs.registry import register

HERE = Path(__file__).resolve()
EPISODE = 420
"""Tokens of an episode, about."""
Shape = tuple[int, int, int, str, int]


def _settings(shapes: list[Shape]) -> list[dict[str, int | str]]:
    return [dict(zip(("hidden", "layers", "budget", "method", "rank"), shape, strict=True)) for shape in shapes]


GRID = _settings(
    [
        (128, 2, 1024, "oprl", 0),
        (128, 6, 4096, "grpo", 0),
        (128, 2, 16384, "grpo", 0),
        (256, 6, 1024, "oprl", 0),
        (256, 2, 4096, "oprl", 0),
        (256, 6, 4096, "grpo", 0),
        (256, 6, 4096, "oprl", 8),
        (256, 2, 16384, "grpo", 8),
        (512, 2, 1024, "grpo", 0),
        (512, 6, 1024, "oprl", 8),
        (512, 2, 4096, "oprl", 0),
    ]
)
HELD_OUT = _settings(
    [
        (192, 4, 2048, "oprl", 0),
        (384, 4, 4096, "grpo", 0),
        (256, 4, 8192, "grpo", 0),
        (384, 3, 2048, "oprl", 0),
        (192, 2, 8192, "oprl", 8),
        (384, 6, 2048, "grpo", 8),
    ]
)
"""Written down before any of them was measured; the constants of the estimate were chosen on `GRID`."""


class Digits(TextEnv):
    """Any text is an action, so that a model with random weights has the random agent's lengths. Half of them win."""

    instructions = ""
    fast = True

    def begin(self, options: dict[str, Any]) -> Any:
        self.left, self.sum = int(self.np_random.integers(8, 13)), 0
        return self._show()

    def parse_action(self, text: str) -> str:
        return text

    def play(self, action: str) -> Any:
        self.left -= 1
        self.sum += sum(map(ord, action))
        text, info = self._show()
        return text, 0.0, self.left == 0, info | {"success": self.sum % 2 == 0}

    def _show(self) -> tuple[str, dict[str, Any]]:
        digits = self.np_random.integers(0, 10, int(self.np_random.integers(25, 36)))
        return "".join(map(str, digits)), {"admissible_actions": [str(n) for n in range(100, 130)]}


register("Digits-v0", Digits)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def train_watched(path: str) -> None:
    """Trains `path` and prints how far the resident memory rose above that of a process with all libraries loaded."""
    from agentrl.config import load_config
    from agentrl.train.trainer import Trainer

    config = load_config(path)
    small = ["rollout.groups=1", "rollout.group_size=2", f"run_dir={config.run_dir}-warm"]
    warm = Trainer(load_config(path, small))
    warm.run()
    warm.close()
    del warm
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start = peak = resident()
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    trainer = Trainer(config)
    trainer.run()
    over.set()
    watcher.join()
    trainer.close()
    print("PEAK", peak - start)


def make_run(folder: Path, options: argparse.Namespace) -> Path:
    """Makes a random model and the settings of a run that trains it. Returns the settings' file."""
    from agentrl.config import RunConfig, dump_config
    from agentrl.evaluate.texts import environment_texts
    from agentrl.models.init import init_model

    groups = max(2, -(-options.budget * 5 // 4 // (8 * EPISODE)))  # a quarter more than a full micro-batch
    config = RunConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "iterations": options.iterations,
            "env": {"id": "Digits-v0", "instructions": "", "max_turns": 12},
            "model": {"path": str(folder / "model"), "threads": 1},
            "lora": {"rank": options.rank},
            "rollout": {"groups": groups, "group_size": 8, "max_new_tokens": 4},
            "credit": {"method": options.method},
            "policy_update": {"tokens_per_microbatch": options.budget, "kl_coef": 0.0},
            "eval": {"every": 0},
            "log": {"tensorboard": False, "progress": False},
        }
    )
    texts, words = environment_texts(config.env, 32)
    init_model(folder / "model", texts, words=words, hidden=options.hidden, layers=options.layers, heads=8)
    dump_config(config, folder / "run.yaml")
    return folder / "run.yaml"


def measure(path: Path, **environment: str) -> float:
    """Returns the bytes that a run of the settings `path` took, with further environment variables."""
    child = subprocess.run(
        [sys.executable, str(HERE), "--child", str(path)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise SystemExit(child.stderr[-2000:])
    return float(child.stdout.rpartition("PEAK ")[2])


def foretell(path: Path) -> dict[str, Any]:
    """Returns what `agentrl explain` foretells of the settings `path`, in bytes."""
    from agentrl.config import load_config
    from agentrl.train import estimate, footprint

    config = load_config(path)
    work = estimate.work_of(config, estimate.measure_lengths(config))
    items = footprint.memory(config, estimate.read_shape(config.model.path), work)
    return {
        "items": {item.name: item.value for item in items},
        "foretold": footprint.peak(items),
        "foretold_tensors": footprint.peak([item for item in items if item.name != "allocator"]),
    }


def check(options: argparse.Namespace, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs one setting, or takes what was measured from `known`. Returns what was foretold and measured, in bytes."""
    with tempfile.TemporaryDirectory() as name:
        path = make_run(Path(name), options)
        found = foretell(path)
        if known is not None:
            return known | found
        measured = measure(path)
        for played in Path(name).glob("run*/"):
            shutil.rmtree(played)
        tensors = measure(path, MALLOC_MMAP_THRESHOLD_="65536")
    return {
        "settings": {name: getattr(options, name) for name in ("hidden", "layers", "budget", "method", "rank")},
        "iterations": options.iterations,
        **found,
        "measured": measured,
        "measured_tensors": tensors,
    }


def row_of(result: dict[str, Any]) -> str:
    """A line of the table: settings, then foretold and measured MB with their ratio, as it is and tensors alone."""
    cells = [str(value) for value in result["settings"].values()]
    for kind in ("", "_tensors"):
        foretold, measured = result[f"foretold{kind}"], result[f"measured{kind}"]
        cells += [f"{foretold / 1e6:,.0f}", f"{measured / 1e6:,.0f}", f"{foretold / measured:.2f}"]
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the check; prints foretold and measured memory, and keeps them where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a micro-batch")
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--method", default="oprl", help="credit method")
    parser.add_argument("--rank", type=int, default=0, help="of LoRA adapters; 0: full training")
    parser.add_argument("--grid", action="store_true", help="a spread of shapes instead of one")
    parser.add_argument("--held-out", action="store_true", help="shapes that no constant was chosen on")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="foretell the runs of this --json file anew")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        train_watched(options.child)
        return []
    results = []
    print("| hidden | layers | budget | method | rank | foretold MB | measured | ratio | tensors | measured | ratio |")
    print("|---" * 11 + "|", flush=True)
    known = json.loads(options.measured.read_text()) if options.measured else []
    chosen = [one["settings"] for one in known] or (GRID if options.grid else HELD_OUT if options.held_out else [{}])
    for number, settings in enumerate(chosen):
        wanted = argparse.Namespace(**{**vars(options), **settings})
        results.append(check(wanted, known[number] if known else None))
        print(row_of(results[-1]), flush=True)
        if options.json:  # after each: the grid takes a while
            options.json.write_text(json.dumps(results, indent=2) + "\n")
    if len(results) == 1:
        for name, value in results[0]["items"].items():
            print(f"{name:12} {value / 1e6:9.1f} MB")
    return results


if __name__ == "__main__":
    main()
