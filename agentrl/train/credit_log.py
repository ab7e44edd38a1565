"""What credit said, turn by turn, beside the trajectories it was said of: ``credit/iteration-*.jsonl``.

One line per trajectory that was trained on, in the order of the batch; a trajectory's line is found by its id:

    {"id": "000003-0001/4", "episode": [...], "step": [...], "reward": [...]}

`episode` and `step` are the two parts of each turn's advantage (`agentrl.credit.Advantage`); `reward` is each turn's
step reward, of the implicit PRM (the sum over its tokens) or of a served one, and is missing where the method uses
neither. Six significant digits: this is for reading, nothing is trained on it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from agentrl.batch.index import segment_sum
from agentrl.batch.rows import Batch
from agentrl.credit import Advantage, Signals
from agentrl.files import atomic_write

FOLDER = "credit"


def write_credit(run_dir: Path, iteration: int, batch: Batch, signals: Signals, advantage: Advantage) -> None:
    """Writes the credit of an iteration's turns, whole or not at all; an iteration played again replaces its file.

    Raises:
        UserError: the file cannot be written.
    """
    index = batch.index
    parts: dict[str, Any] = {"episode": advantage.episode, "step": advantage.step}
    if signals.token_reward is not None:
        parts["reward"] = segment_sum(signals.token_reward, index.turn_of_token, index.M)
    elif signals.turn_score is not None:
        parts["reward"] = signals.turn_score
    columns = {name: [float(f"{value:.6g}") for value in values.tolist()] for name, values in parts.items()}
    with atomic_write(run_dir / FOLDER / f"iteration-{iteration:06d}.jsonl") as file:
        start = 0
        for trajectory in batch.trajectories:
            end = start + len(trajectory.turns)
            line = {"id": trajectory.id, **{name: values[start:end] for name, values in columns.items()}}
            file.write(json.dumps(line).encode() + b"\n")
            start = end
