"""The folder through which weights reach a server: shared memory where there is some."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import torch

from agentrl.errors import UserError
from agentrl.models.load import distinct

_SHARED_MEMORY = Path("/dev/shm")


class Exchange:
    """A private folder with the newest weights in it.

    Args:
        need_bytes: size of the weights. Two versions lie there for a moment.
        folder: an existing one to use and to leave; None: one in shared memory, or else on the disk.

    Raises:
        UserError: no room, or no such folder.
    """

    def __init__(self, need_bytes: int, folder: Path | None = None) -> None:
        self._ours = folder is None
        if folder is not None:
            if not folder.is_dir():
                raise UserError(f"exchange={str(folder)!r} is no folder; name one that the server can read too")
            self.folder = folder.resolve()
            return
        places = [str(_SHARED_MEMORY)] if _SHARED_MEMORY.is_dir() else []
        for place in (*places, tempfile.gettempdir()):
            if shutil.disk_usage(place).free > 2 * need_bytes + (64 << 20):
                self.folder = Path(tempfile.mkdtemp(prefix="agentrl-vllm-", dir=place))  # for our eyes only (0700)
                weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
                return
        raise UserError(
            f"no room to hand {2 * need_bytes / 2**30:.1f} GiB of weights to vLLM, neither in {_SHARED_MEMORY} nor in "
            f"{tempfile.gettempdir()}; free some, or let TMPDIR name another place"
        )

    def write(self, weights: Mapping[str, torch.Tensor], version: int) -> tuple[str, list[str]]:
        """Writes `weights`; the version before goes. Returns the file's name and the tensors' names in order."""
        from safetensors.torch import save_file

        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in distinct(weights).items()}
        name = f"weights-{version}.safetensors"
        save_file(kept, self.folder / f".{name}")
        self._clear()
        (self.folder / f".{name}").rename(self.folder / name)
        return name, list(kept)

    def _clear(self) -> None:
        for old in self.folder.glob("weights-*.safetensors"):
            old.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the folder, or from a given one what lies there of ours."""
        if self._ours:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self._clear()
