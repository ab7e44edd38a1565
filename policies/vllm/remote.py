"""vLLM behind HTTP: a server started here and kept alive, or one that runs already.

Requests go to ``/inference/v1/generate``: token ids in, ids, log-probs and the version of each span of them out.
Weights go through vLLM's weight-transfer routes. A server of ours that dies, or stays silent beyond the deadline, is
ended with all that it started; the next request starts another, which has the newest weights before it answers anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, TypeVar

import httpx
import torch

from agentrl.errors import AgentRLError, PolicyFailure, UserError
from policies.vllm.connection import Connection, served_card
from policies.vllm.engine import ADAPTER_NAME, SCORING, Generated, WeightsError, check_version
from policies.vllm.server import ServerProcess
from policies.vllm.transfer import Exchange

log = logging.getLogger("agentrl.vllm")
Start = Callable[[], ServerProcess]
T = TypeVar("T")

_GENERATE = "/inference/v1/generate"
_HEALTH_S = 10.0
"""For an answer to ``/health``, which costs a server nothing."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a new server needs, to be where the old one was."""

    version: int = 0
    weights: tuple[str, list[str]] | None = None
    """File in the exchange, tensors in order."""
    adapter: str | None = None
    sent: bool = False
    """From GPU to GPU: nothing is left to send again."""
    fingerprint: str = ""


class RemoteEngine:
    """An `Engine` behind HTTP.

    Args:
        url: of a server that runs already; None: `start` makes one.
        start: makes a server and waits until it is ready.
        model: directory or hub name that must be served at `url`; None: whatever is.
        served_model: the name that it is served by at `url`, where that is another.
        key_env: environment variable with the key of the server at `url`.
        exchange: folder for weights.
        transfer: ``file``, ``ipc`` or ``nccl``.
        answer_s: seconds for one request; a server of ours that takes longer is taken for dead.
        restarts: how many servers may be started after the first.
        recheck: nats that the log-probs of a server that was started again may be off those of the one before.

    Raises:
        UserError: nobody answers at `url`, another model or no key there, no vLLM, another version, or the server
            cannot start.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        start: Start | None = None,
        model: str | None = None,
        served_model: str | None = None,
        key_env: str = "VLLM_API_KEY",
        exchange: Exchange | None = None,
        transfer: str = "file",
        answer_s: float = 300.0,
        restarts: int = 3,
        recheck: float = 1e-3,
    ) -> None:
        assert (url is None) != (start is None)
        self.url, self._start, self.exchange, self.transfer = url, start, exchange, transfer
        self._wanted, self.key_env = (model, served_model), key_env
        self.answer_s, self.restarts_left, self.recheck = answer_s, restarts, recheck
        self.restarts = 0
        self._loaded = _Loaded()
        self._canary: tuple[list[int], list[float]] | None = None
        """The last prompt that was scored with these weights."""
        self._lost = ""
        """Why no server can take the place of the last one, until there are new weights."""
        self._reviving = threading.RLock()
        self._doubting = threading.Lock()
        self._closed = False
        self._sender: Any = None
        self.connection = self._connect()
        try:
            self._greet()
            self._load(self._loaded)
            self.connection.ready = True
        except BaseException:
            self.close()
            raise

    @property
    def server(self) -> ServerProcess | None:
        """The server, where it is one of ours."""
        return self.connection.server

    def _connect(self) -> Connection:
        server = self._start() if self._start is not None else None
        return Connection(server, self.url, self.key_env, self.answer_s)

    def _greet(self) -> None:
        """Finds out who is there. Changes nothing there, and nothing that requests to the server before it are made of.

        Raises:
            UserError: nobody, another version, another model, or one who wants another key.
        """
        link = self.connection
        try:
            answers = {path: link.client.get(path) for path in ("/version", "/v1/models")}
            for path, answer in answers.items():
                if answer.status_code in (401, 403):
                    raise link.refusal(path, answer)
            self.version = str(answers["/version"].json()["version"])
            cards = answers["/v1/models"].json()["data"]
            card = served_card(cards, *self._wanted, link.name)
            self.base, self.root = str(card["id"]), str(card.get("root"))
            # Entries of adapters do not say.
            self.max_model_len = int(next(one for one in [card, *cards] if one.get("max_model_len"))["max_model_len"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError, StopIteration) as error:
            raise UserError(
                f"no vLLM server at {self.url or 'its socket'} ({type(error).__name__}: {error}); is it running, and "
                "is this its address (url=http://HOST:PORT)?"
            ) from error
        check_version(self.version, f"at {self.url}" if self.url else "the server's own")
        self._check_processed()

    def _check_processed(self) -> None:
        """Samples from one token: its log-prob must be that of certainty, not the one before top-k."""
        params = {"max_tokens": 1, "top_k": 1, "logprobs": 0, "seed": 0, "ignore_eos": True, "detokenize": False}
        answer = self._post(_GENERATE, {"model": self.base, "token_ids": [1, 2, 3], "sampling_params": params})
        (token,) = answer["choices"][0]["logprobs"]["content"]
        if abs(token["logprob"]) > 1e-4:
            raise UserError(
                f"{self.connection.name} returns log-probs before temperature, top-p and top-k, which are not those "
                "that the tokens were drawn with; start it with --logprobs-mode processed_logprobs"
            )

    def _body(self, ids: Sequence[int], params: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model, "token_ids": list(ids), "sampling_params": dict(params)}

    async def generate(self, ids: Sequence[int], params: Mapping[str, Any]) -> Generated:
        link = await self._usable()
        body, began = self._body(ids, params), monotonic()
        try:
            async with asyncio.timeout(self.answer_s):
                answer = await self._sample(link, body)
        except asyncio.CancelledError:
            self._doubt(link, monotonic() - began)
            raise
        except TimeoutError:
            raise self._gone(link, f"gave no answer within answer_s={self.answer_s:g} s") from None
        except httpx.HTTPError as error:
            raise self._gone(link, f"broke off ({type(error).__name__}: {error})") from error
        if answer.status_code >= 500:  # about this request; an engine that is dead ends its server by itself
            raise PolicyFailure(f"the vLLM server failed (HTTP {answer.status_code}): {link.said(answer)}")
        return self._read(link, self._checked(_GENERATE, answer, link))

    async def _usable(self) -> Connection:
        """Returns a server that may answer; waits for it to be started, and to have its weights, where need be."""
        while True:
            link = self.connection
            if link.usable and link.verdict.is_set():
                return link
            began = monotonic()
            try:
                await asyncio.to_thread(self._make_usable, link)
            except asyncio.CancelledError:
                log.warning(
                    "a call was given up after %.0f s, while the vLLM server was being replaced; "
                    "rollout.policy_deadline_s should leave it the time of a start",
                    monotonic() - began,
                )
                raise

    def _make_usable(self, link: Connection) -> None:
        link.verdict.wait()
        self._revive()

    async def _sample(self, link: Connection, body: Mapping[str, Any]) -> httpx.Response:
        client = link.here()
        try:
            return await client.post(_GENERATE, json=body)
        except httpx.HTTPError as error:
            if not await self._well(client) or not link.usable:
                raise
            log.warning("a connection to the vLLM server broke (%r); asking again", error)
            return await client.post(_GENERATE, json=body)

    async def _well(self, client: httpx.AsyncClient) -> bool:
        """Whether the server answers: then a connection has broken, not the server."""
        try:
            return (await client.get("/health", timeout=5.0)).is_success
        except httpx.HTTPError:
            return False

    def _read(self, link: Connection, answer: Any) -> Generated:
        try:
            (choice,) = answer["choices"]
            content = choice["logprobs"]["content"]
            spans = choice["weight_versions"] or []
            versions = tuple((_number(span["version"]), span["end"] - span["start"]) for span in spans)
            return Generated(choice["token_ids"], [token["logprob"] for token in content], versions)
        except (KeyError, TypeError, ValueError) as error:
            shown = link.masked(f"{answer!r}")
            raise PolicyFailure(f"vLLM's answer cannot be read ({error!r}): {shown:.200}") from error

    def score(self, ids: Sequence[int]) -> list[float]:
        found = self._surely(lambda: self._score(ids))
        self._canary = (list(ids), found)
        return found

    def _score(self, ids: Sequence[int]) -> list[float]:
        steps = self._post(_GENERATE, self._body(ids, {**SCORING, "logprobs": 0}))["prompt_logprobs"]
        return [step[str(token)]["logprob"] for step, token in zip(steps[1:], ids[1:], strict=True)]

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        if self.transfer != "file":
            # Until they have arrived, a server that takes the place of this one starts without, and is sent them.
            self._bring(_Loaded(), lambda: self._send(weights, version))
            self._loaded = _Loaded(version, sent=True)
        elif self.exchange is None:
            raise UserError(
                f"{self.connection.name} gets no weights from here; to train, start it as docs/policies.md says and "
                "give exchange=DIR, the folder that both can read"
            )
        else:
            loaded = _Loaded(version, weights=self.exchange.write(weights, version))
            self._bring(loaded, lambda: self._load(loaded))
        with self._reviving:
            found = self.fingerprint()
            self._loaded = replace(self._loaded, fingerprint=found)

    def load_adapter(self, folder: str, version: int) -> None:
        loaded = _Loaded(version, adapter=folder)
        self._bring(loaded, lambda: self._load(loaded))

    def _bring(self, loaded: _Loaded, load: Callable[[], None]) -> None:
        with self._reviving:
            # Noted before it is tried: a server that dies meanwhile is followed by one with these weights.
            self._loaded, self._canary, self._lost = loaded, None, ""
            self._surely(load)

    def _surely(self, ask: Callable[[], T]) -> T:
        """Asks, of another server where this one is gone."""
        with self._reviving:
            try:
                self._revive()
                return ask()
            except PolicyFailure:
                if self.connection.usable:
                    raise
                self._revive()
                return ask()

    def _load(self, loaded: _Loaded) -> None:
        """Brings the server to `loaded`. It says which version it has once it has it."""
        if loaded.weights is not None:
            assert self.exchange is not None
            file, names = loaded.weights
            with self._paused():
                self._post("/init_weight_transfer_engine", {"init_info": {"folder": str(self.exchange.folder)}})
                self._post("/start_weight_update")
                self._post("/update_weights", {"update_info": {"file": file, "names": names}})
                self._post("/finish_weight_update", {"weight_version": str(loaded.version)})
                self.model = self.base
        elif loaded.adapter is not None:
            with self._paused():
                body = {"lora_name": ADAPTER_NAME, "lora_path": loaded.adapter, "load_inplace": True}
                self._post("/v1/load_lora_adapter", body)
                self._post("/update_weight_version", {"new_version": str(loaded.version)})
                self.model = ADAPTER_NAME
        else:
            if self.server is not None:
                self._post("/update_weight_version", {"new_version": str(loaded.version)})
            self.model = self.base

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """Requests under way wait: between the first step and the last there is no model to run."""
        link = self.connection
        try:
            self._post("/pause?mode=keep")
            yield
            # Keys and values of the old weights are good for nothing; requests under way read their context again.
            self._post("/reset_prefix_cache?reset_running_requests=true")
            self._post("/resume")
        except BaseException:
            if link.usable:  # else another takes its place; at a URL others wait too, and nobody would wake it up
                with contextlib.suppress(httpx.HTTPError):
                    link.client.post("/resume")
                log.warning("%s was not given its new weights whole; it goes on with what it has", link.name)
            raise

    def _send(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """From GPU to GPU."""
        from agentrl.models.load import distinct
        from policies.vllm.gpu import Sender

        if self._sender is None:
            workers = self._get("/get_world_size")["world_size"]
            kind: Any = self.transfer
            self._sender = Sender(kind, self._post, workers, distinct(weights))
        with self._paused():
            self._sender.send(distinct(weights), version)
            self.model = self.base

    def fingerprint(self) -> str:
        """Of the weights as they arrived; of a server at `url` that had none from here, what it says that it serves.

        Raises:
            AgentRLError: the workers hold different weights.
            PolicyFailure: no answer.
        """
        if self.url is None or self._loaded.weights is not None or self._loaded.sent:
            return self._surely(self._fingerprint)
        # One for evaluation alone may have no such route, or no such method behind it.
        answer = self._request("POST", "/collective_rpc", {"method": "agentrl_fingerprint"})
        found = _agreed(answer.json()["results"]) if answer.is_success else ""
        return found or f"not read: {self.base!r} from {self.root!r}, as the server says"

    def _fingerprint(self) -> str:
        return _agreed(self._post("/collective_rpc", {"method": "agentrl_fingerprint"})["results"])

    def close(self) -> None:
        self._closed = True
        if self._sender is not None:
            self._sender.close()
        self.connection.close()
        if self.server is not None:
            self.server.stop()
        if self.exchange is not None:
            self.exchange.close()

    def _revive(self) -> None:
        """Starts another server in the place of one that is gone, with the newest weights; one caller does it for all.

        Raises:
            PolicyFailure: no more servers may be started, or the new one cannot be brought to where the old one was.
            WeightsError: it could be brought there only in part, or not at all.
        """
        with self._reviving:
            if self._closed:
                raise PolicyFailure("the vLLM server was closed")
            link = self.connection
            if link.usable:
                return
            assert link.server is not None
            why = link.bad or f"ended; {link.server.describe_end()}"
            link.server.kill()
            if self._loaded.sent:
                self._lost = (
                    f"the vLLM server {why}\nand with it the weights of version {self._loaded.version}, which "
                    f"transfer={self.transfer} sends once, from GPU to GPU: resume the run from its last checkpoint; "
                    "with transfer=file a new server gets them again"
                )
            if self._lost:
                raise WeightsError(self._lost)
            if self.restarts_left < 1:
                raise PolicyFailure(f"the vLLM server {why} (it was started again {self.restarts} times)")
            self.restarts_left -= 1
            self.restarts += 1
            log.warning("the vLLM server %s; starting another (%d left)", why, self.restarts_left)
            self._sender = None
            try:
                self._replace()
            except WeightsError as error:
                self._lost = str(error)
                raise
            except AgentRLError as error:
                raise PolicyFailure(str(error)) from error

    def _replace(self) -> None:
        link = self.connection
        try:
            link, old = self._connect(), link
            self.connection = link
            old.close()
            self._greet()
            self._load(self._loaded)
            self._check_again()
            link.ready = True
        except BaseException as error:
            link.bad = link.bad or f"could not be replaced: {error}"
            raise
        finally:
            if self._closed and link.server is not None:  # meanwhile, by somebody who saw the old one
                link.server.kill()

    def _check_again(self) -> None:
        """Checks that a server that was started again has the weights of the one before, and computes with them.

        Raises:
            WeightsError: not so; with both fingerprints, or both log-probs.
        """
        expected = self._loaded.fingerprint
        if expected and (found := self._fingerprint()) != expected:
            raise WeightsError(f"the new vLLM server holds weights {found}, the old one held {expected}")
        ids, before = self._canary or ([], [])
        if not before:
            return
        now = self._score(ids)
        off = [abs(a - b) if abs(a - b) >= 0 else torch.inf for a, b in zip(now, before, strict=True)]
        worst = max(range(len(off)), key=off.__getitem__)
        if off[worst] > self.recheck:
            raise WeightsError(
                f"the new vLLM server does not compute what the old one did (version {self._loaded.version} of the "
                f"weights): log-prob of token {worst + 1} of a fixed prompt {now[worst]:.4f} now, {before[worst]:.4f} "
                f"before (limit {self.recheck:g} nats)"
            )

    def _doubt(self, link: Connection, waited_s: float) -> None:
        """Has a server of ours asked whether it is well: somebody gave up waiting for it, perhaps with good reason.

        Whoever waits less than `answer_s` never sees that it is over, and would come back to a server that hangs.
        """
        with self._doubting:
            if link.server is None or self._closed or link.bad or not link.verdict.is_set():
                return
            link.verdict.clear()
        threading.Thread(target=self._examine, args=(link, waited_s), daemon=True).start()

    def _examine(self, link: Connection, waited_s: float) -> None:
        """Asks for a sign of life; then, as a server can outlive its engine, for one token in what is left of its time.

        Only silence is held against it: connections break elsewhere too, and where it has ended that is seen.
        """
        body = self._body([1], {"max_tokens": 1, "detokenize": False})
        what = f"gave no sign of life within {_HEALTH_S:g} s, and no answer within {waited_s:.1f} s"
        try:
            link.client.get("/health", timeout=_HEALTH_S)
            link.verdict.set()
            with self._doubting:
                if link.tried:
                    return
                link.tried = True
            what = f"gave no answer within answer_s={self.answer_s:g} s"
            link.client.post(_GENERATE, json=body, timeout=max(_HEALTH_S, self.answer_s - waited_s))
            link.tried = False
        except httpx.TimeoutException:
            self._gone(link, what)
        except (httpx.HTTPError, RuntimeError):  # RuntimeError: the client was closed
            link.tried = False
        finally:
            link.verdict.set()

    def _gone(self, link: Connection, what: str) -> PolicyFailure:
        """Notes that a server of ours is not to be used any more; returns what to raise."""
        if link.server is not None and link is self.connection and not self._closed:
            link.bad = link.bad or f"{what}; {link.server.describe_end()}"
            # Those that wait for it too need not wait for their own deadlines.
            threading.Thread(target=link.server.kill, daemon=True).start()
        return PolicyFailure(f"the vLLM server {what}")

    async def aclose(self) -> None:
        """Closes this loop's connections."""
        await self.connection.aclose()

    def _post(self, path: str, body: Any = None) -> Any:
        return self._checked(path, self._request("POST", path, body), self.connection)

    def _get(self, path: str) -> Any:
        return self._checked(path, self._request("GET", path, None), self.connection)

    def _request(self, method: str, path: str, body: Any) -> httpx.Response:
        link = self.connection
        try:
            return link.client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._gone(link, f"broke off at {path} ({type(error).__name__}: {error})") from error

    def _checked(self, path: str, answer: httpx.Response, link: Connection) -> Any:
        """Returns the JSON of an answer, None where there is none.

        Raises:
            UserError: what the server refuses.
            PolicyFailure: what went wrong inside it.
        """
        if answer.is_success:
            if not answer.headers.get("content-type", "").startswith("application/json"):
                return None
            return answer.json()
        if answer.status_code >= 500:
            raise self._gone(link, f"failed at {path} (HTTP {answer.status_code}: {link.said(answer)})")
        raise link.refusal(path, answer)


def _agreed(fingerprints: Sequence[str]) -> str:
    """The fingerprint that all workers told.

    Raises:
        AgentRLError: they told several.
    """
    found = set(fingerprints)
    if len(found) != 1:
        raise AgentRLError(f"vLLM's workers hold different weights: {', '.join(sorted(found))}")
    return str(found.pop())


def _number(version: str) -> int:
    return int(version) if version.lstrip("-").isdigit() else 0
