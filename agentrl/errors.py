"""Errors that name the thing, the value and the way out.

Two families matter to the rest of the code. `UserError` means that somebody must change something (a name, a file, a
setting): the command line prints it without a traceback. `InfrastructureError` means that an episode could not be
played to its end through no fault of the agent: the rollout turns it into a `StopReason` and never into a reward.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AgentRLError(Exception):
    """Base of every error that agentrl raises on purpose."""


class UserError(AgentRLError):
    """Something the caller gave is wrong; the message says what and how to mend it."""


class UnknownNameError(UserError):
    """A name that is not registered. The message offers the nearest known ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        super().__init__(unknown_name(kind, name, self.known, hint))


class ConfigError(UserError):
    """A configuration that cannot run: an unknown key, a bad value or an impossible combination."""


class ModelError(UserError):
    """A model directory that lacks something training needs (chat template, pad token, ...)."""


class DataError(UserError):
    """A file that does not hold what it should; names the file and the line."""


class ActionError(AgentRLError):
    """An agent's text is not an action of this environment.

    Raised by `TextEnv.parse_action`, never seen by the trainer: `TextEnv.step` turns it into an observation, so that
    the agent can try again, and sets `info["valid_action"] = False`.
    """


class InfrastructureError(AgentRLError):
    """An episode ended through a fault outside the agent. Not a reward, not a failure of the policy."""


class EnvironmentFailure(InfrastructureError):
    """The environment raised, or died."""


class PolicyFailure(InfrastructureError):
    """The policy (engine, server) raised, or died."""


class DeadlineExceeded(InfrastructureError):
    """Something took longer than its deadline; the message says what and how long it was given."""


class NonFiniteError(AgentRLError):
    """A loss, gradient or advantage became NaN or infinite; training stops here."""


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> str:
    """Returns e.g. ``no environment 'sokobn'; did you mean 'sokoban'? (agentrl envs lists all)``."""
    known = sorted(known)
    lowered = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)
    # What is far behind the nearest was not meant.
    ratio = {c: difflib.SequenceMatcher(None, c, name.lower()).ratio() for c in near}
    close = [lowered[c] for c in near if ratio[c] > ratio[near[0]] - 0.2]
    message = f"no {kind} {name!r}"
    if close:
        message += "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    elif known:
        message += "; known: " + ", ".join(known)
    else:
        message += "; none is registered"
    return message + (f" ({hint})" if hint else "")
