"""Our side of `vs_trl.py`, in a process of its own as TRL's is: `Trainer.run`, which takes turns with the benchmark.

python agentrl_side.py SETTINGS     # JSON; `method` is grpo or oprl
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from guessing import MAX_TURNS, PROBE, Turns, response
from guessing_env import ENV_ID, Guessing

from agentrl import RunConfig, __version__
from agentrl.train import Trainer


def config_of(settings: dict[str, Any]) -> RunConfig:
    """Returns the run: what TRL's side is told, in our words; everything else is our default."""
    return RunConfig(
        run_dir=settings["folder"],
        seed=settings["seed"],
        iterations=settings["steps"],
        env={"id": ENV_ID, "max_turns": MAX_TURNS},
        model={"path": settings["model"], "threads": settings["threads"]},
        rollout={
            "groups": settings["groups"],
            "group_size": settings["group_size"],
            "temperature": settings["temperature"],
            "max_new_tokens": settings["max_new_tokens"],
            "max_context_tokens": 2 * settings["max_tokens"],
        },
        credit={"method": settings["method"]},
        prm={"lr": settings["lr"]},
        policy_update={"lr": settings["lr"], "grad_clip": 1.0},
        eval={"every": 0},
        checkpoint={"every": settings["steps"]},
        log={"tensorboard": False, "progress": False},
    )


def probe(trainer: Trainer) -> list[int]:
    """Returns the ids of the game's `PROBE`, put together as a rollout does it."""
    first, action, said = PROBE
    chat, ids = trainer.policy.chat, trainer.policy.chat.encode_action(action)
    start = chat.start(Guessing().instructions, first, Guessing.tools)
    return [*start, *ids, *chat.extend(ids, response(said))]


def train(settings: dict[str, Any]) -> None:
    """Trains for `steps` steps, of which each waits for its turn."""
    turns = Turns()

    def on_iteration(metrics: dict[str, Any]) -> None:
        parts = {name: seconds for name, seconds in metrics["seconds"].items() if seconds > 0}
        played = {"tokens": metrics["action_tokens"], "trained": metrics["tokens"], "turns": metrics["turns"]}
        turns.step({**played, "parts": parts, "success": metrics["success"]})

    trainer = Trainer(config_of(settings), on_iteration=on_iteration)
    versions = {"agentrl": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    turns.ready({"probe": probe(trainer), "parameters": parameters, "versions": versions})
    trainer.run()


if __name__ == "__main__":
    train(json.loads(sys.argv[1]))
