"""Training: the loop, the updates, checkpoints, supervised warm start."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentrl.train.trainer import Trainer as Trainer
    from agentrl.train.trainer import train as train

__all__ = ["Trainer", "train"]


def __getattr__(name: str) -> Any:
    # The loop loads torch: on first use only.
    if name in __all__:
        from agentrl.train import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'agentrl.train' has no attribute {name!r}")


class _Callable(ModuleType):
    """`agentrl.train` is this package and, called, the function of that name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
