"""What a chat template does to a conversation beside writing it down, found out by rendering with it.

`ChatCodec` takes a template apart once and never renders again, so that none of these touches a sampled token. They say
where its contexts, or a server's, differ from a fresh rendering.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentrl.models.chat import ChatCodec

_SYSTEM, _FIRST, _ACTION, _SECOND, _THOUGHT = (f"sentinel{name}Qx" for name in ("System", "A", "B", "C", "Thought"))


class TemplateTrait(StrEnum):
    """What a template may do. The value says it in words."""

    NO_SYSTEM = "has no system role: the system text stands before the first observation"
    DEFAULT_SYSTEM = "writes a system text of its own where there is none"
    ADDS_TO_SYSTEM = "writes more than the system text into the system's turn"
    DATED = "writes today's date: the same conversation has other ids tomorrow (fix it with a template option)"
    ALWAYS_PROMPTS = "writes the generation prompt also where none is asked for"
    TRIMS = "trims white space around texts: ours keep it"
    DROPS_THINKING = "drops the thinking of earlier turns: ours stays as sampled, or rollout.past_turns=template"
    FORGETS_PROMPT = (
        "writes something before an action to come that is gone once it is past: ours stays as it was, or "
        "rollout.past_turns=template"
    )
    MERGES = "joins a text's first line break with its own into one token: ours are two"


def template_traits(codec: ChatCodec) -> frozenset[TemplateTrait]:
    """Returns what the chat template of `codec` does."""
    render, trait, user = codec._render, TemplateTrait, ("user", _FIRST)
    found: set[TemplateTrait] = set()
    plain = render(user)
    if codec.system_role:
        with_system = render(("system", _SYSTEM), user)
        if with_system.replace(_SYSTEM, "") == plain:  # the plain conversation has an (empty) system turn too
            found.add(trait.ADDS_TO_SYSTEM)
        elif len(plain) > len(render(("system", ""), user)) or "system" in plain.partition(_FIRST)[0]:
            found.add(trait.DEFAULT_SYSTEM)
    else:
        found.add(trait.NO_SYSTEM)
    if "strftime_now" in str(codec.tokenizer.chat_template) and "date_string" not in codec._options:
        found.add(trait.DATED)
    if render(user, generate=False) == plain:
        found.add(trait.ALWAYS_PROMPTS)
    if render(("user", f" \n {_FIRST} \n ")) == plain:
        found.add(trait.TRIMS)
    thinking = f"<think>\n{_THOUGHT}\n</think>\n\n{_ACTION}"
    shown = render(user, ("assistant", thinking), ("user", _SECOND))
    if _ACTION in shown and _THOUGHT not in shown:
        found.add(trait.DROPS_THINKING)
    if codec.rewrites_prompt:
        found.add(trait.FORGETS_PROMPT)
    if trait.TRIMS not in found and codec.start("", "\n.") != list(codec._encode_piece(render(("user", "\n.")))):
        found.add(trait.MERGES)
    return frozenset(found)
