"""Training: the loop, the updates, checkpoints, supervised warm start."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentrl.train.sft import sft as sft
    from agentrl.train.trainer import Trainer as Trainer
    from agentrl.train.trainer import train as train

__all__ = ["Trainer", "sft", "train"]


def __getattr__(name: str) -> Any:
    # Submodules load torch: on first use only.
    if name in ("Trainer", "train"):
        from agentrl.train import trainer

        return getattr(trainer, name)
    if name == "sft":
        from agentrl.train.sft import sft

        return sft
    raise AttributeError(f"module 'agentrl.train' has no attribute {name!r}")
