"""What can be refused before any work is refused here: names, options, models, folders, disk space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentrl.config import RunConfig
from agentrl.credit import load_credit
from agentrl.envs import make
from agentrl.errors import UnknownNameError, UserError
from agentrl.files import check_writable
from agentrl.models.load import check_model_dir
from agentrl.policy import policy_names
from agentrl.train.checkpoint import checkpoints


def check_task(config: RunConfig) -> None:
    """Checks the credit method with its options, and that the environment can be made, to train and to evaluate.

    Raises:
        UserError: an unknown name, or arguments that are refused.
    """
    load_credit(config.credit.method, config.credit.options)
    env = config.env
    for kwargs in (env.kwargs, {**env.kwargs, **env.eval_kwargs}):
        make(env.id, max_turns=env.max_turns, **kwargs).close()


def check_run(config: RunConfig) -> None:
    """Checks all that is known before a weight is read or a file is written.

    Raises:
        UserError: what cannot work, and the way out.
    """
    check_task(config)
    if config.model.engine not in policy_names():
        raise UnknownNameError("policy", config.model.engine, policy_names(), "agentrl policies lists all")
    if not config.model.path:
        raise UserError("model.path is empty: give a model directory (agentrl init-model makes a small one)")
    check_model_dir(config.model.path)
    if config.prm.init is not None:
        check_model_dir(config.prm.init)


def check_run_dir(config: RunConfig, *, resume: bool, need_bytes: int = 0) -> Path:
    """Makes the run's folder and checks that this run may and can write there.

    Args:
        config: the run.
        resume: an earlier run may lie there.
        need_bytes: free space that the run will need.

    Raises:
        UserError: another run lies there (its newest checkpoint would outlive every new one), the run would overwrite
            the model it starts from, the folder is not writable, or the disk has not enough room.
    """
    folder = Path(config.run_dir)
    if not resume and checkpoints(folder / "checkpoints"):
        raise UserError(f"{str(folder)!r} already holds a run; resume it, remove it, or choose another run_dir")
    for start in (config.model.path, config.prm.init):
        for written in (folder / "model", folder / "checkpoints"):
            if start and Path(start).resolve().is_relative_to(written.resolve()):
                raise UserError(f"this run would overwrite {start!r}, which it starts from; choose another run_dir")
    return check_writable(folder, need_bytes)


def needed_bytes(model: Any, prm: Any, reference: Any, keep: int, present: int) -> int:
    """Returns the disk space that checkpoints and the final model will take, in bytes; trajectories come on top.

    One more checkpoint than `keep` lies on the disk while it is being written, and one more final model. A model that
    is trained is stored with the two moments of AdamW, each as large as its weights.

    Args:
        model: the policy.
        prm: the PRM's model, or None.
        reference: the PRM's reference where it is stored too, or None.
        keep: checkpoints that are kept.
        present: checkpoints that lie there already.
    """
    sizes = [_weight_bytes(m) for m in (model, prm, reference)]
    return (keep + 1 - min(present, keep)) * (3 * sizes[0] + 3 * sizes[1] + sizes[2]) + 2 * sizes[0]


def _weight_bytes(model: Any) -> int:
    return 0 if model is None else sum(p.numel() * p.element_size() for p in model.parameters())
