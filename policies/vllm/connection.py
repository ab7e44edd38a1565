"""HTTP to one vLLM server: over the socket of one of ours, or to a URL, with its key; and what its refusals mean."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from agentrl.errors import UserError
from agentrl.http import bearer_headers, bearer_key, check_url, masked
from policies.vllm.server import ServerProcess

_NONE_KEPT = httpx.Limits(max_connections=None, max_keepalive_connections=0)
"""A connection for each request, which costs nothing beside a forward pass. On a busy machine, requests over kept ones
were now and then answered by a disconnect, which looks like a server that died; why was not found out."""


class Connection:
    """One server and what is known of it. Another server is another `Connection`: none is mistaken for the next.

    Args:
        server: one of ours; None: `url`.
        url: ``http://HOST:PORT``.
        key_env: environment variable with the bearer key of the server at `url`. Read for each request and never kept.
        timeout_s: for requests that block.

    Raises:
        UserError: `url` is no http(s) address.
    """

    def __init__(self, server: ServerProcess | None, url: str | None, key_env: str, timeout_s: float) -> None:
        assert (server is None) != (url is None)
        self.server, self.key_env = server, key_env
        self.url = None if url is None else check_url(url, key_env).removesuffix("/v1")
        self.name = "the vLLM server" if self.url is None else f"the vLLM server at {self.url}"
        self.ready = False
        """It has what the one before had. Until then it answers nobody but those who bring it there."""
        self.bad = ""
        """Why it is not to be used any more."""
        self.verdict = threading.Event()
        """Cleared while it is being asked whether it is well."""
        self.verdict.set()
        self.tried = False
        """Whether it is being asked for a token, to see if it has an engine left."""
        self._base = self.url or "http://vllm"
        self._async: tuple[asyncio.AbstractEventLoop, httpx.AsyncClient] | None = None
        options: dict[str, Any] = {"limits": _NONE_KEPT, "auth": self._sign}
        if server is not None:
            options = {"transport": httpx.HTTPTransport(uds=str(server.socket), limits=_NONE_KEPT)}
        self.client = httpx.Client(base_url=self._base, timeout=timeout_s, **options)

    @property
    def usable(self) -> bool:
        """Whether it may answer."""
        return self.server is None or (self.ready and not self.bad and self.server.alive)

    @property
    def _key(self) -> str:
        return bearer_key(self.key_env) if self.server is None else ""

    def _sign(self, request: httpx.Request) -> httpx.Request:
        request.headers.update(bearer_headers(self._key))
        return request

    def here(self) -> httpx.AsyncClient:
        """The client of this event loop."""
        loop = asyncio.get_running_loop()
        if self._async is None or self._async[0] is not loop:
            options: dict[str, Any] = {"limits": _NONE_KEPT, "auth": self._sign}
            if self.server is not None:
                options = {"transport": httpx.AsyncHTTPTransport(uds=str(self.server.socket), limits=_NONE_KEPT)}
            self._async = (loop, httpx.AsyncClient(base_url=self._base, timeout=None, **options))
        return self._async[1]

    def masked(self, text: str) -> str:
        """Returns `text` without the key, which a server may quote."""
        return masked(text, self._key)

    def said(self, answer: httpx.Response) -> str:
        """Returns the server's own words, cut to what a message can hold."""
        return self.masked(answer.text.strip())[:400]

    def refusal(self, path: str, answer: httpx.Response) -> UserError:
        """What to raise for an answer that no retry can change."""
        status = answer.status_code
        if self.url is not None and status in (401, 403):
            given = f"refuses the key in {self.key_env}" if self._key else f"wants a key, and {self.key_env} is not set"
            return UserError(
                f"{self.name} {given} (HTTP {status}); put the key into that environment variable, or name another one "
                "with key_env=NAME"
            )
        if self.url is not None and status == 404:
            return UserError(
                f"{self.name} has no {path}: start it with --enable-scale-out and, for new weights, "
                "VLLM_SERVER_DEV_MODE=1 and the flags in docs/policies.md"
            )
        return UserError(f"{self.name} refuses {path} (HTTP {status}): {self.said(answer)}")

    def close(self) -> None:
        """Closes the connections that block."""
        self.client.close()

    async def aclose(self) -> None:
        """Closes this loop's connections."""
        if self._async is not None and self._async[0] is asyncio.get_running_loop():
            await self._async[1].aclose()
        self._async = None


def served_card(
    cards: Sequence[Mapping[str, Any]], model: str | None, served_model: str | None, server: str
) -> Mapping[str, Any]:
    """Returns the entry of ``/v1/models`` that `model` is served as, a base model before an adapter.

    Args:
        cards: all entries.
        model: directory or hub name; None: whatever is served. Found by its name or its last part, under the name that
            it is served by or the place that it was read from.
        served_model: the name that it is served by, where that is neither.
        server: who, for the message.

    Raises:
        UserError: it is not among them; names both.
    """
    if served_model is not None:
        found = [card for card in cards if card["id"] == served_model]
    elif model is None:
        found = list(cards)
    else:
        names = {model, _last(model)} - {""}
        found = [card for card in cards if names & {part for name in _names(card) for part in (name, _last(name))}]
    if not found:
        listed = ", ".join(f"{card['id']!r} (from {card.get('root')!r})" for card in cards) or "no model"
        raise UserError(
            f"{server} serves {listed}, and what is wanted is {served_model or model!r}: give the address that serves "
            "it (url=...), or, where that is the same model under another name, served_model=NAME"
        )
    return min(found, key=lambda card: bool(card.get("parent")))


def _names(card: Mapping[str, Any]) -> list[str]:
    return [str(card["id"]), str(card.get("root") or "")]


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
