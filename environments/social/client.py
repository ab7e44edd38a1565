"""`ChatClient`: a model behind an OpenAI-compatible URL, asked until it answers with what was asked for."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import httpx

from agentrl.errors import EnvironmentFailure, UserError

T = TypeVar("T")
_WORTH_RETRYING = {408, 409, 425, 429}


@dataclass
class Usage:
    """What calls have cost, failed attempts included."""

    calls: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    """Wall-clock time, waiting between attempts included."""
    usd: float = 0.0
    """At the client's prices."""

    def as_dict(self) -> dict[str, float]:
        """The record as JSON, for `info`."""
        return asdict(self)


@dataclass(frozen=True)
class ChatClient:
    """Calls ``{url}/chat/completions``. Holds no connection and no key, and can be pickled.

    Args:
        url: base address, e.g. ``http://localhost:8000/v1``.
        model: name of the model there.
        key_env: environment variable with the bearer key; unset: no key is sent. The key is read for each call and
            appears in no message, record or `repr`.
        timeout_s: limit for each read of one attempt, in seconds.
        retries: further attempts after one that failed.
        backoff_s: wait before the first of them, in seconds; doubled each time, and shortened at random by up to half.
        temperature: of the model's sampling.
        max_tokens: of an answer.
        usd_per_million: prices of a million prompt and completion tokens.

    Raises:
        UserError: no http(s) URL, or a number out of its range.
    """

    url: str
    model: str = "default"
    key_env: str = "OPENAI_API_KEY"
    timeout_s: float = 15.0
    retries: int = 2
    backoff_s: float = 0.5
    temperature: float = 0.0
    max_tokens: int = 1500
    usd_per_million: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        try:
            address = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise UserError(f"not a URL: {error}; for example http://localhost:8000/v1") from error
        if address.scheme not in ("http", "https") or not address.host:
            raise UserError(f"url={self.url!r}: an address such as http://localhost:8000/v1")
        if address.userinfo:
            raise UserError(f"the URL of {address.host} holds a user name; put the key into {self.key_env}")
        if self.timeout_s <= 0 or self.retries < 0 or self.backoff_s < 0:
            raise UserError(
                f"timeout_s={self.timeout_s}, retries={self.retries}, backoff_s={self.backoff_s}: "
                "a positive time, and no negative ones"
            )

    def ask(
        self,
        messages: Sequence[Mapping[str, str]],
        read: Callable[[str], T],
        usage: Usage,
        response_format: Mapping[str, Any] | None = None,
    ) -> T:
        """Returns what `read` makes of the model's answer.

        Args:
            messages: the conversation.
            read: raises `ValueError` for an answer that is not what was asked for; that is tried again too.
            usage: the call is added to it, whether it succeeds or not.
            response_format: as in OpenAI's protocol.

        Raises:
            EnvironmentFailure: no usable answer after all attempts, or an answer that no retry can change (401, 404).
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            **({"response_format": response_format} if response_format else {}),
        }
        started, why = time.perf_counter(), ""
        usage.calls += 1
        try:
            for attempt in range(self.retries + 1):
                if attempt:
                    time.sleep(self.backoff_s * 2 ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1))
                usage.attempts += 1
                try:
                    return read(self._answer(body, usage))
                except (httpx.HTTPError, ValueError) as error:  # pydantic's and json's errors are ValueErrors
                    why = f"{type(error).__name__}: {error!s:.300}"
                except _Busy as busy:
                    why = str(busy)
        finally:
            usage.seconds += time.perf_counter() - started
        if key := self._key():  # a server may quote it
            why = why.replace(key, "***")
        raise EnvironmentFailure(
            f"{self.model!r} at {self.url}: no usable answer in {self.retries + 1} attempts: {why}"
        )

    def _answer(self, body: Mapping[str, Any], usage: Usage) -> str:
        key = self._key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = httpx.post(
            f"{self.url.rstrip('/')}/chat/completions", json=body, headers=headers, timeout=self.timeout_s
        )
        if answer.status_code >= 500 or answer.status_code in _WORTH_RETRYING:
            raise _Busy(f"HTTP {answer.status_code}")
        if answer.status_code != 200:
            hint = f"; is the key in {self.key_env} right?" if answer.status_code in (401, 403) else ""
            raise EnvironmentFailure(f"{self.model!r} at {self.url}: HTTP {answer.status_code}{hint}")
        content = answer.json()
        try:
            self._count(content.get("usage") or {}, usage)
            text = content["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"not a chat completion: {answer.text[:200]!r}") from error
        if not isinstance(text, str):
            raise ValueError(f"the completion holds {type(text).__name__}, not text")
        return text

    def _key(self) -> str:
        """Reads the key. One that no header can hold is refused here: the HTTP library's own error would quote it."""
        key = os.environ.get(self.key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise EnvironmentFailure(f"the key in {self.key_env} holds characters that no HTTP header can")
        return key

    def _count(self, counted: Mapping[str, Any], usage: Usage) -> None:
        prompt, completion = (int(counted.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion"))
        usage.prompt_tokens += prompt
        usage.completion_tokens += completion
        usage.usd += (prompt * self.usd_per_million[0] + completion * self.usd_per_million[1]) / 1e6


class _Busy(Exception):
    """A status that may pass."""
