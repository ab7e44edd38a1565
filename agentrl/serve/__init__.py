"""Environments over HTTP: one process that serves several environments and thousands of sessions.

    app       routes, the OpenAPI page
    settings  what a server may be told
    catalogue which environments it serves, with which arguments
    sessions  open episodes: idempotence, time to live, the cap
    runner    where environments run: on the event loop, in threads, in processes
    answers   JSON in and out
    security  token, origin, body limit, rate
    metrics   Prometheus
    openenv   the same sessions for OpenEnv's stock client
    server    uvicorn, and how it stops

The wire format is `agentrl.remote.protocol`. Needs the extra ``serve``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agentrl.errors import UserError
from agentrl.serve.settings import Settings

if TYPE_CHECKING:
    from agentrl.serve.app import create_app

__all__ = ["Settings", "create_app"]


def __getattr__(name: str) -> Any:
    if name != "create_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from agentrl.serve.app import create_app
    except ModuleNotFoundError as error:
        raise UserError(f'serving needs more packages ({error}): pip install "agentrl[serve]"') from error
    return create_app
