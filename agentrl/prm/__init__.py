"""Process reward models: a causal LM whose log-ratio to a reference rewards every turn, or one behind a server."""

from agentrl.prm.implicit import ImplicitPRM
from agentrl.prm.loss import PairTensors, ce_loss, label_accuracy, pair_accuracy, pair_loss
from agentrl.prm.objective import LabelObjective, Objective, PairObjective, make_objective
from agentrl.prm.served import ServedPRM

__all__ = [
    "ImplicitPRM",
    "LabelObjective",
    "Objective",
    "PairObjective",
    "PairTensors",
    "ServedPRM",
    "ce_loss",
    "label_accuracy",
    "make_objective",
    "pair_accuracy",
    "pair_loss",
]
