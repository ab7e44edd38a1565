"""How far off is the memory that `agentrl explain` foretells? A real run of a small model, in a process of its own.

The child first trains on two episodes, so that all libraries are loaded, then on the batch, watches its resident memory
and tells by how much the peak lay above the start. Python, torch and the tokenizer are thereby left out, as they are in
the estimate.

    python benchmarks/explain_check.py --json explain_check.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHILD = """
import ctypes, gc, sys
from pathlib import Path
from agentrl.config import load_config
from agentrl.train.trainer import Trainer

def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024

config = load_config(sys.argv[1])
few = load_config(sys.argv[1], ["rollout.groups=1", "rollout.group_size=2", f"run_dir={config.run_dir}-warm"])
Trainer(few).run()  # every library is loaded and every cache is warm from here on
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
start = resident("VmRSS")
trainer = Trainer(config)
peak = start
import threading
over = threading.Event()
def watch():
    global peak
    while not over.wait(0.002):
        peak = max(peak, resident("VmRSS"))
watcher = threading.Thread(target=watch)
watcher.start()
trainer.run()
over.set()
watcher.join()
print("PEAK", peak - start)
trainer.close()
"""


def make_run(folder: Path, options: argparse.Namespace) -> Path:
    """Makes a random model and the settings of a run that trains it. Returns the settings' file."""
    from agentrl.config import RunConfig, dump_config
    from agentrl.evaluate.texts import environment_texts
    from agentrl.models.init import init_model

    env = {"id": "Sokoban-v0", "kwargs": {"size": 6, "observation": "cells"}, "instructions": "", "max_turns": 10}
    config = RunConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "iterations": options.iterations,
            "env": env,
            "model": {"path": str(folder / "model")},
            "rollout": {"groups": 8, "group_size": 8, "max_new_tokens": 4},
            "credit": {"method": options.method},
            "policy_update": {"tokens_per_microbatch": options.budget},
            "eval": {"every": 0},
            "log": {"tensorboard": False, "progress": False},
        }
    )
    texts, words = environment_texts(config.env, 32)
    init_model(folder / "model", texts, words=words, hidden=options.hidden, layers=options.layers, heads=8)
    dump_config(config, folder / "run.yaml")
    return folder / "run.yaml"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the check; prints foretold and measured memory, and keeps them where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a micro-batch")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--method", default="oprl", help="credit method")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        path = make_run(Path(name), options)
        from agentrl.config import load_config
        from agentrl.train import estimate

        config = load_config(path)
        work = estimate.work_of(config, estimate.measure_lengths(config))
        items = estimate.memory(config, estimate.read_shape(config.model.path), work)
        foretold = estimate.peak(items)
        child = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=False)
    if child.returncode:
        raise SystemExit(child.stderr[-2000:])
    measured = float(child.stdout.rpartition("PEAK ")[2])
    for item in items:
        print(f"{item.name:12} {item.value / 1e6:9.1f} MB  {item.how}")
    print(f"foretold {foretold / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB: ratio {foretold / measured:.2f}")
    result = {
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
        "items": {item.name: item.value for item in items},
        "foretold": foretold,
        "measured": measured,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
