"""Training side by side with TRL: the same model, game, tasks and batch; seconds per step and tokens per second.

    python benchmarks/vs_trl.py --json vs_trl.json

TRL's side is `GRPOTrainer(environment_factory=...)` in a virtual environment of its own, which this command makes
(1.5 GB); ours is `Trainer.run` with GRPO, and with OPRL, which trains a process reward model in every step on top.
Number guessing by a tool call (`guessing.py`), a Qwen2 of 0.93 M parameters that was cloned from scripted episodes
first, 4 groups of 8 (tasks differ by the secret, so that all have one prompt), one update a step, AdamW with a learning
rate that leaves the policy as it is, float32, one thread a side.

Each side is a process of its own and they take turns, so that a busy machine slows all of them; the first steps of each
are left out. Before anything is timed, the token ids of a conversation must be the same on both sides.

`speedup_grpo` and `speedup_oprl` are ratios of sampled tokens per second of whole steps, the median over the rounds:
seconds per step alone would flatter a side whose episodes happen to be shorter. They are in the output too, and so is
processor time, which a busy machine changes least.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import command, show, surroundings, table

HERE = Path(__file__).resolve().parent
PINNED = "torch==2.13.0"
NEEDED = ("trl==1.16.*", "transformers>=5.15,<6", "datasets", "accelerate", "jmespath")
SIDES = ("trl", "grpo", "oprl")
Step = dict[str, Any]


class Side:
    """A side's process, which trains when it is its turn.

    Args:
        name: of `SIDES`.
        python: interpreter.
        settings: of the run, the same for all sides.
        folder: for what the side writes.
    """

    def __init__(self, name: str, python: str, settings: Mapping[str, Any], folder: Path) -> None:
        folder.mkdir(parents=True)
        self.name, self.log = name, folder / "log.txt"
        own = {**settings, "method": name, "folder": str(folder / "run")}
        script = ["trl_side.py", "train"] if name == "trl" else ["agentrl_side.py"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, str(HERE / script[0]), *script[1:], json.dumps(own)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(settings["threads"]),
            )
        self.facts = self._read()

    def take_turn(self, steps: int) -> list[Step]:
        """Trains for `steps` steps; returns what is known of each."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return [self._read() for _ in range(steps)]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            printed = self.log.read_text()[-2000:]
            raise SystemExit(f"{self.name}: its process ended; the end of what it printed:\n{printed}")
        facts: dict[str, Any] = json.loads(line)
        return facts


def _environment(threads: int) -> dict[str, str]:
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}


def trl_python(venv: Path) -> str:
    """Returns the interpreter of TRL's environment, which is made where it is missing."""
    python, made = venv / "bin" / "python", venv / "installed"
    if not made.exists():
        print(f"making {venv} with TRL (1.5 GB, minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # torch first and pinned, as everywhere here: an unpinned one pulls gigabytes of CUDA on Linux.
        subprocess.run([*pip, PINNED], check=True)
        subprocess.run([*pip, *NEEDED, PINNED], check=True)
        made.touch()
    return str(python)


@contextlib.contextmanager
def sides(pythons: Mapping[str, str], settings: Mapping[str, Any], folder: Path) -> Iterator[dict[str, Side]]:
    """Starts the processes; ends them whatever happens."""
    started: dict[str, Side] = {}
    try:
        for name, python in pythons.items():
            started[name] = Side(name, python, settings, folder / name)
        yield started
    finally:
        for side in started.values():
            side.close()


def check_same(facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises SystemExit: the sides would not read the same tokens, or train networks of another size."""
    first, *others = facts
    for name in others:
        for what in ("probe", "parameters"):
            if facts[name][what] != facts[first][what]:
                raise SystemExit(
                    f"{first} and {name} differ in {what} and are not timed: {facts[first][what]} / {facts[name][what]}"
                )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Times the sides by turns, prints the tables, and returns the figures."""
    from guessing_env import make_model

    python = trl_python(options.venv)
    asked = subprocess.run([python, str(HERE / "trl_side.py"), "template"], capture_output=True, text=True, check=True)
    template = json.loads(asked.stdout)["chat_template"]
    with tempfile.TemporaryDirectory(prefix="vs-trl-") as scratch:
        folder = Path(scratch)
        model = options.model or folder / "model"
        if not (model / "config.json").exists():
            make_model(model, template, episodes=options.demonstrations, seed=options.seed, threads=options.threads)
        settings = {
            **{name: getattr(options, name) for name in ("seed", "threads", "groups", "group_size", "lr")},
            "model": str(model),
            "steps": options.warm_up + options.repeat * options.steps + 1,  # none of them is the last: no checkpoint
            "temperature": 1.0,
            "max_new_tokens": 48,
            "max_tokens": 512,
            "first_seed": options.seed * 1_000_003,  # `RunConfig.training_seeds`
        }
        rounds: list[dict[str, list[Step]]] = []
        with sides({"trl": python, "grpo": sys.executable, "oprl": sys.executable}, settings, folder) as found:
            check_same({name: side.facts for name, side in found.items()})
            for side in found.values():
                side.take_turn(options.warm_up)
            for number in range(options.repeat):
                order = list(found)[:: -1 if number % 2 else 1]
                rounds.append({name: found[name].take_turn(options.steps) for name in order})
                print(_line(number, rounds[-1]), flush=True)
            facts = {name: {k: v for k, v in side.facts.items() if k != "probe"} for name, side in found.items()}
            facts["prompt_tokens"] = len(found["trl"].facts["probe"])
    result = compare(rounds) | {"facts": facts, "surroundings": surroundings("cpu") | {"load": os.getloadavg()[0]}}
    settings = {key: value for key, value in settings.items() if key != "model"}
    show("Training against TRL", settings | {"repeat": options.repeat}, result["surroundings"])
    report(result)
    return result | {"settings": settings, "rounds": rounds}


def compare(rounds: Sequence[Mapping[str, Sequence[Step]]]) -> dict[str, Any]:
    """Returns the figures of each side, and how many times faster ours are.

    Args:
        rounds: per round and side its steps: `seconds`, `cpu_seconds`, `tokens` sampled, `turns`, `success`, and
            `parts` in seconds.
    """
    figures = {}
    for name in SIDES:
        steps = [step for each in rounds for step in each[name]]
        parts = dict.fromkeys(part for step in steps for part in step["parts"])
        figures[name] = {
            "seconds_per_step": median(step["seconds"] for step in steps),
            "cpu_seconds_per_step": median(step["cpu_seconds"] for step in steps),
            "tokens_per_second": sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps),
            "tokens_per_step": sum(step["tokens"] for step in steps) / len(steps),
            "turns_per_episode": sum(step["turns"] for step in steps) / len(steps),
            "success": sum(step["success"] for step in steps) / len(steps),
            "parts": {part: median(step["parts"].get(part, 0.0) for step in steps) for part in parts},
        }
    result: dict[str, Any] = {"sides": figures}
    for name in ("grpo", "oprl"):
        ratios = [_rate(each[name]) / _rate(each["trl"]) for each in rounds]
        result[f"speedup_{name}"] = median(ratios)
        result[f"speedups_{name}"] = ratios
        result[f"seconds_ratio_{name}"] = figures["trl"]["seconds_per_step"] / figures[name]["seconds_per_step"]
        result[f"cpu_seconds_ratio_{name}"] = (
            figures["trl"]["cpu_seconds_per_step"] / figures[name]["cpu_seconds_per_step"]
        )
        result[f"tokens_ratio_{name}"] = figures[name]["tokens_per_step"] / figures["trl"]["tokens_per_step"]
    return result


def _rate(steps: Sequence[Step]) -> float:
    """Sampled tokens per second of whole steps."""
    return float(sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps))


def _line(number: int, sides: Mapping[str, Sequence[Step]]) -> str:
    cells = [f"{name} {median(s['seconds'] for s in sides[name]):.2f} s {_rate(sides[name]):,.0f}/s" for name in SIDES]
    return f"round {number}: " + "   ".join(cells)


def report(result: Mapping[str, Any]) -> None:
    rows = [
        [
            name,
            f"{side['seconds_per_step']:.2f}",
            f"{side['cpu_seconds_per_step']:.2f}",
            f"{side['tokens_per_second']:,.0f}",
            f"{side['tokens_per_step']:,.0f}",
            f"{side['turns_per_episode']:.2f}",
            f"{side['success']:.0%}",
        ]
        for name, side in result["sides"].items()
    ]
    table(["side", "s/step", "CPU s/step", "tokens/s", "tokens/step", "turns", "success"], rows)
    for name, side in result["sides"].items():
        rest = side["seconds_per_step"] - sum(side["parts"].values())
        parts = {**side["parts"], "rest": rest}
        print(f"{name}, median seconds: " + "  ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items()))
    for name in ("grpo", "oprl"):
        print(
            f"speedup_{name} {result[f'speedup_{name}']:.2f}x by sampled tokens per second "
            f"(rounds: {', '.join(f'{ratio:.2f}' for ratio in result[f'speedups_{name}'])}); by seconds per step "
            f"{result[f'seconds_ratio_{name}']:.2f}x (CPU seconds {result[f'cpu_seconds_ratio_{name}']:.2f}x), with "
            f"{result[f'tokens_ratio_{name}']:.0%} of TRL's tokens per step"
        )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark with command-line `arguments` and returns its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="keep the figures there")
    parser.add_argument("--venv", type=Path, default=Path(".venv-trl"), help="TRL's environment; made if missing")
    parser.add_argument("--model", type=Path, metavar="DIR", help="model of both sides; made there if missing")
    parser.add_argument("--demonstrations", type=int, default=2500, help="episodes that the model is cloned from")
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--steps", type=int, default=3, help="of a side's turn")
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--warm-up", type=int, default=1, help="steps of each side that are not timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each side")
    return command(parser.parse_args(arguments), run)


if __name__ == "__main__":
    main()
