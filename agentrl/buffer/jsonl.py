"""Trajectories as JSON lines: one episode a line, exact in both directions.

Floats are written with the fewest digits that read back to the same bits; NaN and infinities as the constants that
Python's `json` also writes. A line that is broken or cut off costs that line only: the error names file and line, and
`on_error="skip"` returns all the others.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from agentrl.errors import DataError, UserError
from agentrl.files import atomic_write
from agentrl.images import attach_images, save_images
from agentrl.types import Trajectory


def write_jsonl(path: str | os.PathLike[str], trajectories: Iterable[Trajectory]) -> None:
    """Writes `trajectories` to `path`, whole or not at all (a temporary file takes its place at the end).

    Pictures in them are written first, below `path`'s folder (`agentrl.images`).

    Raises:
        DataError: a trajectory's `info`, `task` or `metadata` holds something that JSON cannot.
        UserError: a file cannot be written.
    """
    trajectories = list(trajectories)
    save_images(Path(path).parent, trajectories)
    with atomic_write(path) as file:
        for trajectory in trajectories:
            file.write(_to_line(trajectory))


def append_line(file: BinaryIO, trajectory: Trajectory) -> None:
    """Appends one trajectory to an open file (mode ``"ab"``) in one write, after its pictures.

    Raises:
        DataError, UserError: as `write_jsonl`.
    """
    save_images(Path(file.name).parent, [trajectory])
    line = _to_line(trajectory)
    try:
        file.write(line)
        file.flush()
    except OSError as error:
        raise UserError(f"cannot write {file.name}: {error.strerror or error}") from error


def read_jsonl(
    path: str | os.PathLike[str],
    *,
    on_error: Literal["raise", "skip"] = "raise",
    on_skip: Callable[[DataError], None] | None = None,
) -> list[Trajectory]:
    """Returns the trajectories in `path`, in order. Empty lines are ignored.

    Args:
        path: file that `write_jsonl` wrote, or any JSONL file of `Trajectory` objects.
        on_error: what a broken line does: end the reading, or lose that line alone.
        on_skip: called with the error of each skipped line; None warns.

    Raises:
        DataError: no such file, or (``raise``) a line that is no trajectory; names file, line and reason.
    """
    path = Path(path)
    skipped = on_skip or (lambda error: warnings.warn(f"skipped {error}", stacklevel=3))
    trajectories = []
    try:
        with path.open("rb") as file:
            # Bytes are split at new lines only; text lines would also end at U+2028, which JSON strings may hold.
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    trajectories.append(_from_line(line))
                except (
                    ValueError,
                    RecursionError,
                ) as error:  # pydantic.ValidationError, json's and Unicode's are ValueErrors
                    broken = DataError(f"{path} line {number}: {_reason(line, error)}")
                    if on_error == "raise":
                        raise DataError(
                            f"{broken} (to read all other lines: on_error='skip', or --skip-broken)"
                        ) from None
                    skipped(broken)
    except FileNotFoundError:
        raise DataError(f"no trajectory file {str(path)!r}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    attach_images(path.parent, trajectories)
    return trajectories


def _to_line(trajectory: Trajectory) -> bytes:
    # Half of a surrogate pair (a model's bytes cut in the middle) has no UTF-8: pydantic refuses it in values and
    # replaces it in keys. As an ASCII escape of the slower `json` it survives.
    try:
        line = trajectory.model_dump_json()
        if "\ufffd" not in line:
            return line.encode() + b"\n"
    except PydanticSerializationError:
        pass
    try:
        return json.dumps(trajectory.model_dump(mode="python")).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise DataError(f"trajectory {trajectory.id!r} cannot be written as JSON: {error}") from None


def _from_line(line: bytes) -> Trajectory:
    try:
        return Trajectory.model_validate_json(line)
    except ValidationError as error:
        if error.errors(include_url=False)[0]["type"] != "json_invalid":
            raise
        return Trajectory.model_validate(json.loads(line.decode()))  # json also reads halves of surrogate pairs


def _reason(line: bytes, error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "not a trajectory: it nests deeper than can be read"
    if isinstance(error, ValidationError):
        detail = error.errors(include_url=False)[0]
        return f"not a trajectory: {'.'.join(map(str, detail['loc'])) or 'the line'}: {detail['msg']}"
    kind = "broken JSON" if line.endswith(b"\n") else "cut off before its end"
    return f"{kind}: {f'{error.msg} at character {error.pos}' if isinstance(error, json.JSONDecodeError) else error}"
