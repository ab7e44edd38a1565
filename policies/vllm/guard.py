"""Stands between this project's process and a vLLM server, so that neither outlives the other.

Run as a script (``guard.py FOLDERS COMMAND...``) it leads a process group with the server inside and reads from a pipe
that nobody writes to. The pipe's end says that the parent is gone, even where it was killed: then the group ends and
`FOLDERS`, which hold weights, are removed (their names are joined as in PATH). When the server itself ends, workers
that it left spinning end with it. A pipe, not the kernel's parent-death signal: that one fires when the *thread* that
started us ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    folders, *command = arguments
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to the group: the server shuts down, this process sees it out
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, restore_signals=True, preexec_fn=_default_signals)
    threading.Thread(target=_watch_parent, args=(folders.split(os.pathsep),), daemon=True).start()
    code = server.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    print(f"agentrl: the server process {how}", flush=True)
    _end_group()


def _default_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def _watch_parent(folders: Sequence[str]) -> None:
    sys.stdin.buffer.read()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    _end_group()


def _end_group() -> None:
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
