"""Runs that die, or are told to stop, at a chosen moment: ``python doomed.py JOBS.json MODEL``.

JOBS.json holds a list of jobs; each is an `agentrl` command in a process of its own, forked once the heavy packages are
loaded (a model takes them all). ``plan`` gives signals to the process when the environment is reset for the n-th time,
``dies_writing`` kills it when the n-th checkpoint is complete under its temporary name. How each job ended goes to
standard output as JSON: an exit code, or minus the signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from toys import register

from environments.sokoban.env import SokobanEnv

TESTS = Path(__file__).parent


class Doomed(SokobanEnv):
    """Sokoban that sends signals to its own process."""

    resets = 0
    plan: dict[int, list[int]] = {}

    def begin(self, options: dict[str, Any]) -> Any:
        Doomed.resets += 1
        for number in Doomed.plan.get(Doomed.resets, ()):
            os.kill(os.getpid(), number)
        return super().begin(options)


register("Doomed-v0", Doomed, max_turns=10)


def die_writing(nth: int) -> None:
    """Kills this process in the middle of the n-th checkpoint: all is on the disk, the rename is still to come."""
    from agentrl.train import checkpoint

    synced, real = [], checkpoint._sync

    def sync(folder: Path) -> None:
        real(folder)
        synced.append(folder)
        if len(synced) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._sync = sync


def play(job: dict[str, Any]) -> None:
    """Runs the job in this process and ends it."""
    from agentrl.cli import main

    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    Doomed.plan = {int(reset): signals for reset, signals in job.get("plan", {}).items()}
    if nth := job.get("dies_writing"):
        die_writing(nth)
    sys.argv = ["agentrl", *job["argv"]]
    code = 1
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    import agentrl.train.trainer  # noqa: F401
    from agentrl.models.load import load_model, load_tokenizer

    load_model(sys.argv[2]), load_tokenizer(sys.argv[2])
    sys.modules["doomed"] = sys.modules["__main__"]
    endings = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if (child := os.fork()) == 0:
            play(job)
        endings.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(endings))
