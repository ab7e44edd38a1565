"""Checkpoints: atomic directories that hold everything a run needs to go on as if it had never stopped.

    checkpoints/iteration-000010/
        policy/          model directory (safetensors, tokenizer): loads like any other model; with LoRA the adapter
                         alone, as peft reads it, and base.json: what it stands over
        prm/             the same for the PRM, and prm_reference/ where the reference is no longer the initial policy
        buffer/          trajectories that later updates may replay
        state.pt         optimisers, counters, random states (tensors and plain values: loads without unpickling code)
        state.json       the iteration, for people

A directory is written under a temporary name and renamed when it is complete: a kill at any moment leaves either the
old checkpoint or the new one, and the next write removes what it left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from agentrl.config import RunConfig, dotted
from agentrl.errors import DataError, UserError
from agentrl.models.load import write_model
from agentrl.models.lora import has_adapter, write_adapter

_PREFIX = "iteration-"
_NAME = re.compile(_PREFIX + r"\d{6,}")


def checkpoint_path(folder: Path, iteration: int) -> Path:
    """Where the checkpoint after `iteration` finished iterations lies."""
    return folder / f"{_PREFIX}{iteration:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    complete = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / "state.pt").exists()]
    return sorted(complete, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def write_checkpoint(
    folder: Path, iteration: int, models: dict[str, tuple[Any, Any]], state: dict[str, Any], buffer: Any, keep: int
) -> Path:
    """Writes a checkpoint and removes all but the newest `keep`.

    Args:
        folder: ``checkpoints/`` of the run.
        iteration: number of finished iterations.
        models: name -> (model, tokenizer), each written as a model directory, or as an adapter.
        state: what `torch.save` writes to ``state.pt``: tensors, numbers, strings, lists and dicts only.
        buffer: the trajectory buffer.
        keep: newest checkpoints to keep.

    Raises:
        UserError: the disk is full or not writable.
    """
    target = checkpoint_path(folder, iteration)
    fresh = folder / f".{target.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f".{_PREFIX}*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        fresh.mkdir()
        for name, (model, tokenizer) in models.items():
            if has_adapter(model):
                write_adapter(model, fresh / name)
            else:
                write_model(model, tokenizer, fresh / name)
        buffer.save(fresh / "buffer")
        (fresh / "state.json").write_text(json.dumps({"iteration": iteration}) + "\n")
        # Written last: a directory with a state is a complete one.
        torch.save(state, fresh / "state.pt")
        _sync(fresh)
        if target.exists():
            shutil.rmtree(target)
        fresh.rename(target)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(f"cannot write checkpoint {target}: {error}; earlier checkpoints are untouched") from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def read_state(path: Path) -> dict[str, Any]:
    """Reads ``state.pt`` of a checkpoint.

    Raises:
        DataError: it is broken.
    """
    try:
        state: dict[str, Any] = torch.load(path / "state.pt", weights_only=True)
    except Exception as error:
        raise broken(path, error) from error
    return state


def check_same_config(path: Path, stored: dict[str, Any], config: RunConfig, file: Path) -> None:
    """Checks that a checkpoint was written by the same run; settings that it does not know yet have their defaults.

    Raises:
        UserError: names the settings that differ.
    """
    ours, theirs, defaults = (
        dotted({key: value for key, value in values.items() if key not in ("run_dir", "name", "log")})
        for values in (config.model_dump(mode="json"), stored, RunConfig().model_dump(mode="json"))
    )
    changed = [key for key in ours if ours[key] != theirs.get(key, defaults.get(key))]
    changed += [key for key in theirs if key not in ours]
    if changed:
        shown = ", ".join(f"{key}={theirs.get(key)!r} then, {ours.get(key)!r} now" for key in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{path} was written with another configuration ({shown}{more}); resume with the one in {file}, or start a "
            "new run_dir"
        )


def broken(path: Path, error: Exception) -> DataError:
    """The error of a checkpoint that cannot be resumed from."""
    return DataError(f"checkpoint {path} cannot be read: {error}; remove it to resume from the one before")


def _sync(folder: Path) -> None:
    """Flushes the files of `folder` to disk, so that the rename never outruns them."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
