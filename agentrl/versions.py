"""``versions.json``: with what a run or an evaluation was made."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from agentrl import __version__
from agentrl.files import atomic_write

VERSIONS = "versions.json"
PACKAGES = ("torch", "transformers", "gymnasium", "numpy", "vllm", "httpx")


def write_versions(folder: Path, packages: Sequence[str] = PACKAGES) -> None:
    """Writes ``versions.json``; what goes on in `folder` later writes it anew. No package is imported for it.

    Raises:
        UserError: the file cannot be written.
    """
    found = {"agentrl": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found |= {"system": platform.platform(), "cpus": str(os.cpu_count())}
    with atomic_write(folder / VERSIONS) as file:
        file.write(json.dumps(found, indent=1).encode() + b"\n")
