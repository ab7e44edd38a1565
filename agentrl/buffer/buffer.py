"""`TrajectoryBuffer`: the trajectories of the last k iterations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from agentrl.buffer.jsonl import read_jsonl, write_jsonl
from agentrl.errors import DataError, UserError
from agentrl.files import atomic_write
from agentrl.types import Trajectory

_INDEX = "buffer.json"


class TrajectoryBuffer:
    """Keeps the trajectories of the last `keep_iterations` iterations, oldest first.

    Everything is kept, also episodes that cannot be scored: who compares or trains leaves those out
    (`Trajectory.scorable`), who counts or stores them does not.
    """

    def __init__(self, keep_iterations: int = 1) -> None:
        if keep_iterations < 1:
            raise UserError(f"keep_iterations={keep_iterations}: a buffer keeps at least 1 iteration")
        self.keep_iterations = keep_iterations
        self._iterations: dict[int, list[Trajectory]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._iterations.values()))

    def append(self, trajectories: Iterable[Trajectory], iteration: int) -> None:
        """Adds `trajectories` to `iteration`, the newest so far or a new one, and drops what is older than kept.

        Raises:
            UserError: `iteration` is older than the newest in the buffer.
        """
        if self._iterations and iteration < (newest := max(self._iterations)):
            raise UserError(f"iteration {iteration} cannot follow iteration {newest} in the buffer")
        self._iterations.setdefault(iteration, []).extend(trajectories)
        for old in list(self._iterations)[: -self.keep_iterations]:
            del self._iterations[old]

    def iterations(self) -> list[int]:
        """Returns the iterations held, oldest first."""
        return list(self._iterations)

    def latest(self, k: int = 1) -> list[Trajectory]:
        """Returns the trajectories of the last `k` iterations held (fewer where there are fewer), oldest first."""
        return [t for iteration in self.iterations()[max(len(self._iterations) - k, 0) :] for t in self.of(iteration)]

    def of(self, iteration: int) -> list[Trajectory]:
        """Returns the trajectories of `iteration`; none where it is not held."""
        return list(self._iterations.get(iteration, ()))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the buffer to `folder`: one JSONL file per iteration, then the index that names them.

        Raises:
            UserError: the folder cannot be written.
        """
        folder = Path(folder)
        for iteration, trajectories in self._iterations.items():
            write_jsonl(folder / _file_name(iteration), trajectories)
        index = {"keep_iterations": self.keep_iterations, "iterations": self.iterations()}
        with atomic_write(folder / _INDEX) as file:
            file.write(json.dumps(index).encode() + b"\n")
        kept = {_file_name(iteration) for iteration in self._iterations}
        for stale in folder.glob("iteration_*.jsonl"):
            if stale.name not in kept:
                stale.unlink()

    @classmethod
    def load(cls, folder: str | os.PathLike[str], keep_iterations: int | None = None) -> TrajectoryBuffer:
        """Returns the buffer that `save` wrote to `folder`, keeping `keep_iterations` (None: as many as it did).

        Raises:
            DataError: the folder holds no buffer, or a broken one.
        """
        path = Path(folder) / _INDEX
        try:
            index = json.loads(path.read_bytes())
            buffer = cls(keep_iterations or index["keep_iterations"])
            iterations = [int(iteration) for iteration in index["iterations"]]
        except OSError as error:
            raise DataError(f"no trajectory buffer in {str(folder)!r}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not the index of a trajectory buffer: {error!r}") from None
        for iteration in iterations:
            buffer.append(read_jsonl(Path(folder) / _file_name(iteration)), iteration)
        return buffer


def _file_name(iteration: int) -> str:
    return f"iteration_{iteration:06d}.jsonl"
