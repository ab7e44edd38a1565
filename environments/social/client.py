"""`ChatClient`: a model behind an OpenAI-compatible URL, asked until it answers with what was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from agentrl.errors import EnvironmentFailure, UserError
from agentrl.http import Usage, bearer_headers, bearer_key, check_url, heals, masked, pause

T = TypeVar("T")

__all__ = ["ChatClient", "Usage"]


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
        backoff_s: wait before the first of them, in seconds; doubled each time, and shortened at random by
            up to half. A longer ``Retry-After`` is respected.
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
        check_url(self.url, self.key_env)
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
        busy: httpx.Response | None = None
        started, why = time.perf_counter(), ""
        usage.calls += 1
        try:
            for attempt in range(self.retries + 1):
                if attempt:
                    time.sleep(pause(attempt, self.backoff_s, busy))
                usage.attempts, busy = usage.attempts + 1, None
                try:
                    return read(self._answer(body, usage))
                except (httpx.HTTPError, ValueError) as error:  # pydantic's and json's errors are ValueErrors
                    why = f"{type(error).__name__}: {error}"
                except _Busy as error:
                    why, busy = str(error), error.answer
        finally:
            usage.seconds += time.perf_counter() - started
        why = masked(why, self._key())[:300]  # masked while it is whole: half a key would not be found
        raise EnvironmentFailure(
            f"{self.model!r} at {self.url}: no usable answer in {self.retries + 1} attempts: {why}"
        )

    def _answer(self, body: Mapping[str, Any], usage: Usage) -> str:
        key = self._key()
        address = f"{self.url.rstrip('/')}/chat/completions"
        answer = httpx.post(address, json=body, headers=bearer_headers(key), timeout=self.timeout_s)
        if heals(answer.status_code):
            raise _Busy(answer)
        if answer.status_code != 200:
            hint = f"; is the key in {self.key_env} right?" if answer.status_code in (401, 403) else ""
            raise EnvironmentFailure(f"{self.model!r} at {self.url}: HTTP {answer.status_code}{hint}")
        content = answer.json()
        try:
            usage.count(content.get("usage"), self.usd_per_million)
            text = content["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"not a chat completion: {answer.text!r}") from error
        if not isinstance(text, str):
            raise ValueError(f"the completion holds {type(text).__name__}, not text")
        return text

    def _key(self) -> str:
        try:
            return bearer_key(self.key_env)
        except UserError as error:
            raise EnvironmentFailure(str(error)) from None


class _Busy(Exception):
    """A status that may pass."""

    def __init__(self, answer: httpx.Response) -> None:
        super().__init__(f"HTTP {answer.status_code}")
        self.answer = answer
