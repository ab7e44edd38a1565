"""How good a policy is on held-out tasks, with intervals."""

import sys
from types import ModuleType
from typing import Any

from agentrl.evaluate.evaluate import evaluate
from agentrl.evaluate.result import EvalReport, EvalResult, EvaluationFailed, StopStats, UsageStats
from agentrl.evaluate.stats import (
    Interval,
    Proportion,
    bootstrap_mean,
    cluster_proportion,
    pass_at_k,
    pass_hat_k,
    sign_flip_p,
    wilson,
)

__all__ = [
    "EvalReport",
    "EvalResult",
    "EvaluationFailed",
    "Interval",
    "Proportion",
    "StopStats",
    "UsageStats",
    "bootstrap_mean",
    "cluster_proportion",
    "evaluate",
    "pass_at_k",
    "pass_hat_k",
    "sign_flip_p",
    "wilson",
]


class _Callable(ModuleType):
    """`agentrl.evaluate` is this package and, called, the function of that name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return evaluate(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
