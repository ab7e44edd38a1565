"""Memory that does not suffice, said in one error with the way out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from agentrl.errors import ModelError

_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory")
"""Words of errors that have no type of their own: torch's CPU allocator, CUDA itself, memory maps."""


@contextlib.contextmanager
def memory_told(what: str, way: str, need: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Turns an allocation that fails into a `ModelError` that says what needed memory, how much, and how to lower it.

    Args:
        what: what is held in this memory.
        way: how to take less.
        need: bytes of it; 0: not known. Asked only when it failed.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        size = need()
        takes = f", whose weights take {size / 2**30:.2f} GiB ({size:,} bytes)" if size else ""
        raise ModelError(f"not enough memory for {what}{takes}: {reason}; {way}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(words in said for words in _OUT_OF_MEMORY)
