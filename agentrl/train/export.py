"""A model out of a run's checkpoints: the policy or its PRM, merged into its base where the run trained adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from agentrl.errors import UserError
from agentrl.models.load import check_model_output, load_model, load_tokenizer, save_model
from agentrl.models.lora import BASE_FILE, load_adapted, merged, read_base
from agentrl.train.checkpoint import checkpoint_path, checkpoints


def export_model(
    run: str | Path,
    out: str | Path,
    *,
    part: str = "policy",
    iteration: int | None = None,
    base: str | None = None,
    adapter: bool = False,
) -> dict[str, Any]:
    """Writes a model of a run's checkpoint as a directory that plain `transformers` loads.

    Args:
        run: folder of the run.
        out: directory to write; a model there is replaced.
        part: ``policy``, ``prm``, ``prm_reference`` or ``critic`` (its body), as far as the run has one.
        iteration: of the checkpoint; None takes the newest.
        base: where the base model of an adapter lies now, if it was moved.
        adapter: write the adapter itself (peft's format, without the base) into a new or empty directory.

    Returns:
        facts to print.

    Raises:
        UserError: no such run, checkpoint or part; another base; `out` cannot be written.
        ModelError: the checkpoint or the base cannot be read.
    """
    run, out = Path(run), Path(out)
    folder = run / "checkpoints"
    found = checkpoints(folder)
    if not found:
        raise UserError(f"{str(run)!r} holds no checkpoint; give the folder of a run that has finished an iteration")
    path = found[-1] if iteration is None else checkpoint_path(folder, iteration)
    if path not in found:
        raise UserError(f"no checkpoint of iteration {iteration}; there are: {', '.join(p.name for p in found)}")
    source = path / part
    if not source.is_dir():
        parts = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir() and p.name != "buffer"))
        raise UserError(f"the checkpoint {path} has no part {part!r}; it has: {parts}")
    adapted = (source / BASE_FILE).is_file()
    if adapter:
        return _copy_adapter(source, out, adapted)
    check_model_output(out)
    model = merged(load_adapted(source, base)) if adapted else load_model(source)
    # An adapter has no tokenizer of its own.
    tokenizer = load_tokenizer((base or read_base(source).path) if adapted else source)
    save_model(model, tokenizer, out)
    size = sum(p.numel() for p in model.parameters())
    facts = {"model": str(out), "from": str(source), "parameters": f"{size:,}"}
    return facts | ({"merged into": base or read_base(source).path} if adapted else {})


def _copy_adapter(source: Path, out: Path, adapted: bool) -> dict[str, Any]:
    if not adapted:
        raise UserError(f"{source} is a whole model, not an adapter; leave --adapter out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"cannot write an adapter to {str(out)!r}: it is not empty; give a new directory")
    try:
        shutil.copytree(source, out, dirs_exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write an adapter to {str(out)!r}: {error}") from error
    return {"adapter": str(out), "from": str(source), "over": read_base(source).path}
