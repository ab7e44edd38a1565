"""Credit methods: which turn earned the outcome?

One file, one pure function per method: signals in, one advantage per action token out. A method declares what it
`needs`, so that the trainer computes just that and knows no method by name. Methods of other packages are found through
the entry-point group ``agentrl.credit``.
"""

from agentrl.credit.base import Advantage, CreditMethod, Need, Options, Signals
from agentrl.credit.registry import credit_methods, credit_names, load_credit, register_credit

__all__ = [
    "Advantage",
    "CreditMethod",
    "Need",
    "Options",
    "Signals",
    "credit_methods",
    "credit_names",
    "load_credit",
    "register_credit",
]
