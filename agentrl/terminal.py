"""Text of agents and environments on its way to a terminal."""

from __future__ import annotations

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    """Returns `text` with control characters and halves of surrogate pairs written out (``\\x1b``).

    What an agent or an environment said must not move the cursor, name the window or fill the clipboard. New lines and
    tabs stay.
    """
    return text.translate(_CONTROLS).encode("utf-8", "backslashreplace").decode()
