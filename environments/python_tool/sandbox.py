"""Runs a piece of Python in a process of its own, for a bounded time, memory and output.

What holds: wall-clock, CPU and address-space limits; nothing can be written to files; files are read from the standard
library alone; no environment variables, no packages but the standard library; the process group is killed at the end,
whatever it left behind. No network: sockets are refused by an audit hook, and where the kernel lets us the process is
in an empty network namespace as well. No child processes, by the same hook.

What does not: it is no security boundary. The hook runs in the interpreter that it watches, and whoever is determined
gets around it. It holds off a model that writes silly code, not an attacker; run training in a container without
network and secrets where that matters (see the README).

Not a thread, nor `exec` here: neither can be stopped or bounded. Needs a POSIX system.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

from agentrl.errors import EnvironmentFailure

End = Literal["done", "timeout", "output", "killed"]

_FLOOD = 1_000_000
"""Bytes of output after which a process is stopped."""

_RUNNER = r"""
import _ast, os, resource, sys  # not ast, nor traceback before it is needed: they take longer than the rest
seconds, megabytes = int(sys.argv[1]), int(sys.argv[2])
NEWNET, NEWUSER = 0x40000000, 0x10000000
try:
    if hasattr(os, "unshare"):
        unshare = os.unshare
    else:
        import ctypes
        def unshare(flags, call=ctypes.CDLL(None, use_errno=True).unshare):
            if call(flags):
                raise OSError
    try:
        unshare(NEWNET)
    except OSError:
        uid, gid = os.getuid(), os.getgid()
        unshare(NEWNET | NEWUSER)
        for name, line in ("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1"):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
except Exception:
    pass
code = sys.stdin.buffer.read().decode("utf-8", "replace")
library = tuple(os.path.realpath(p) + os.sep for p in (os.path.dirname(os.__file__), *sys.path) if p)
READS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
def fits(path, flags):
    if isinstance(path, int) or not isinstance(flags, int) or flags & ~READS:
        return False
    return (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(library)
refused = (
    "socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
    "os.kill", "os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod", "os.chown",
    "os.truncate", "os.utime", "os.setxattr", "os.putenv", "pty.", "resource.setrlimit", "resource.prlimit",
    "signal.pthread_kill", "sqlite3.", "shutil.", "tempfile.", "mmap.", "gc.", "sys._current", "fcntl.", "syslog.",
)
def watch(event, args, refused=refused, fits=fits, PermissionError=PermissionError):
    if event == "open" and not fits(args[0], args[2]):
        raise PermissionError("files cannot be opened here")
    if event in ("os.listdir", "os.scandir") and not fits(args[0] or ".", 0):
        raise PermissionError("folders cannot be listed here")
    if event.startswith(refused):
        raise PermissionError(f"{event} is not allowed here")
for kind, limit in (
    ("RLIMIT_CPU", seconds), ("RLIMIT_AS", megabytes << 20), ("RLIMIT_FSIZE", 0), ("RLIMIT_CORE", 0),
    ("RLIMIT_NOFILE", 16), ("RLIMIT_NPROC", 0),
):
    try:
        resource.setrlimit(getattr(resource, kind), (limit, limit))
    except (AttributeError, ValueError, OSError):
        pass
scope = {"__name__": "__main__", "__builtins__": __builtins__}
try:
    tree = compile(code, "<code>", "exec", _ast.PyCF_ONLY_AST)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], _ast.Expr) else None
    body = compile(tree, "<code>", "exec")
    shown = last and compile(_ast.Expression(last.value), "<code>", "eval")
    sys.addaudithook(watch)
    exec(body, scope)
    if shown:
        value = eval(shown, scope)
        if value is not None:
            print(value)
except SystemExit:
    pass
except MemoryError:
    scope.clear()
    print("MemoryError: the code needs more memory than it may use")
except BaseException as error:
    frames = []
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<code>":
            frames.append(f"  line {trace.tb_lineno}, in {trace.tb_frame.f_code.co_name}\n")
        trace = trace.tb_next
    import traceback
    print("".join(["Traceback:\n", *frames[-3:]] if frames else []), end="")
    print("".join(traceback.format_exception_only(error)), end="")
"""


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of a piece of code."""

    output: str
    """Standard output and errors, cut to the limit."""
    end: End
    """``done``; stopped by ``timeout`` or a flood of ``output``; ``killed`` by a signal (CPU limit, a crash)."""
    cut: bool
    """Whether output was left out."""


def run_python(code: str, *, timeout_s: float = 2.0, memory_mb: int = 256, max_output: int = 2000) -> Ran:
    """Runs `code`; the value of a last line that is an expression is printed, as in a notebook.

    Args:
        code: Python with the standard library.
        timeout_s: wall-clock seconds, start of the interpreter included (about 0.03 s).
        memory_mb: address space in MiB.
        max_output: characters of output kept.

    Raises:
        EnvironmentFailure: the interpreter could not be started.
    """
    deadline = time.monotonic() + timeout_s
    command = [sys.executable, "-PsSB", "-X", "utf8", "-c", _RUNNER, str(int(timeout_s) + 1), str(memory_mb)]
    environment = {"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    try:
        with tempfile.TemporaryFile() as source:
            source.write(code.encode("utf-8", "replace"))
            source.seek(0)
            process = subprocess.Popen(
                command,
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd="/",
                start_new_session=True,
            )
    except OSError as error:
        raise EnvironmentFailure(f"no Python process could be started: {error}") from error
    try:
        output, flooded = _read(process, deadline)
        ended = not flooded and _exited(process.pid, deadline)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # before it is reaped: the group's number is still its own
        assert process.stdout is not None
        process.stdout.close()
        status = process.wait()
    end: End = "output" if flooded else "timeout" if not ended else "killed" if status < 0 else "done"
    text = output.decode("utf-8", "replace")
    return Ran(text[:max_output], end, flooded or len(text) > max_output)


def _read(process: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, bool]:
    """Returns what the process writes until it closes its output or time is up, and whether it wrote too much."""
    assert process.stdout is not None
    pieces, size = [], 0
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                piece = os.read(process.stdout.fileno(), 65_536)
                pieces.append(piece)
                size += len(piece)
                if not piece or size > _FLOOD:
                    break
    return b"".join(pieces), size > _FLOOD


def _exited(pid: int, deadline: float) -> bool:
    """Waits for the end of a process without reaping it, so that its group can still be killed safely."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
