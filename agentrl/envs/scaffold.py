"""``agentrl new-env``: an environment of one file, small but a real task, and its test, to be changed into another."""

from __future__ import annotations

import keyword
import re
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from agentrl.envs.registry import environment_ids
from agentrl.errors import UserError


class Scaffold(NamedTuple):
    """What `new_environment` wrote."""

    env_id: str
    """``module:Id-v0``, as `agentrl.make` and the commands take it from the file's folder."""
    module: Path
    test: Path


def new_environment(name: str, out: str | Path = ".") -> Scaffold:
    """Writes ``out/treasure_hunt.py`` and ``out/test_treasure_hunt.py`` for ``treasure-hunt`` (or ``TreasureHunt``).

    Args:
        name: words of letters and digits, in any of the usual spellings.
        out: folder; made where it does not exist.

    Raises:
        UserError: a name that is none, is taken or would hide another module; a file that exists.
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_ ][A-Za-z0-9]+)*", name):
        raise UserError(f"name {name!r}: a letter first, then letters, digits, - and _, for instance treasure-hunt")
    module, title = "_".join(words).lower(), "".join(word[0].upper() + word[1:] for word in words)
    paths = Path(out) / f"{module}.py", Path(out) / f"test_{module}.py"
    for path in paths:
        if path.exists():
            raise UserError(f"{path} exists and is not overwritten; choose another name or --out")
    _check_free(name, module, f"{title}-v0")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        for path, template in zip(paths, ("env", "test"), strict=True):
            text = (files("agentrl.envs") / "templates" / f"{template}.txt").read_text(encoding="utf-8")
            for key, value in (("@ID", f"{title}-v0"), ("@CLASS", title), ("@MODULE", module)):
                text = text.replace(key, value)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
    return Scaffold(f"{module}:{title}-v0", *paths)


def _check_free(name: str, module: str, env_id: str) -> None:
    """Checks that neither the module nor the environment would hide another one."""
    if keyword.iskeyword(module) or module in sys.stdlib_module_names or find_spec(module) is not None:
        raise UserError(f"name {name!r}: Python has a module or keyword {module!r} already; choose another name")
    taken = {known.lower(): known for known in environment_ids()}
    if env_id.lower() in taken:
        raise UserError(f"name {name!r}: environment {taken[env_id.lower()]!r} exists already; choose another name")
