"""What an agent can do in a turn, as in SOTOPIA: speak, do something without words, act, leave, or nothing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum

from agentrl.errors import ActionError


class ActionType(StrEnum):
    """SOTOPIA's action types."""

    NONE = "none"
    SPEAK = "speak"
    NON_VERBAL = "non-verbal communication"
    ACTION = "action"
    LEAVE = "leave"


@dataclass(frozen=True)
class SocialAction:
    """One turn of one agent."""

    type: ActionType
    argument: str = ""

    def told(self, name: str) -> str:
        """Returns the line of the dialogue, as SOTOPIA words it."""
        match self.type:
            case ActionType.SPEAK:
                return f'{name} said: "{self.argument}"'
            case ActionType.LEAVE:
                return f"{name} left the conversation"
            case ActionType.NONE:
                return f"{name} did nothing"
        return f"{name} [{self.type}] {self.argument}"


LONGEST = 2000
"""Characters of an argument that are kept."""

_BRACKET = re.compile(r"^\[([a-z\- ]+)\]\s*(.*)$", re.DOTALL | re.IGNORECASE)
_SHORT = {"non-verbal": ActionType.NON_VERBAL, "speech": ActionType.SPEAK, "say": ActionType.SPEAK}
_BARE = (ActionType.LEAVE, ActionType.NONE)
_TYPES = ", ".join(f"'{kind}'" for kind in ActionType)


def parse(text: str) -> SocialAction:
    """Returns the action that `text` is.

    Free text is speech; ``[leave]``, ``[none]``, ``[action] gives her the book`` and ``[non-verbal] nods`` are the
    others; and SOTOPIA's JSON, ``{"action_type": "speak", "argument": "Hello"}``, is read as well. Half surrogates are
    replaced, control characters dropped, new lines made spaces, and what is beyond `LONGEST` characters is cut off: no
    text can break the dialogue's lines or a request that carries it.

    Raises:
        ActionError: nothing in it, an unknown type in brackets or JSON, or an action without its argument.
    """
    text = text.strip()
    if text.startswith("{") and "action_type" in text[:LONGEST]:
        return _from_json(text)
    if found := _BRACKET.match(text):
        return _action(found[1], found[2])
    return _action(ActionType.SPEAK, text)


def _from_json(text: str) -> SocialAction:
    try:
        content = json.loads(text, strict=False)
        kind, argument = content["action_type"], content.get("argument", "")
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ActionError('not JSON of the form {"action_type": "speak", "argument": "Hello"}') from error
    return _action(str(kind), "" if argument is None else str(argument))


def _action(name: str, argument: str) -> SocialAction:
    name = name.strip().lower()
    try:
        kind = _SHORT.get(name) or ActionType(name)
    except ValueError:
        raise ActionError(f"no action type {name[:40]!r}; one of {_TYPES}") from None
    argument = " ".join(argument[: 4 * LONGEST].encode("utf-8", "replace").decode().split())
    argument = "".join(char for char in argument if char.isprintable())[:LONGEST]
    if kind in _BARE:
        return SocialAction(kind)
    if not argument:
        raise ActionError(f"{kind} needs words; to say and do nothing, answer [none]")
    return SocialAction(kind, argument)
