"""An environment that ends or stops the run that plays it, once: `mortal:Mortal-v0`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from toys import Echo, register


class Mortal(Echo):
    """Echo. In the `at`-th episode of a process, unless the file `marker` says that it has happened already, it

    * kills the process (``fate: dies``), or
    * asks the process that started it to stop, and plays on when the request has come back (``fate: stops``).
    """

    begun = 0

    def __init__(self, fate: str | None = None, marker: str = "", at: int = 28) -> None:
        super().__init__()
        self.fate, self.marker, self.at = fate, Path(marker), at

    def begin(self, options: dict[str, Any]) -> Any:
        Mortal.begun += 1
        if self.fate and Mortal.begun == self.at and not self.marker.exists():
            self.marker.touch()
            if self.fate == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            os.kill(os.getppid(), signal.SIGTERM)
            while not signal.getsignal(signal.SIGTERM).__self__.requested:
                time.sleep(0.01)
        return super().begin(options)


register("Mortal-v0", Mortal)
