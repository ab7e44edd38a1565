"""What clients of model servers share: which failures heal, how long to wait, the key, and what calls have cost.

Used by policies behind a URL, judges, partners and served PRMs. What each of them sends, and which error it makes of an
answer, is its own affair.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from agentrl.errors import UserError

LONGEST_PAUSE_S = 30.0
_HEALING = {408, 409, 425, 429}
_jitter = random.SystemRandom()  # not the global stream: runs seed that one


def heals(status: int) -> bool:
    """Whether an HTTP status may be another one soon: timeouts, rate limits and faults of the server."""
    return status in _HEALING or status >= 500


def pause(attempt: int, first_s: float, answer: httpx.Response | None = None, patience_s: float = 60.0) -> float:
    """Returns the seconds to wait before a further attempt.

    Twice as long each time, shortened at random by up to half, so that clients do not come back all at once; but never
    less than the server asked for.

    Args:
        attempt: number of failed attempts so far, at least 1.
        first_s: the longest first pause.
        answer: the server's answer, where there was one.
        patience_s: longest ``Retry-After`` that is respected; of a longer one, this much.
    """
    backoff: float = min(LONGEST_PAUSE_S, first_s * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1)
    return max(backoff, min(patience_s, retry_after(answer)) if answer is not None else 0.0)


def retry_after(answer: httpx.Response) -> float:
    """Returns the seconds that a ``Retry-After`` header asks for (a number or a date); 0 without a valid one."""
    said = str(answer.headers.get("Retry-After", "")).strip()
    if not said:
        return 0.0
    try:
        seconds: float = float(said)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(said).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if 0 < seconds < float("inf") else 0.0


def bearer_key(key_env: str) -> str:
    """Returns the key in the environment variable `key_env`; empty where it is not set.

    Raises:
        UserError: no header can hold it. Refused here, because the HTTP library's own error would quote it.
    """
    key = os.environ.get(key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the key in ${key_env} holds characters that no HTTP header can")
    return key


def bearer_headers(key: str) -> dict[str, str]:
    """Returns the header that carries `key`; none for an empty one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def masked(text: str, key: str) -> str:
    """Returns `text` without `key`, which a server may quote."""
    return text.replace(key, "***") if key else text


def check_url(url: str, key_env: str) -> str:
    """Returns `url` without a slash at its end.

    Raises:
        UserError: no http(s) address; one with a user name, a query or a fragment: paths are put behind the address,
            and what may be a key would end up in files and logs.
    """
    bare, *rest = re.split("[?#]", url, maxsplit=1) if isinstance(url, str) else [url]
    try:
        address = httpx.URL(bare)
    except (httpx.InvalidURL, TypeError) as error:
        raise UserError(f"not a URL: {error}; for example http://localhost:8000/v1") from error
    if address.scheme not in ("http", "https") or not address.host:
        raise UserError(f"url={bare!r}: an address such as http://localhost:8000/v1")
    if address.userinfo:
        raise UserError(f"the URL of {address.host} holds a user name; put the key into {key_env}")
    if rest:
        raise UserError(
            f"url={bare!r} goes on with a query or a fragment (not shown: it may hold a key); give the address alone "
            f"and put the key into {key_env}"
        )
    return bare.rstrip("/")


@dataclass
class Usage:
    """What calls have cost, failed attempts included."""

    calls: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    """Wall-clock time, waiting between attempts included; that of calls side by side adds up."""
    usd: float = 0.0
    """At the client's prices."""

    def count(self, counted: object, usd_per_million: tuple[float, float]) -> None:
        """Adds the `usage` of one answer in OpenAI's protocol, at prices of a million prompt and completion tokens.

        Raises:
            ValueError: it holds something else than numbers.
        """
        if not isinstance(counted, Mapping):
            return
        try:
            prompt, completion = (int(counted.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion"))
        except TypeError as error:
            raise ValueError(f"usage {counted!r}: {error}") from error  # who shows it masks keys, then cuts
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.usd += (prompt * usd_per_million[0] + completion * usd_per_million[1]) / 1e6

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON."""
        return asdict(self)
