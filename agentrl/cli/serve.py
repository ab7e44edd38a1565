"""``agentrl serve``: environments over HTTP."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer
from rich.logging import RichHandler
from rich.panel import Panel
from rich.text import Text

from agentrl.cli.common import console, errors
from agentrl.errors import UserError

if TYPE_CHECKING:
    from agentrl.serve import Settings

LEVELS = ("debug", "info", "warning", "error")


def add_commands(app: typer.Typer) -> None:
    """Adds `serve`."""
    app.command("serve")(serve)


def _option(name: str, metavar: str, words: str, **more: Any) -> Any:
    variable = "AGENTRL_SERVE_" + name.removeprefix("--").replace("-", "_").upper()
    return typer.Option(name, metavar=metavar, help=words, envvar=variable, show_envvar=False, **more)


def serve(
    env: Annotated[
        list[str],
        typer.Argument(
            metavar="ENV...",
            help="Environment ids, with default arguments as a query: 'WebShop-v0?products=2000'.",
            envvar="AGENTRL_SERVE_ENVS",
            show_envvar=False,
        ),
    ],
    host: Annotated[str, _option("--host", "ADDRESS", "Address to listen at; beyond loopback a token is needed.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, _option("--port", "N", "0: any free port.", min=0, max=65535)] = 8000,
    token_file: Annotated[
        Path | None,
        _option("--token-file", "FILE", "Bearer tokens, one a line (or set AGENTRL_SERVE_TOKEN)."),
    ] = None,
    max_sessions: Annotated[int, _option("--max-sessions", "N", "Episodes under way at once.", min=1)] = 4096,
    session_ttl: Annotated[float, _option("--session-ttl", "S", "Seconds until an idle session is closed.")] = 900.0,
    step_deadline: Annotated[float, _option("--step-deadline", "S", "Seconds that one step may take.")] = 60.0,
    create_deadline: Annotated[
        float, _option("--create-deadline", "S", "Seconds that making an environment may take, and a reset.")
    ] = 120.0,
    grace: Annotated[float, _option("--grace", "S", "Seconds that sessions may go on after SIGTERM.")] = 20.0,
    executor: Annotated[
        str, _option("--executor", "KIND", "Where environments run that are not declared fast: thread or process.")
    ] = "thread",
    workers: Annotated[int, _option("--workers", "N", "Their calls under way at once.", min=1)] = 64,
    rate: Annotated[float, _option("--rate", "N", "Requests per second of one client; 0: no limit.", min=0)] = 2000.0,
    max_body: Annotated[int, _option("--max-body", "BYTES", "Largest request.", min=1024)] = 32 * 1024 * 1024,
    max_response: Annotated[int, _option("--max-response", "BYTES", "Largest answer.", min=1024)] = 64 * 1024 * 1024,
    fixed_arguments: Annotated[
        bool,
        typer.Option(
            "--fixed-arguments",
            help="Take no environment arguments and wrappers from clients.",
            envvar="AGENTRL_SERVE_FIXED_ARGUMENTS",
            show_envvar=False,
        ),
    ] = False,
    log_level: Annotated[str, _option("--log-level", "LEVEL", ", ".join(LEVELS))] = "info",
) -> None:
    """Serve environments over HTTP; agents anywhere play them.

    Each option can be set by an environment variable: [b]--max-sessions[/b] by AGENTRL_SERVE_MAX_SESSIONS, the
    environments by AGENTRL_SERVE_ENVS, separated by spaces.

    Example:  [b]agentrl serve Sokoban-v0 Lock-v0 --port 8000[/b]

    Then:  [b]agentrl check-env http://127.0.0.1:8000/Sokoban-v0[/b]
    """
    from agentrl.config.load import checked
    from agentrl.serve import Settings, create_app

    if log_level not in LEVELS:
        raise UserError(f"--log-level {log_level!r}: one of {', '.join(LEVELS)}")
    settings = checked(
        Settings,
        {
            "envs": env,
            "host": host,
            "port": port,
            "tokens": _tokens(token_file),
            "max_sessions": max_sessions,
            "session_ttl_s": session_ttl,
            "step_deadline_s": step_deadline,
            "create_deadline_s": create_deadline,
            "grace_s": grace,
            "executor": executor,
            "workers": workers,
            "rate": rate,
            "max_body": max_body,
            "max_response": max_response,
            "fixed_arguments": fixed_arguments,
        },
    )
    logging.basicConfig(level=log_level.upper(), format="%(message)s", handlers=[_handler(log_level.upper())])
    with errors.status("making environments"):
        app = create_app(settings)
    _run(app, settings, log_level)


def _run(app: Any, settings: Settings, log_level: str) -> None:
    from agentrl.serve.server import Server, listen, url_of

    with listen(settings) as listener:
        console.print(_banner(app, settings, url_of(settings, listener)))
        Server(app, settings, log_level).run(sockets=[listener])


def _tokens(path: Path | None) -> tuple[Any, ...]:
    """Returns the tokens of the file or of the environment variable; the variable is removed, so that no environment
    or process started here inherits it."""
    from agentrl.serve.settings import TOKEN_VARIABLE, read_token_file, read_tokens

    text = os.environ.pop(TOKEN_VARIABLE, "")
    if path is not None:
        return read_token_file(path)
    return read_tokens(text, f"the environment variable {TOKEN_VARIABLE}") if text.strip() else ()


def _handler(level: str) -> logging.Handler:
    """Log lines: coloured for people, plain for files and containers."""
    handler: logging.Handler = RichHandler(console=errors, show_path=False)
    if not errors.is_terminal:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(level)  # packages set levels of their own loggers
    return handler


def _banner(app: Any, settings: Settings, url: str) -> Any:
    lines = Text()
    for entry in app.api.catalogue.entries.values():
        where = "event loop" if entry.spec.fast else settings.executor
        arguments = "".join(f" {name}={value!r}" for name, value in entry.kwargs.items())
        # An id may hold a slash, which in an address would begin another part.
        lines.append(f"{url}/{quote(entry.env_id, safe=':')}", style="cyan").append(
            f"{arguments}  ({where})\n", style="dim"
        )
    access = "bearer token" if settings.tokens else "this machine only, no token"
    lines.append(f"\naccess    {access}\nsessions  at most {settings.max_sessions:,}, ")
    lines.append(f"closed after {settings.session_ttl_s:g} s idle\n")
    lines.append(f"docs      {url}/docs\nmetrics   {url}/metrics")
    if not console.is_terminal:
        return lines
    return Panel(lines, title="agentrl serve", title_align="left")
