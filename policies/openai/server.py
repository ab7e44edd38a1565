"""`Server`: one OpenAI-compatible address, asked until it answers, a limit is reached or the user must mend something.

What may heal (no connection, silence, rate limits, 5xx, an answer that cannot be read) is tried again after a growing,
random pause, or when the server says so. What no retry can change is a `UserError` that names the URL, the key's
variable or the model, so that a run ends at once instead of failing episode by episode.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

from agentrl.errors import DeadlineExceeded, PolicyFailure, UnknownNameError, UserError
from agentrl.http import Usage, bearer_headers, bearer_key, check_url, heals, masked, pause

T = TypeVar("T")
_NAMES_SHOWN = 20
_SAID = 300
"""Characters of a server's own words that an error shows."""
_TOO_LONG = ("context length", "context_length", "maximum context", "too long", "too many tokens")


class Server:
    """An asynchronous client; all its coroutines belong on one event loop (`LoopThread`).

    Args:
        url: base address, e.g. ``http://localhost:8000/v1``.
        key_env: environment variable with the bearer key. Read for each call; in no message, record or `repr`.
        concurrency: requests in flight at once, over as many connections, which are kept open.
        timeout_s: seconds of silence after which an attempt is given up.
        deadline_s: seconds for a request with all its attempts and pauses.
        retries: further attempts after one that failed.
        backoff_s: the longest first pause, in seconds; doubled each time.

    Raises:
        UserError: no http(s) URL, one that goes on after its path, or a number out of its range.
    """

    def __init__(
        self,
        url: str,
        *,
        key_env: str,
        concurrency: int,
        timeout_s: float,
        deadline_s: float,
        retries: int,
        backoff_s: float,
    ) -> None:
        self.url = check_url(url, key_env)
        if concurrency < 1 or timeout_s <= 0 or deadline_s <= 0 or retries < 0 or backoff_s < 0:
            raise UserError(
                f"concurrency={concurrency}, timeout_s={timeout_s}, deadline_s={deadline_s}, retries={retries}, "
                f"backoff_s={backoff_s}: at least one request, positive times, and nothing negative"
            )
        self.key_env, self.concurrency, self.timeout_s = key_env, concurrency, timeout_s
        self.deadline_s, self.retries, self.backoff_s = deadline_s, retries, backoff_s
        self.usage = Usage()
        self.reached = False
        """Whether anything has answered here: before, a refused connection is a wrong address."""
        self._client: httpx.AsyncClient | None = None
        self._slots: asyncio.Semaphore | None = None

    async def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], T]) -> T:
        """Returns what `read` makes of the JSON answer to ``POST {url}{path}``.

        Args:
            path: e.g. ``/chat/completions``.
            body: sent as JSON; `model` is named in errors.
            read: raises `ValueError` for an answer that is not what was asked for; that is tried again too.

        Raises:
            PolicyFailure: no usable answer after all attempts.
            DeadlineExceeded: none within `deadline_s`.
            UserError: wrong URL, key or model, or a request that the server refuses.
        """
        client, slots = self._open()
        call = _Call(path, body, bearer_key(self.key_env))
        self.usage.calls += 1
        async with slots:  # waiting for a place costs nothing of the request's own time
            started = time.perf_counter()
            try:
                async with asyncio.timeout(self.deadline_s) as limit:
                    return await self._try(client, call, read, limit)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"{self._who(call)}: no answer within {self.deadline_s:g} s{call.last}"
                ) from None
            finally:
                self.usage.seconds += time.perf_counter() - started

    async def models(self) -> list[str] | None:
        """Returns the names of the models served here; None where the server does not tell.

        Raises:
            UserError: nobody answers here, or the key is refused.
        """
        client, _ = self._open()
        key = bearer_key(self.key_env)
        try:
            answer = await client.get(f"{self.url}/models", headers=bearer_headers(key))
        except httpx.RequestError as error:
            if not self.reached:
                raise self._not_there(error, key) from error
            return None
        self.reached = True
        if answer.status_code in (401, 403):
            raise self._key_refused(answer.status_code, key)
        try:
            return [str(model["id"]) for model in answer.json()["data"]] if answer.is_success else None
        except (ValueError, KeyError, TypeError):
            return None

    async def aclose(self) -> None:
        """Closes the connections; the next request opens new ones."""
        client, self._client, self._slots = self._client, None, None
        if client is not None:
            await client.aclose()

    def _open(self) -> tuple[httpx.AsyncClient, asyncio.Semaphore]:
        if self._client is None or self._slots is None:
            limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
            self._client = httpx.AsyncClient(timeout=self.timeout_s, limits=limits)
            self._slots = asyncio.Semaphore(self.concurrency)
        return self._client, self._slots

    async def _try(self, client: httpx.AsyncClient, call: _Call, read: Callable[[Any], T], limit: asyncio.Timeout) -> T:
        answer: httpx.Response | None = None
        for attempt in range(self.retries + 1):
            if attempt:
                await self._rest(call, pause(attempt, self.backoff_s, answer, self.deadline_s), limit)
            self.usage.attempts += 1
            answer = None
            try:
                answer = await client.post(f"{self.url}{call.path}", json=call.body, headers=bearer_headers(call.key))
            except httpx.TimeoutException as error:
                call.why = f"{type(error).__name__}: silent for {self.timeout_s:g} s"
                continue
            except httpx.RequestError as error:
                if isinstance(error, httpx.ConnectError) and not self.reached:
                    raise self._not_there(error, call.key) from error
                call.why = f"{type(error).__name__}: {_quoted(error, call.key)}"
                continue
            self.reached = True
            if not answer.is_success:
                call.why = f"HTTP {answer.status_code}: {_said(answer, call.key)}"
                if heals(answer.status_code) and "insufficient_quota" not in answer.text:
                    continue
                raise await self._refused(answer, call)
            try:
                return read(answer.json())
            except ValueError as error:  # json's errors are ValueErrors
                call.why = f"not an answer in OpenAI's protocol: {_quoted(error, call.key)}"
        raise PolicyFailure(f"{self._who(call)}: no usable answer in {self.retries + 1} attempts{call.last}")

    async def _rest(self, call: _Call, seconds: float, limit: asyncio.Timeout) -> None:
        """Waits before the next attempt; not where that would only end at the deadline."""
        left = (limit.when() or 0.0) - asyncio.get_running_loop().time()
        if seconds >= left:
            raise DeadlineExceeded(
                f"{self._who(call)}: the next attempt would come in {seconds:.1f} s, after the deadline of "
                f"{self.deadline_s:g} s{call.last}"
            )
        await asyncio.sleep(seconds)

    async def _refused(self, answer: httpx.Response, call: _Call) -> Exception:
        """What to raise for a status that no retry can change."""
        status, who = answer.status_code, self._who(call)
        if status in (401, 403):
            return self._key_refused(status, call.key)
        if status in (404, 405):
            return await self._not_found(status, call)
        if answer.has_redirect_location:
            where = _quoted(answer.headers["Location"], call.key)
            return UserError(f"the server at {self.url} sends on to {where!r}; give the address that it means as url")
        if status in (400, 413, 422) and any(words in answer.text.lower() for words in _TOO_LONG):
            return PolicyFailure(
                f"{who}: the conversation is longer than the model's context{call.last}; show it less of the past "
                "(--history 'window(k)')"
            )
        return UserError(f"{who}: the server refuses the request{call.last}")

    async def _not_found(self, status: int, call: _Call) -> Exception:
        names = await self.models()
        if names is None:
            return UserError(
                f"no OpenAI-compatible server at {self.url}: HTTP {status} for {call.path}, and {self.url}/models "
                "lists nothing; the base address of most servers ends in /v1"
            )
        if call.model in names:
            other = "completions" if "chat" in call.path else "chat"
            return UserError(f"{self._who(call)}: the server has no {call.path}{call.last}; try endpoint={other}")
        return unknown_model(call.model, names, self.url)

    def _not_there(self, error: httpx.RequestError, key: str) -> UserError:
        return UserError(
            f"nobody answers at {self.url} ({type(error).__name__}: {_quoted(error, key)}); is the server running, and "
            "is this its address (url=http://HOST:PORT/v1)?"
        )

    def _key_refused(self, status: int, key: str) -> UserError:
        given = f"refuses the key in {self.key_env}" if key else f"wants a key, and {self.key_env} is not set"
        return UserError(
            f"the server at {self.url} {given} (HTTP {status}); put the key into that environment variable, or name "
            "another one with key_env=NAME"
        )

    def _who(self, call: _Call) -> str:
        return f"{call.model!r} at {self.url}"


def unknown_model(name: str, names: list[str], url: str) -> UnknownNameError:
    """Returns the error for a model that is not among those served."""
    error = UnknownNameError("model", name, names, f"{url}/models lists all {len(names)}")
    if len(names) > _NAMES_SHOWN and "did you mean" not in str(error):
        error = UnknownNameError("model", name, sorted(names)[:_NAMES_SHOWN], f"{url}/models lists all {len(names)}")
    return error


class _Call:
    """One request with the reason why its last attempt failed."""

    def __init__(self, path: str, body: Mapping[str, Any], key: str) -> None:
        self.path, self.body, self.key = path, dict(body), key
        self.model = str(body.get("model"))
        self.why = ""

    @property
    def last(self) -> str:
        return f"; the last: {self.why}" if self.why else ""


def _quoted(words: object, key: str) -> str:
    """Returns what a server said, for an error: masked while it is whole, as half a key would not be found."""
    return masked(str(words), key)[:_SAID]


def _said(answer: httpx.Response, key: str) -> str:
    """Returns the server's own words about an error."""
    try:
        said = answer.json()
        error = said.get("error", said)
        message = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        message = answer.text
    return _quoted(str(message).strip() or answer.reason_phrase, key)


class LoopThread:
    """An event loop in a daemon thread of its own, started by the first `submit`.

    Connections belong to a loop. Callers come from many: the collector's, and one for each call of a partner.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts `coroutine` there."""
        with self._lock:
            if self._loop is None:
                made: Future[asyncio.AbstractEventLoop] = Future()
                self._thread = threading.Thread(target=_run_loop, args=(made,), name=self._name, daemon=True)
                self._thread.start()
                self._loop = made.result()
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """Ends the loop and its thread; tasks still in it are cancelled."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=5.0)


def _run_loop(made: Future[asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner() as runner:  # its end cancels what is left
        loop = runner.get_loop()
        made.set_result(loop)
        loop.run_forever()
