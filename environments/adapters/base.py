"""What the adapters share: imports on demand that say what to install, and borrowed random generators."""

from __future__ import annotations

import contextlib
import importlib
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from agentrl.envs import TextEnv
from agentrl.errors import ActionError, UserError

LONGEST_ACTION = 20_000
"""Characters. A package's parser never sees a longer text."""
PATIENCE_S = 5.0
"""Seconds that a Java VM has to end by itself."""

_BORROWED = threading.RLock()


class Adapter(TextEnv):
    """Base of the adapters. A pickled adapter is its settings: the copy begins with `reset`."""

    live: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold processes, modules or games of the package; each has a class-level default."""

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in self.live}
        return kept | {"_finished": True}


class BorrowedRandom:
    """A state of the global generators of `random` and NumPy, for packages that draw from those.

    `lend` puts it in their place and takes it back, so that a seed means one transcript and nobody else's draws change.
    One lender at a time: adapters that run in threads wait for each other.
    """

    def __init__(self, seed: int) -> None:
        """Seeds both generators with `seed`, 0 <= seed < 2**32."""
        self._state: Any = random.Random(seed).getstate(), np.random.RandomState(seed).get_state()

    @contextlib.contextmanager
    def lend(self) -> Iterator[None]:
        """For the time of the context the global generators are this one."""
        with _BORROWED:
            outer = random.getstate(), np.random.get_state()
            random.setstate(self._state[0])
            np.random.set_state(self._state[1])
            try:
                yield
            finally:
                self._state = random.getstate(), np.random.get_state()
                random.setstate(outer[0])
                np.random.set_state(outer[1])


def require(module: str, env_id: str, extra: str) -> Any:
    """Imports `module`, which `env_id` plays with.

    Raises:
        UserError: it is not installed (with the pip command), or it is and cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise UserError(f"{env_id}: {module!r} is installed, but not what it needs itself: {error}") from error
        raise UserError(
            f"{env_id} needs the package {module!r}, which is not installed: pip install 'agentrl[{extra}]'"
        ) from error
    except Exception as error:
        raise UserError(f"{env_id}: {module!r} cannot be imported: {type(error).__name__}: {error}") from error


def require_java(env_id: str) -> None:
    """Raises `UserError` where no Java runtime is found."""
    if shutil.which("java") is None:
        raise UserError(
            f"{env_id} runs on Java, and there is no 'java' on PATH; install a Java runtime, version 8 or later "
            "(Debian, Ubuntu: apt-get install default-jre-headless)"
        )


def end_java(java: Any) -> None:
    """Ends the VM behind `java`, an environment of py4j: asked first, killed if it stays."""
    process: subprocess.Popen[bytes] = java._gateway.java_process
    with contextlib.suppress(Exception):  # a VM that died cannot be asked
        java.close()
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def choose(text: str, admissible: list[str]) -> str:
    """Returns the admissible action that `text` is, whatever its case, white space and an ``Action:`` in front.

    Raises:
        ActionError: none of them; the message lists up to 30.
    """
    last = text[-LONGEST_ACTION:].lower().rpartition("action:")[2]
    wanted = " ".join(last.split())
    found = next((action for action in admissible if " ".join(action.lower().split()) == wanted), None)
    if found is None:
        listed = ", ".join(admissible[:30]) + (", ..." if len(admissible) > 30 else "")
        raise ActionError(f"that is no action here; possible: {listed}")
    return found


def draw_seed(generator: np.random.Generator) -> int:
    """Returns a seed for a package's own generator, 0 <= seed < 2**31."""
    return int(generator.integers(2**31))
