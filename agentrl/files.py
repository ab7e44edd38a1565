"""Files that are written whole or not at all, and the check that they can be written before the work starts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from agentrl.errors import UserError


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` that takes its place when the block ends without an error.

    Whoever reads `path` sees the old content or the new one, never a part, also after a kill or a full disk.

    Raises:
        UserError: the file cannot be written (no permission, disk full, a folder of that name).
    """
    path = Path(path)
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def check_writable(folder: str | os.PathLike[str], need_bytes: int = 0) -> Path:
    """Makes `folder` where it is missing and proves, by writing a file, that results can be kept there.

    Args:
        folder: where a run, a model or a data file is about to be written.
        need_bytes: free space that the run will need, in bytes.

    Raises:
        UserError: not writable, or less than `need_bytes` free.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
    if free < need_bytes:
        raise UserError(
            f"{folder} has {free / 2**20:,.0f} MiB free, but {need_bytes / 2**20:,.0f} MiB are needed; "
            "free some space or choose another folder"
        )
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
