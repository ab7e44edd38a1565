"""Ids of served environments: ``http://host:port/Sokoban-v0``, and several servers of one environment.

    http://a:8000/Sokoban-v0                            one server
    http://a:8000/Sokoban-v0,http://b:8000/Sokoban-v0   two
    http://a:8000,http://b:8000/Sokoban-v0              the same
    openenv+http://a:8000                               the environment of an OpenEnv server

The last part of the path is the environment's id on the server; what stands before it is the server's own path (behind
a proxy). An id that has a slash itself is written with ``%2F``.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from agentrl.errors import UserError

OPENENV = "openenv+"
"""Begins the id of an environment on an OpenEnv server."""


class Address(NamedTuple):
    """Where a served environment is."""

    servers: tuple[str, ...]
    """URLs without a slash at the end, each once, in the order given."""
    env: str
    """Its id on the servers."""


def is_remote(env_id: str) -> bool:
    """Whether `env_id` names a served environment."""
    return "://" in env_id


def is_ours(env_id: str) -> bool:
    """Whether `env_id` names an environment on agentrl's own servers (not one on an OpenEnv server)."""
    return is_remote(env_id) and not env_id.lower().startswith(OPENENV)


def name_of(env_id: str) -> str:
    """Returns the environment's own name: of a URL what the servers call it, of ``module:Id-v0`` what follows."""
    if is_remote(env_id):
        return unquote(env_id.rstrip("/").rpartition("/")[2])
    return env_id.rpartition(":")[2]


def parse_address(env_id: str) -> Address:
    """Takes the id of a served environment apart.

    Raises:
        UserError: it is no URL of an environment, or its servers are asked for different ones.
    """
    urls, names = [], []
    for entry in env_id.rstrip("/").split(","):
        url, name = _parse(env_id, entry.strip())
        urls.append(url)
        names.append(name)
    named = [name for name in names if name]
    if not names[-1]:
        raise UserError(f"environment {env_id!r} names no environment; write http://host:port/Sokoban-v0")
    if len({*named}) > 1:
        raise UserError(
            f"environment {env_id!r} asks its servers for {named[0]!r} and {named[-1]!r}; several URLs are several "
            "servers of one environment"
        )
    return Address(tuple(dict.fromkeys(urls)), named[-1])


def parse_openenv(env_id: str) -> str:
    """Returns the base URL of the server that ``openenv+http://host:port/path`` names, without a slash at the end.

    Raises:
        UserError: it is no such URL.
    """
    parts = _split(env_id, env_id[len(OPENENV) :])
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def _parse(env_id: str, entry: str) -> tuple[str, str]:
    """Returns the server and the environment ("" where only the server stands) of one URL."""
    parts = _split(env_id, entry)
    path, _, name = parts.path.rpartition("/")
    return f"{parts.scheme}://{parts.netloc}{path}", unquote(name)


def _split(env_id: str, entry: str) -> SplitResult:
    """Returns the parts of one URL. Raises `UserError`: it is none, or has parts that an id may not have."""
    try:
        parts = urlsplit(entry)
        _ = parts.port
    except ValueError as error:
        raise UserError(f"environment {env_id!r}: {entry!r} is no URL: {error}") from error
    odd = not entry.isascii() or not entry.isprintable() or " " in entry
    if odd or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"environment {env_id!r}: {entry!r} is no URL; write http://host:port/Sokoban-v0")
    if "@" in parts.netloc:
        raise UserError(
            f"environment at {parts.hostname!r}: leave the password out of the URL, which is written into run files; "
            "put the server's token into the environment variable AGENTRL_TOKEN"
        )
    if parts.query or parts.fragment:
        raise UserError(
            f"environment {env_id!r}: {entry!r} has a query; give arguments as keywords (env.kwargs), not in the URL"
        )
    return parts
