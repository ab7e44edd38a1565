"""Who may ask, how much, and how often: checked before a body is read.

A page in the browser of somebody at this machine can send requests to loopback, where no token is needed: whatever says
that it comes from another origin is refused, and without a token so is every host name that is not this machine's
(a name of an attacker's that was made to point here).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from agentrl.remote.protocol import Code
from agentrl.serve.answers import Refused
from agentrl.serve.settings import Settings

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

OPEN = frozenset({"/health", "/ready", "/metrics", "/docs", "/openapi.json"})
"""Paths that need no token: nothing here is secret or acts."""
STATIC = "/docs/"
OPENENV = "/openenv/"
"""Begins the paths of `agentrl.serve.openenv`. OpenEnv's stock client sends no header of the user's choice, but the
password of a URL (``http://any:TOKEN@host/...``): here a token may come as one."""
UNLIMITED = frozenset({"/health", "/ready"})
"""Paths that no rate applies to: a busy server is not a dead one."""

BODY_TIMEOUT_S = 30.0
"""Time for the whole body to arrive."""
_CLIENTS = 10_000
"""Clients whose rate is remembered."""


class Rates:
    """A token bucket for each client: `rate` requests per second, bursts of one second's worth."""

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self._rate, self._burst, self._clock = rate, max(rate, 1.0), clock
        self._buckets: dict[tuple[int, str], tuple[float, float]] = {}

    def take(self, client: tuple[int, str]) -> float:
        """Takes one request's worth. Returns 0, or the seconds until there is one."""
        now = self._clock()
        left, then = self._buckets.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._rate)
        wait = 0.0 if left >= 1.0 else (1.0 - left) / self._rate
        self._buckets[client] = (left if wait else left - 1.0, now)
        if len(self._buckets) > _CLIENTS:  # the one not heard of for longest is first
            del self._buckets[next(iter(self._buckets))]
        return wait


class Gate:
    """What every request passes."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        settings.check_exposure()
        self._digests = [hashlib.sha256(token.get_secret_value().encode()).digest() for token in settings.tokens]
        self._rates = Rates(settings.rate, clock) if settings.rate else None
        self._max_body = settings.max_body

    def admit(self, scope: Scope) -> int:
        """Lets a request or WebSocket in. Returns the length that its body is declared to have, else -1.

        Raises:
            Refused: wrong token or origin, too many requests, or a body declared too large.
        """
        given = origin = host = b""
        declared = -1
        for name, value in scope["headers"]:
            if name == b"authorization":
                given = value
            elif name == b"content-length":
                declared = int(value) if value.isdigit() else -1
            elif name == b"origin":
                origin = value
            elif name == b"host":
                host = value
        path = scope["path"]
        if path.startswith(OPENENV):
            given = _bearer(given)
        number = self._number_of(given) if self._digests else 0
        if self._rates is not None and path not in UNLIMITED:
            wait = self._rates.take((number, (scope.get("client") or ("",))[0]))
            if wait:
                raise Refused(Code.RATE, "too many requests", retry_after_s=round(wait, 3))
        if number < 0 and path not in OPEN and not path.startswith(STATIC):
            said = "wrong token" if given else "no token: send the header 'Authorization: Bearer TOKEN'"
            raise Refused(Code.UNAUTHORIZED, said)
        if origin or not self._digests:
            self._check_origin(origin, host)
        if declared > self._max_body:
            raise self._too_large()
        return declared

    async def body(self, receive: Receive) -> bytes:
        """Returns the body of a request.

        Raises:
            Refused: it is too large, or does not come.
        """
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(Code.INVALID, "the connection ended before the body")
                    piece: bytes = message.get("body", b"")
                    size += len(piece)
                    if size > self._max_body:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return b"".join((*pieces, piece)) if pieces else piece
                    pieces.append(piece)
        except TimeoutError:
            raise Refused(Code.INVALID, f"the body did not arrive within {BODY_TIMEOUT_S:g} s") from None

    def _number_of(self, header: bytes) -> int:
        """Returns which token a header holds, -1 for none; takes the same time for each."""
        scheme, _, token = header.partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        number = -1
        for index, wanted in enumerate(self._digests):
            if hmac.compare_digest(digest, wanted):
                number = index
        return number if scheme.lower() == b"bearer" else -1

    def _check_origin(self, origin: bytes, host: bytes) -> None:
        if origin and origin.partition(b"://")[2] != host:
            raise Refused(Code.FORBIDDEN, "requests of other web pages are refused (header Origin)")
        if not self._digests and host and not _local(host):
            raise Refused(Code.FORBIDDEN, f"host {host.decode('latin-1')!a:.80} is not this machine; without a "
                                          "token only loopback is served")  # fmt: skip

    def _too_large(self) -> Refused:
        return Refused(Code.TOO_LARGE, f"a request has at most {self._max_body:,} bytes; send fewer items at once")


def _bearer(header: bytes) -> bytes:
    """Returns the password of an ``Authorization: Basic ...`` as a bearer token; any other header as it is."""
    scheme, _, credentials = header.partition(b" ")
    if scheme.lower() != b"basic":
        return header
    try:
        return b"Bearer " + base64.b64decode(credentials, validate=True).partition(b":")[2]
    except binascii.Error:
        return header


@lru_cache(maxsize=64)
def _local(host: bytes) -> bool:
    """Whether a Host header names this machine by an address, not by a name that anybody's DNS may make mean it."""
    text = host.decode("latin-1").lower()
    name = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False
