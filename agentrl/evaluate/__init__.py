"""How good a policy is on held-out tasks, with intervals."""

from agentrl.evaluate.evaluate import EvalResult, evaluate
from agentrl.evaluate.stats import Interval, Proportion, bootstrap_mean, wilson

__all__ = ["EvalResult", "Interval", "Proportion", "bootstrap_mean", "evaluate", "wilson"]
