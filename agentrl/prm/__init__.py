"""The implicit process reward model: a causal LM whose log-ratio to a reference is a reward for every turn."""

from agentrl.prm.implicit import ImplicitPRM
from agentrl.prm.loss import PairTensors, pair_accuracy, pair_loss

__all__ = ["ImplicitPRM", "PairTensors", "pair_accuracy", "pair_loss"]
