"""What does turn credit cost? One iteration of each method on the very same episodes, against GRPO's.

    python benchmarks/iteration.py
    python benchmarks/iteration.py --model runs/demo/base --method oprl --method prime rollout.groups=24

The episodes are played once for each repeat; then every method judges them, assigns credit and updates its own copy of
the policy, by turns in one process. The methods' settings are those of a benchmark suite. Seconds are the least of the
repeats, ratios the median over the repeats of total against total.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import command, show, surroundings, table

from agentrl.benchmark.suite import load_suite, merged
from agentrl.config.load import check_keys, checked, load_config
from agentrl.config.schema import RunConfig
from agentrl.train.gather import gather
from agentrl.train.trainer import Trainer

PARTS = ("generation", "environment", "prm", "policy", "other")


def trainers(options: argparse.Namespace, folder: Path) -> dict[str, Trainer]:
    """Returns one trainer per method, all from the same model."""
    base = load_config(options.config, options.overrides)
    model = options.model or random_model(base, folder / "model")
    suite = load_suite(options.suite)
    made = {}
    for name in dict.fromkeys([suite.baseline, *(options.method or suite.methods)]):
        data = merged(base.model_dump(mode="json"), suite.methods[name])
        if data["env"] != base.env.model_dump(mode="json"):
            continue  # other rewards are other episodes
        config = checked(RunConfig, check_keys(RunConfig, data, "", {}), {})
        config.run_dir, config.model.path, config.model.threads = str(folder / name), model, options.threads
        config.log.tensorboard = config.buffer.write_trajectories = False
        made[name] = Trainer(config)
    return made


def random_model(config: RunConfig, path: Path) -> str:
    """Makes a tiny model with random weights: slower to finish an episode than a trained one, and never solving it."""
    from agentrl.evaluate.texts import environment_texts
    from agentrl.models.init import init_model

    texts, words = environment_texts(config.env, 16)
    init_model(path, texts, words=words)
    return str(path)


def run(options: argparse.Namespace) -> dict[str, Any]:
    around = surroundings("cpu")
    settings = {name: getattr(options, name) for name in ("config", "model", "overrides", "repeat", "threads")}
    show("One iteration by credit method, on the same episodes", settings, around)
    with tempfile.TemporaryDirectory() as folder:
        found = trainers(options, Path(folder))
        first = next(iter(found))
        start = copy.deepcopy(found[first].model.state_dict())
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in found}
        for repeat in range(options.repeat + 1):
            player = found[first]
            player.model.load_state_dict(start)
            player._sync()
            gathered = gather(player.collector, player.dealer, player.config, repeat)
            for name, trainer in found.items():
                # Everybody updates the policy that played.
                trainer.model.load_state_dict(start)
                trainer._gather = lambda gathered=gathered: gathered  # type: ignore[method-assign]
                metrics = trainer.iterate()
                if repeat:  # the first warms up
                    seconds[name].append(metrics["seconds"])
        for trainer in found.values():
            trainer.close()
    return {"around": around, "settings": settings, "methods": report(seconds)}


def report(seconds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Prints the table; returns its figures."""
    baseline = next(iter(seconds))
    out, rows = {}, []
    for name, own in seconds.items():
        ratio = median(sum(a.values()) / sum(b.values()) for a, b in zip(own, seconds[baseline], strict=True))
        parts = {part: min(s[part] for s in own) for part in PARTS}
        out[name] = {"ratio": ratio, "seconds": parts, "total": sum(parts.values())}
        rows.append([name, *(f"{parts[part]:.2f}" for part in PARTS), f"{out[name]['total']:.2f}", f"{ratio:.2f}x"])
    table(["method", *PARTS, "total", f"of {baseline}"], rows)
    return out


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/sokoban_oprl.yaml", help="run configuration")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings over it")
    parser.add_argument("--suite", default="benchmarks/suite.yaml", help="settings of the methods")
    parser.add_argument("--method", action="append", help="only this one of the suite; may be repeated")
    parser.add_argument("--model", help="model directory (a tiny one with random weights)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    return command(parse(arguments), run)


if __name__ == "__main__":
    main()
