"""The credit lab: what each method says of a turn, against the exact advantage of that turn.

Where an environment is tabular (`TextEnv.tabular`) and the policy sees the state and nothing else, its value function
is a small dynamic program, and every turn that was played has a true advantage. One policy plays; all methods judge the
same episodes.
"""

from agentrl.lab.exact import ExactValues
from agentrl.lab.lab import MethodScore, run_lab

__all__ = ["ExactValues", "MethodScore", "run_lab"]
