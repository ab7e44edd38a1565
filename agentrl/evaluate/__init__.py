"""How good a policy is on held-out tasks, with intervals."""

import sys
from types import ModuleType
from typing import Any

from agentrl.evaluate.evaluate import EvalResult, evaluate
from agentrl.evaluate.stats import Interval, Proportion, bootstrap_mean, wilson

__all__ = ["EvalResult", "Interval", "Proportion", "bootstrap_mean", "evaluate", "wilson"]


class _Callable(ModuleType):
    """`agentrl.evaluate` is this package and, called, the function of that name."""

    def __call__(self, *arguments: Any, **options: Any) -> EvalResult:
        return evaluate(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
