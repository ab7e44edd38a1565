"""What a server may be told; ``agentrl serve`` has an option and an environment variable for each."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from agentrl.errors import UserError

TOKEN_VARIABLE = "AGENTRL_SERVE_TOKEN"
MIN_TOKEN = 16
"""Characters of the shortest token that is taken."""

Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseModel):
    """Settings of one server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    envs: Annotated[list[str], Field(min_length=1)]
    """Environment ids, with default arguments as a query: ``WebShop-v0?products=2000``; values are YAML."""
    host: str = "127.0.0.1"
    """Address to listen at. Anything but loopback needs a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0: any free port."""
    tokens: tuple[SecretStr, ...] = ()
    """Bearer tokens that are let in; none: everybody on this machine."""
    max_sessions: Annotated[int, Field(ge=1)] = 4096
    """Episodes under way at once; one more is answered with 429."""
    session_ttl_s: Seconds = 900.0
    """A session that nobody steps for so long is closed."""
    step_deadline_s: Seconds = 60.0
    """Time for one step of an environment that is not declared fast."""
    create_deadline_s: Seconds = 120.0
    """Time for making such an environment, and again for its reset."""
    grace_s: Annotated[float, Field(ge=0)] = 20.0
    """Time that running sessions have to end after the first SIGTERM."""
    executor: Literal["thread", "process"] = "thread"
    """Where environments run that are not declared fast: each in a thread, or each in a process of its own."""
    workers: Annotated[int, Field(ge=1)] = 64
    """Calls of such environments under way at once."""
    rate: Annotated[float, Field(ge=0)] = 2000.0
    """Requests per second of one client (token and address), with bursts of one second's worth; 0: no limit."""
    max_body: Annotated[int, Field(ge=1024)] = 32 * 1024 * 1024
    """Bytes of the largest request."""
    max_response: Annotated[int, Field(ge=1024)] = 64 * 1024 * 1024
    """Bytes of the largest answer."""
    fixed_arguments: bool = False
    """Refuse environment arguments and wrappers from clients altogether."""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check_exposure(self) -> None:
        """Proves that nobody but holders of a token can reach the server from outside.

        Raises:
            UserError: no token and an address other than loopback; a token that is too short to be a secret.
        """
        if not self.tokens and not self.loopback:
            raise UserError(
                f"host {self.host!r} can be reached from other machines, and there is no token: give --token-file FILE "
                f"or set {TOKEN_VARIABLE} (python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one), "
                "or listen at 127.0.0.1"
            )
        if any(len(token.get_secret_value()) < MIN_TOKEN for token in self.tokens):
            raise UserError(
                f"a token has fewer than {MIN_TOKEN} characters; python -c 'import secrets; "
                "print(secrets.token_urlsafe(32))' makes a good one"
            )


def read_tokens(text: str, where: str) -> tuple[SecretStr, ...]:
    """Returns the tokens in `text`, one a line; lines that begin with ``#`` are comments.

    Raises:
        UserError: none, or one with spaces or control characters; `where` names the source, never the token.
    """
    lines = [line.strip() for line in text.splitlines()]
    tokens = [line for line in lines if line and not line.startswith("#")]
    if not tokens:
        raise UserError(f"{where} holds no token; write one a line")
    if any(not token.isascii() or not token.isprintable() or " " in token for token in tokens):
        raise UserError(f"{where} holds a token with spaces or characters other than printable ASCII")
    return tuple(SecretStr(token) for token in tokens)


def read_token_file(path: Path) -> tuple[SecretStr, ...]:
    """Returns the tokens in the file `path`.

    Raises:
        UserError: it cannot be read, or holds no token.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"token file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return read_tokens(text, f"token file {path}")
