"""Fetches the charting library of the report again: uPlot (MIT), one pinned version, checked by its hash.

    python agentrl/report/web/vendor.py        (needs npm)

The files lie in `vendor/` as they came; nothing is fetched when a report is made. To take another version, change
`VERSION` and `SHA256` (of the package's archive).
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "1.6.32"
SHA256 = "4b8a8191e425658e3ea8c8c1314b0fc679c861ee3a1af2b20c7b16ba50b5133d"
FILES = {
    "package/dist/uPlot.iife.min.js": "uPlot.iife.min.js",
    "package/dist/uPlot.min.css": "uPlot.min.css",
    "package/LICENSE": "uPlot.LICENSE",
}
FOLDER = Path(__file__).parent / "vendor"


def unpack(archive: bytes, folder: Path = FOLDER) -> None:
    """Writes the files of `FILES` from the package's archive to `folder`.

    Raises:
        ValueError: the archive is another one than was pinned.
    """
    digest = hashlib.sha256(archive).hexdigest()
    if digest != SHA256:
        raise ValueError(f"uPlot {VERSION}: the archive's sha256 is {digest}, not {SHA256}")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for source, target in FILES.items():
            file = tar.extractfile(source)
            assert file is not None, f"{source} is a folder"
            (folder / target).write_bytes(file.read())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(["npm", "pack", "--silent", f"uplot@{VERSION}"], cwd=work, check=True, stdout=subprocess.DEVNULL)
        unpack((Path(work) / f"uplot-{VERSION}.tgz").read_bytes())
    sys.stdout.write(f"uPlot {VERSION} -> {FOLDER}\n")
