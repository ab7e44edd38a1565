"""LoRA (arXiv 2106.09685): a frozen base whose tensors exist once in memory, and small trained adapters over it.

    y = W x + (alpha / rank) B A x          W frozen; A (rank, in) random, B (out, rank) zero at the start

Every model of a run is a module tree of its own over the *same* base tensors: the policy and the PRM each with their
adapter, the reference with none. A tree without tensors weighs nothing, and with one tree each there is no active
adapter to switch (`set_adapter`, `disable_adapter`): no exception, no other thread and no activation that is computed
again in the backward pass can find the wrong one. `peft` makes the layers and knows the files.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from agentrl.config.schema import LoRAConfig
from agentrl.errors import ModelError, UserError
from agentrl.models.load import DType, fingerprint, load_model

Tensor = torch.Tensor

_MARK = "lora_"
"""In the name of every adapter parameter, and of nothing else: `peft` tells them apart by it too."""
_PREFIX = "base_model.model."
"""Before every name in an adapter file: the place of the base inside peft's own wrapper."""
_WEIGHTS = "adapter_model.safetensors"
BASE_FILE = "base.json"
"""Beside every adapter: what it stands over."""


@dataclass(frozen=True)
class Base:
    """The frozen model under an adapter."""

    path: str
    """Directory or hub name."""
    fingerprint: str
    """`agentrl.models.load.fingerprint` of its weights."""
    dtype: DType
    """What they are held in."""


def check_peft() -> None:
    """Checks that peft is there.

    Raises:
        UserError: it is not; says how to install it.
    """
    if find_spec("peft") is None:
        raise UserError("lora.rank > 0 needs peft, which is not installed: pip install 'agentrl[lora]'")


def load_trainable(path: str, *, device: str, dtype: DType, lora: LoRAConfig) -> Any:
    """Loads a model for training: all of its weights, or with ``lora.rank`` > 0 an adapter over frozen ones.

    A frozen base is held in `dtype`; adapters are float32, as trained weights always are.

    Raises:
        ModelError: see `load_model`.
        UserError: see `add_adapter`.
    """
    model = load_model(path, device=device, dtype=dtype, train=not lora.rank)
    return add_adapter(model, lora, path) if lora.rank else model


def add_adapter(model: Any, config: LoRAConfig, path: str) -> Any:
    """Freezes `model` and puts a fresh adapter over it, in place; the model computes what it did before.

    Args:
        model: a causal LM.
        config: rank (> 0), alpha, targets.
        path: where the model came from; written beside every adapter.

    Raises:
        UserError: no peft; no layer has the name of a target; or a target is tied to another layer.
    """
    check_peft()
    import peft

    dtype: DType = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
    base = Base(str(path), fingerprint(model), dtype)
    model.requires_grad_(False)
    targets: Any = config.targets if isinstance(config.targets, str) else list(config.targets)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.path,
    )
    linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    try:
        peft.inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise UserError(f"lora.targets={config.targets!r}: {error}; linear layers here: {', '.join(linear)}") from error
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    if tied and any(id(layer) in ends for _, layer in _layers(model)):
        raise UserError(
            f"lora.targets={config.targets!r}: the embeddings and the LM head of {path!r} are one tensor, and a merged "
            f"model could not tell them apart; leave them out of the targets (linear layers here: {', '.join(linear)})"
        )
    for name, parameter in model.named_parameters():
        if _MARK in name:
            parameter.data = parameter.data.float()
    model.lora_base = base
    return model.eval()  # new layers come in training mode


def has_adapter(model: Any) -> bool:
    """Whether `model` is an adapter over a frozen base."""
    return isinstance(getattr(model, "lora_base", None), Base)


def trained_parameters(model: Any) -> list[torch.nn.Parameter]:
    """The parameters that take gradients: all of them, or the adapter's."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def stored_parameters(model: Any) -> list[torch.nn.Parameter]:
    """What a checkpoint holds: all parameters, or the adapter's, frozen or not."""
    return [p for name, p in model.named_parameters() if _MARK in name or not has_adapter(model)]


def twin(model: Any) -> Any:
    """A copy that is trained apart: of everything, or with an adapter of the adapter alone, the base shared."""
    if not has_adapter(model):
        return copy.deepcopy(model)
    shared = [parameter for name, parameter in model.named_parameters() if _MARK not in name]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*shared, *model.buffers())})


def reference_of(model: Any) -> Any:
    """The model as it was before training, frozen: a copy, or with an adapter the base without it, nothing copied."""
    if not has_adapter(model):
        return copy.deepcopy(model).requires_grad_(False)
    bare = twin(model)
    for name, layer in list(_layers(bare)):
        bare.set_submodule(name, layer.get_base_layer())
    del bare.peft_config, bare.lora_base
    return bare


@torch.no_grad()
def merged(model: Any) -> Any:
    """Returns a plain float32 model with the adapter added to the weights it stands over (a model without: itself).

    Weights that no adapter touches are shared with `model` where they are float32 already.
    """
    if not has_adapter(model):
        return model
    plain = reference_of(model)
    for name, layer in _layers(model):
        (adapter,) = layer.active_adapters
        weight = layer.get_base_layer().weight.float() + layer.get_delta_weight(adapter).float()
        plain.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)
    # Not `.float()`: it would change the tensors that others share.
    done: dict[int, torch.nn.Parameter] = {}
    for module in plain.modules():
        for name, old in module._parameters.items():
            if old is not None and old.dtype != torch.float32:
                module._parameters[name] = done.setdefault(id(old), torch.nn.Parameter(old.float(), False))
    return plain


def write_adapter(model: Any, folder: Path) -> None:
    """Writes the adapter as peft reads it, and ``base.json``: what it stands over."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (settings,) = model.peft_config.values()
    settings.save_pretrained(str(folder))
    weights = {_PREFIX + name: tensor.contiguous() for name, tensor in _adapter_weights(model).items()}
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / BASE_FILE).write_text(json.dumps(asdict(model.lora_base), indent=2) + "\n")


def read_base(folder: Path) -> Base:
    """What the adapter in `folder` stands over.

    Raises:
        ModelError: there is no adapter of ours.
    """
    try:
        return Base(**json.loads((folder / BASE_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{str(folder)!r} holds no adapter written by a run ({BASE_FILE}: {error})") from error


def check_base(model: Any, folder: Path) -> None:
    """Checks that the adapter in `folder` was trained over the base of `model`.

    Raises:
        UserError: another base.
    """
    theirs, ours = read_base(folder), model.lora_base
    if theirs.fingerprint != ours.fingerprint:
        raise UserError(
            f"{folder} is an adapter over {theirs.path!r} with weights {theirs.fingerprint}; the base model here, "
            f"{ours.path!r}, has weights {ours.fingerprint}: give the model that the run was started with"
        )


@torch.no_grad()
def load_adapter(model: Any, folder: Path) -> None:
    """Gives the adapter of `model` the weights in `folder`.

    Raises:
        UserError: it stands over another base.
        ModelError: missing, broken, or of another shape.
    """
    from safetensors.torch import load_file

    check_base(model, folder)
    try:
        saved = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(folder / _WEIGHTS).items()}
    except Exception as error:
        raise ModelError(f"the adapter in {str(folder)!r} cannot be read: {error}") from error
    own = _adapter_weights(model)
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in saved.items()}:
        raise ModelError(f"the adapter in {str(folder)!r} has other layers or another rank than this run's")
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def load_adapted(folder: Path, base: str | None = None, *, device: str = "cpu") -> Any:
    """Loads an adapter folder with its base; `base` says where that lies now, if not where it lay.

    Raises:
        ModelError: no adapter, or no base model at its place.
        UserError: another base.
    """
    check_peft()
    import peft

    stored = read_base(folder)
    path = base or stored.path
    settings: Any = peft.PeftConfig.from_pretrained(str(folder))
    targets = settings.target_modules
    config = LoRAConfig(
        rank=settings.r,
        alpha=settings.lora_alpha,
        targets=targets if isinstance(targets, str) else sorted(targets),
    )
    model = add_adapter(load_model(path, device=device, dtype=stored.dtype), config, path)
    load_adapter(model, folder)
    return model


def plain_weights(model: Any) -> Mapping[str, Tensor]:
    """The weights under the names of a model without adapters, merged: for engines that hold a copy of their own."""
    weights: Mapping[str, Tensor] = merged(model).state_dict()
    return weights


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The layers that carry an adapter, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def _adapter_weights(model: Any) -> dict[str, Tensor]:
    """The adapter's tensors by their names in files; they share memory with the parameters."""
    import peft

    weights: dict[str, Tensor] = peft.get_peft_model_state_dict(model)
    return weights
