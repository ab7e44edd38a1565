"""Model directories: loaded, checked and written, with errors that say what is missing and how to set it."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentrl.errors import ModelError, UserError
from agentrl.files import check_writable
from agentrl.models.chat import HOW_TO_SET, ChatCodec
from agentrl.models.memory import memory_told, out_of_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentrl.models.vision import ImageReader

DType = Literal["float32", "bfloat16"]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_CHUNK = 1 << 22
"""Elements of a tensor that `fingerprint` reads at once (32 MB of int64)."""


def check_model_dir(path: str | Path) -> None:
    """Checks that `path` holds all that training a chat model needs, before any weights are read.

    A hub name (``org/name``, where no directory ``org`` exists here) passes unchecked.

    Raises:
        ModelError: no such directory (with the nearest names), or what it lacks: config, weights, tokenizer, chat
            template, padding token, end token; with the way to set each. Also a chat template that `ChatCodec` cannot
            take apart, and a tokenizer larger than the model's vocabulary.
    """
    directory = _directory(path)
    if directory is None:
        return
    missing = _missing_files(directory)
    if _has_any(directory, _TOKENIZERS):
        tokenizer = load_tokenizer(directory)
        missing += _missing_tokens(tokenizer, directory)
        if not missing:
            ChatCodec(tokenizer)
    if missing:
        raise ModelError(f"model directory {str(path)!r}: " + "; ".join(missing))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model directory or hub name.

    Raises:
        ModelError: there is none, it is broken, or the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    directory = _directory(path)
    if directory is not None and not _has_any(directory, _TOKENIZERS):
        raise ModelError(f"model directory {str(path)!r}: {_no_tokenizer()}")
    with _loading("tokenizer", path, directory):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory or str(path))
    return tokenizer


def load_network_config(path: str | Path) -> Any:
    """Loads the configuration of a model directory or hub name: its sizes, no weights.

    Raises:
        ModelError: there is none, it is broken, or the hub cannot be reached.
    """
    from transformers import AutoConfig

    directory = _directory(path)
    with _loading("configuration", path, directory):
        return AutoConfig.from_pretrained(directory or str(path))


def load_model(
    path: str | Path,
    *,
    dtype: DType = "float32",
    device: str = "cpu",
    train: bool = False,
    attn_implementation: str = "agentrl",
) -> PreTrainedModel:
    """Loads a causal language model, with or without eyes, for acting or for training.

    A vision-language model gets its image processor as `model.image_reader` (see `agentrl.models.vision`).

    The model is in evaluation mode in both cases: dropout would make the trainer's log-probs differ from those that
    were sampled from.

    Args:
        path: directory or hub name.
        dtype: precision of forward and backward passes. Weights that take gradients stay float32 all the same and the
            passes run under autocast (`agentrl.models.attention.precision`); those for acting only are of this type.
        device: e.g. ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        train: whether the weights take gradients.
        attn_implementation: name in transformers' attention registry.

    Raises:
        ModelError: files missing or broken, weights that are not all there, no such device, an unreachable hub, not
            enough memory (with what the weights take, and how to lower it).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    import agentrl.models.attention  # noqa: F401  (registers "agentrl")

    if dtype not in ("float32", "bfloat16"):
        raise ModelError(f"dtype {dtype!r}: weights are loaded as 'float32' or 'bfloat16'")
    directory = _directory(path)
    held: DType = "float32" if train else dtype
    what, way = f"the model {str(path)!r} on {device!r}", _smaller(dtype, train)
    with memory_told(what, way, lambda: _weight_bytes(directory, held)):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            if out_of_memory(error):  # a GPU that others have filled
                raise
            reason = str(error).partition("\n")[0]
            raise ModelError(f"device {device!r} cannot be used here ({reason}); 'cpu' always can") from error
    if directory is not None and (missing := _missing_files(directory, tokenizer=False)):
        raise ModelError(f"model directory {str(path)!r}: " + "; ".join(missing))
    with _loading("model", path, directory), memory_told(what, way, lambda: _weight_bytes(directory, held)):
        config = AutoConfig.from_pretrained(directory or str(path))
        sees = hasattr(config, "vision_config") and hasattr(config, "image_token_id")
        loaded: Any = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(
            directory or str(path),
            dtype=getattr(torch, held),
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
    model, report = loaded
    if absent := sorted(report["missing_keys"]):
        raise ModelError(
            f"model {str(path)!r}: {len(absent)} weights of {type(model).__name__} are not in its files and would be "
            f"random, e.g. {absent[0]!r}; is config.json the one that these weights were saved with?"
        )
    with memory_told(what, way, lambda: sum(t.nbytes for t in distinct(model).values())):
        ready: PreTrainedModel = model.to(device).eval().requires_grad_(train)
    if sees:
        ready.image_reader = _load_reader(path, directory, config.image_token_id)  # type: ignore[assignment]
    if train and dtype != "float32":
        ready.compute_dtype = getattr(torch, dtype)
    return ready


def _load_reader(path: str | Path, directory: Path | None, token_id: int) -> ImageReader:
    from transformers import AutoImageProcessor

    from agentrl.models.vision import ImageReader

    if directory is not None and not _has_any(directory, _PROCESSORS):
        raise ModelError(
            f"model directory {str(path)!r}: no image processor (preprocessor_config.json), and the model reads "
            "pictures: copy the file from the model these weights come from, or save one with "
            "`image_processor.save_pretrained(directory)`"
        )
    with _loading("image processor", path, directory):
        # Pillow's version also where torchvision is installed: the same pixels on every machine.
        processor = AutoImageProcessor.from_pretrained(directory or str(path), backend="pil")
    return ImageReader(processor, token_id)


def check_model_output(path: str | Path) -> Path:
    """Proves that a model can be written to `path`, before the work.

    Raises:
        UserError: the place cannot be written, or holds something that is no model.
    """
    path = Path(path)
    _check_replaceable(path)
    check_writable(path.parent)
    return path


def _check_replaceable(path: Path) -> None:
    if path.exists() and not (path / "config.json").exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(
            f"cannot write a model to {str(path)!r}, which holds something that is no model; give a new directory"
        )


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Writes a model directory (safetensors) that replaces `path` only when it is complete.

    Raises:
        UserError: the directory cannot be written, or `path` holds something that is no model.
    """
    from safetensors import SafetensorError

    target = Path(path).expanduser().resolve()
    _check_replaceable(target)
    fresh = target.with_name(f".{target.name}.new-{os.getpid()}")
    stale = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        fresh.mkdir(parents=True)
        write_model(model, tokenizer, fresh)
        if target.exists():
            target.rename(stale)
        fresh.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write a model to {str(path)!r}: {error}") from error
    finally:
        if stale.exists() and not target.exists():
            stale.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes weights (safetensors), tokenizer and image processor (if it has one) into the new folder `folder`.

    Not atomically: see `save_model`.
    """
    with _no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if (reader := getattr(model, "image_reader", None)) is not None:
            reader.processor.save_pretrained(folder)
    mode = (folder / "config.json").stat().st_mode
    for weights in folder.glob("*.safetensors"):  # the library writes them readable by their owner alone
        weights.chmod(mode)


def fingerprint(weights: torch.nn.Module | Mapping[str, torch.Tensor]) -> str:
    """Returns a short hash of the weights: 16 hex digits.

    Each tensor is read as integers and summed with odd weights modulo 2^64: exact, so that it depends neither on the
    device nor on the number of threads, and any single changed element changes it. Tied tensors count once.

    Args:
        weights: a module, or its state dict.
    """
    whole = Fingerprint()
    for name, tensor in distinct(weights).items():
        whole.add(name, tensor)
    return whole.hexdigest()


def files_fingerprint(folder: str | Path) -> str:
    """Returns a hash of the weights in the safetensors files of `folder`; empty where there are none."""
    from safetensors import safe_open

    whole, paths = Fingerprint(), sorted(Path(folder).glob("*.safetensors"))
    for path in paths:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            for name in sorted(file.keys()):
                whole.add(name, file.get_tensor(name))
    return whole.hexdigest() if paths else ""


class Fingerprint:
    """`fingerprint`, tensor by tensor, for weights that are never all in one place."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=8)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes in one tensor."""
        self._digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_checksum(tensor)}\n".encode())

    def hexdigest(self) -> str:
        """The hash of what was added, in this order."""
        return self._digest.hexdigest()


def distinct(weights: torch.nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors by name, of tied ones the first."""
    import torch

    tensors = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
    kept, seen = {}, set()
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = tensor
    return kept


def _checksum(tensor: torch.Tensor) -> int:
    import torch

    flat = tensor.detach().reshape(-1).contiguous()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    total = 0
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].view(integers).to(torch.int64)
        odd = torch.arange(2 * start + 1, 2 * (start + part.numel()), 2, device=part.device)
        total += int((part * (odd * 0x9E3779B97F4A7C1 | 1)).sum())
    return total % 2**64


def _directory(path: str | Path) -> Path | None:
    """Returns the local directory, or None for a hub name.

    Raises:
        ModelError: neither.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists():
        raise ModelError(f"model {str(path)!r} is a file; give the directory that holds config.json and the weights")
    if _HUB_NAME.fullmatch(str(path)) and not directory.parent.is_dir():
        return None
    parent = directory.parent
    while not parent.is_dir():
        parent = parent.parent
    names = [entry.name for entry in parent.iterdir() if entry.is_dir()] if os.access(parent, os.R_OK) else []
    wanted = directory.relative_to(parent).parts[0]
    close = [str(parent / name) for name in difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)]
    hint = "; did you mean " + " or ".join(map(repr, close)) + "?" if close else ""
    raise ModelError(
        f"no model directory {str(path)!r}{hint} (agentrl init-model makes one, agentrl fetch-model gets one; hub "
        "names are org/name)"
    )


def _has_any(directory: Path, names: tuple[str, ...]) -> bool:
    return any((directory / name).exists() for name in names)


def _no_tokenizer() -> str:
    return (
        "no tokenizer (tokenizer.json): copy the tokenizer files of the model these weights come from, "
        "or save one with `tokenizer.save_pretrained(directory)`"
    )


def _missing_files(directory: Path, tokenizer: bool = True) -> list[str]:
    missing = []
    if not (directory / "config.json").exists():
        adapter = (directory / "adapter_config.json").exists()
        missing.append(
            "no config.json: it holds a LoRA adapter; merge it into its base model (agentrl export RUN OUT)"
            if adapter
            else "no config.json: it is no model saved with `model.save_pretrained(directory)`"
        )
    elif not _has_any(directory, _WEIGHTS):
        missing.append("no weights (model.safetensors): the download or copy is incomplete")
    for index in directory.glob("*.index.json"):
        with contextlib.suppress(ValueError, KeyError, AttributeError):
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if lost := [shard for shard in shards if not (directory / shard).exists()]:
                missing.append(f"weight file {lost[0]} of {len(shards)} is missing: the download or copy is incomplete")
    if tokenizer and not _has_any(directory, _TOKENIZERS):
        missing.append(_no_tokenizer())
    return missing


def _missing_tokens(tokenizer: PreTrainedTokenizerBase, directory: Path) -> list[str]:
    present = {
        "chat template": bool(tokenizer.chat_template),
        "pad token": tokenizer.pad_token_id is not None,
        "end token": tokenizer.eos_token_id is not None,
    }
    missing = [f"no {thing}: {HOW_TO_SET[thing]}" for thing, there in present.items() if not there]
    with contextlib.suppress(OSError, ValueError):
        size = json.loads((directory / "config.json").read_text()).get("vocab_size")
        if isinstance(size, int) and len(tokenizer) > size:
            missing.append(
                f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary only {size}: they do not belong "
                "together, or the model needs `model.resize_token_embeddings(len(tokenizer))`"
            )
    return missing


def _smaller(dtype: DType, train: bool) -> str:
    """How a model is made to fit."""
    half = "dtype=bfloat16 takes half" if dtype == "float32" else ""
    if train:  # trained weights are float32 in any case
        with_half = f" (frozen weights with model.{half})" if half else ""
        return (
            f"train adapters with lora.rank=16{with_half}, or a smaller model; policy_update.tokens_per_microbatch and "
            "rollout.groups lower what a run takes on top (agentrl explain shows each part)"
        )
    return f"{half or 'dtype is bfloat16 already'}, else take a smaller model or another device"


def _weight_bytes(directory: Path | None, dtype: DType) -> int:
    """Returns what the weights in the safetensors files of `directory` take as `dtype`; 0 where it holds none."""
    from safetensors import SafetensorError, safe_open

    elements = 0
    try:
        for path in directory.glob("*.safetensors") if directory is not None else ():
            with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
                elements += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError, MemoryError):  # it is only for the message
        return 0
    return elements * (2 if dtype == "bfloat16" else 4)


@contextlib.contextmanager
def _loading(what: str, path: str | Path, directory: Path | None) -> Iterator[None]:
    """Turns whatever goes wrong while loading into a ModelError."""
    try:
        with _no_progress_bars():
            yield
    except ModelError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if directory is None:
            raise ModelError(
                f"no directory {str(path)!r}, and as a hub name its {what} could not be loaded ({reason}); where the "
                f"hub can be reached, run `hf download {path} --local-dir DIR` and give DIR here"
            ) from error
        raise ModelError(f"model directory {str(path)!r}: its {what} could not be loaded ({reason})") from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keeps transformers' own bars out of ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
