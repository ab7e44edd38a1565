"""vLLM behind HTTP: a server started here and kept alive, or one that runs already.

Requests go to ``/inference/v1/generate``: token ids in, ids, log-probs and the version of each span of them out.
Weights go through vLLM's weight-transfer routes. A server of ours that dies, or stays silent beyond the deadline, is
ended with all that it started; the next request starts another, which has the newest weights before it answers anybody.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from agentrl.errors import AgentRLError, PolicyFailure, UserError
from policies.vllm.engine import ADAPTER_NAME, SCORING, Generated, check_version
from policies.vllm.server import ServerProcess
from policies.vllm.transfer import Exchange

log = logging.getLogger("agentrl.vllm")
Start = Callable[[], ServerProcess]

_NONE_KEPT = httpx.Limits(max_connections=None, max_keepalive_connections=0)
"""A connection for each request, which costs nothing beside a forward pass. On a busy machine, requests over kept ones
were now and then answered by a disconnect, which looks like a server that died; why was not found out."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a new server needs, to be where the old one was."""

    version: int
    weights: tuple[str, list[str]] | None = None
    """File in the exchange, tensors in order."""
    adapter: str | None = None
    fingerprint: str = ""


class RemoteEngine:
    """An `Engine` behind HTTP.

    Args:
        url: of a server that runs already; None: `start` makes one.
        start: makes a server and waits until it is ready.
        exchange: folder for weights; None: this server gets none.
        transfer: ``file``, ``ipc`` or ``nccl``.
        answer_s: seconds for one request; a server of ours that takes longer is taken for dead.
        restarts: how many servers may be started after the first.

    Raises:
        UserError: nobody answers at `url`, no vLLM, another version, or the server cannot start.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        start: Start | None = None,
        exchange: Exchange | None = None,
        transfer: str = "file",
        answer_s: float = 300.0,
        restarts: int = 3,
    ) -> None:
        assert (url is None) != (start is None)
        self.url, self._start, self.exchange, self.transfer = url, start, exchange, transfer
        self.answer_s, self.restarts_left = answer_s, restarts
        self.restarts = 0
        self.after_restart: Callable[[], None] = lambda: None
        """Called when another server has the newest weights, before anybody else; may raise."""
        self._loaded = _Loaded(0)
        self._reviving = threading.RLock()
        self._closed = False
        self._bad = ""
        """Why the server is not to be used any more."""
        self._async: tuple[asyncio.AbstractEventLoop, ServerProcess | None, httpx.AsyncClient] | None = None
        self._sender: Any = None
        self.server = start() if start is not None else None
        self._client = self._connect()
        try:
            self._greet()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> httpx.Client:
        if self.server is not None:
            transport = httpx.HTTPTransport(uds=str(self.server.socket), limits=_NONE_KEPT)
            return httpx.Client(transport=transport, base_url="http://vllm", timeout=self.answer_s)
        assert self.url is not None
        return httpx.Client(base_url=self.url.rstrip("/").removesuffix("/v1"), timeout=self.answer_s, limits=_NONE_KEPT)

    def _greet(self) -> None:
        """Finds out who is there."""
        try:
            told = self._client.get("/version")
            self.version = str(told.json()["version"])
            served = self._client.get("/v1/models").json()["data"][0]
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"no vLLM server at {self.url or 'its socket'} ({type(error).__name__}: {error}); is it running, and "
                "is this its address (url=http://HOST:PORT)?"
            ) from error
        check_version(self.version, f"at {self.url}" if self.url else "the server's own")
        self.model, self.max_model_len = str(served["id"]), int(served["max_model_len"])
        self.base = self.model
        self._check_processed()
        if self.server is not None:
            self._post("/update_weight_version", {"new_version": str(self._loaded.version)})

    def _check_processed(self) -> None:
        """Samples from one token: its log-prob must be that of certainty, not the one before top-k."""
        params = {"max_tokens": 1, "top_k": 1, "logprobs": 0, "seed": 0, "ignore_eos": True, "detokenize": False}
        answer = self._post("/inference/v1/generate", self._body([1, 2, 3], params))
        (token,) = answer["choices"][0]["logprobs"]["content"]
        if abs(token["logprob"]) > 1e-4:
            raise UserError(
                f"the vLLM server at {self.url} returns log-probs before temperature, top-p and top-k, which are not "
                "those that the tokens were drawn with; start it with --logprobs-mode processed_logprobs"
            )

    def _body(self, ids: Sequence[int], params: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.model, "token_ids": list(ids), "sampling_params": dict(params)}

    async def generate(self, ids: Sequence[int], params: Mapping[str, Any]) -> Generated:
        if self._needs_revival():
            await asyncio.to_thread(self._revive)
        server, client = self.server, self._client_here()
        body = self._body(ids, params)
        try:
            async with asyncio.timeout(self.answer_s):
                try:
                    answer = await client.post("/inference/v1/generate", json=body, timeout=None)
                except httpx.HTTPError as error:
                    if not await self._well(client):
                        raise
                    log.warning("a connection to the vLLM server broke (%r); asking again", error)
                    answer = await client.post("/inference/v1/generate", json=body, timeout=None)
        except TimeoutError:
            raise self._gone(server, f"gave no answer within answer_s={self.answer_s:g} s") from None
        except httpx.HTTPError as error:
            raise self._gone(server, f"broke off ({type(error).__name__}: {error})") from error
        if answer.status_code >= 500:  # about this request; an engine that is dead ends its server by itself
            raise PolicyFailure(f"the vLLM server failed (HTTP {answer.status_code}): {answer.text.strip()[:400]}")
        return self._read(self._checked("/inference/v1/generate", answer, server))

    async def _well(self, client: httpx.AsyncClient) -> bool:
        """Whether the server answers: then a connection has broken, not the server."""
        try:
            return (await client.get("/health", timeout=5.0)).is_success
        except httpx.HTTPError:
            return False

    def _read(self, answer: Any) -> Generated:
        try:
            (choice,) = answer["choices"]
            content = choice["logprobs"]["content"]
            spans = choice["weight_versions"] or []
            versions = tuple((_number(span["version"]), span["end"] - span["start"]) for span in spans)
            return Generated(choice["token_ids"], [token["logprob"] for token in content], versions)
        except (KeyError, TypeError, ValueError) as error:
            raise PolicyFailure(f"vLLM's answer cannot be read ({error!r}): {answer!r:.200}") from error

    def score(self, ids: Sequence[int]) -> list[float]:
        params = {**SCORING, "logprobs": 0}
        steps = self._surely(lambda: self._post("/inference/v1/generate", self._body(ids, params)))["prompt_logprobs"]
        return [step[str(token)]["logprob"] for step, token in zip(steps[1:], ids[1:], strict=True)]

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        if self.exchange is None:
            raise UserError(
                f"the server at {self.url} gets no weights from here; to train, start it as docs/policies.md says and "
                "give exchange=DIR, the folder that both can read"
            )
        with self._reviving:
            written = None
            if self.transfer == "file":
                written = self.exchange.write(weights, version)
            # Noted before it is tried: a server that dies meanwhile is followed by one with these weights.
            self._loaded = _Loaded(version, weights=written)
            if self.transfer == "file":
                self._bring(self._loaded)
            else:
                self._send(weights, version)
            self._loaded = _Loaded(version, weights=written, fingerprint=self.fingerprint())

    def load_adapter(self, folder: str, version: int) -> None:
        with self._reviving:
            self._loaded = _Loaded(version, adapter=folder)
            self._bring(self._loaded)

    def _bring(self, loaded: _Loaded) -> None:
        """Brings the server to `loaded`, or another one if it dies meanwhile."""
        try:
            if self._needs_revival():
                return self._revive()
            self._load(loaded)
        except PolicyFailure:
            if not self._needs_revival():
                raise
            self._revive()

    def _surely(self, ask: Callable[[], Any]) -> Any:
        """Asks, of another server where this one is gone."""
        try:
            if self._needs_revival():
                self._revive()
            return ask()
        except PolicyFailure:
            if not self._needs_revival():
                raise
            self._revive()
            return ask()

    def _load(self, loaded: _Loaded) -> None:
        """Brings the server to `loaded`."""
        # Requests under way wait: between the first step and the last there is no model to run.
        self._post("/pause?mode=keep")
        if loaded.weights is not None:
            assert self.exchange is not None
            file, names = loaded.weights
            self._post("/init_weight_transfer_engine", {"init_info": {"folder": str(self.exchange.folder)}})
            self._post("/start_weight_update")
            self._post("/update_weights", {"update_info": {"file": file, "names": names}})
            self._post("/finish_weight_update", {"weight_version": str(loaded.version)})
            self.model = self.base
        elif loaded.adapter is not None:
            body = {"lora_name": ADAPTER_NAME, "lora_path": loaded.adapter, "load_inplace": True}
            self._post("/v1/load_lora_adapter", body)
            self._post("/update_weight_version", {"new_version": str(loaded.version)})
            self.model = ADAPTER_NAME
        self._go_on()

    def _go_on(self) -> None:
        # Keys and values of the old weights are good for nothing; requests under way read their context again.
        self._post("/reset_prefix_cache?reset_running_requests=true")
        self._post("/resume")

    def _send(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """From GPU to GPU."""
        from agentrl.models.load import distinct
        from policies.vllm.gpu import Sender

        if self._sender is None:
            workers = self._get("/get_world_size")["world_size"]
            kind: Any = self.transfer
            self._sender = Sender(kind, self._post, workers, distinct(weights))
        self._post("/pause?mode=keep")
        self._sender.send(distinct(weights), version)
        self._go_on()

    def fingerprint(self) -> str:
        found = set(self._surely(lambda: self._post("/collective_rpc", {"method": "agentrl_fingerprint"}))["results"])
        if len(found) != 1:
            raise AgentRLError(f"vLLM's workers hold different weights: {', '.join(sorted(found))}")
        return str(found.pop())

    def close(self) -> None:
        self._closed = True
        if self._sender is not None:
            self._sender.close()
        self._client.close()
        if self.server is not None:
            self.server.stop()
        if self.exchange is not None:
            self.exchange.close()

    def _needs_revival(self) -> bool:
        return self.server is not None and (bool(self._bad) or not self.server.alive)

    def _revive(self) -> None:
        """Starts another server in the place of one that is gone, with the newest weights; one caller does it for all.

        Raises:
            PolicyFailure: no more servers may be started, or the new one cannot be brought to where the old one was.
        """
        with self._reviving:
            if self._closed:
                raise PolicyFailure("the vLLM server was closed")
            if not self._needs_revival():
                return
            assert self.server is not None
            assert self._start is not None
            why = self._bad or f"ended; {self.server.describe_end()}"
            self.server.kill()
            if self.restarts_left < 1:
                raise PolicyFailure(f"the vLLM server {why} (it was started again {self.restarts} times)")
            self.restarts_left -= 1
            self.restarts += 1
            log.warning("the vLLM server %s; starting another (%d left)", why, self.restarts_left)
            self._sender = None
            try:
                self.server, self._bad = self._start(), ""
                self._client.close()
                self._client = self._connect()
                self._greet()
                self._catch_up()
            except AgentRLError as error:
                self._bad = self._bad or f"could not be replaced: {error}"
                raise PolicyFailure(str(error)) from error

    def _catch_up(self) -> None:
        loaded = self._loaded
        if self.transfer != "file" and loaded.version and loaded.adapter is None:
            raise AgentRLError(f"weights sent by transfer={self.transfer} cannot be sent again; resume the run")
        if loaded.weights is None and loaded.adapter is None:
            return
        self._load(loaded)
        if loaded.fingerprint and (found := self.fingerprint()) != loaded.fingerprint:
            raise AgentRLError(f"the new vLLM server holds weights {found}, the old one held {loaded.fingerprint}")
        self.after_restart()

    def _gone(self, server: ServerProcess | None, what: str) -> PolicyFailure:
        """Notes that a server of ours is not to be used any more; returns what to raise."""
        if server is not None and server is self.server and not self._closed:
            self._bad = self._bad or f"{what}; {server.describe_end()}"
            # Those that wait for it too need not wait for their own deadlines.
            threading.Thread(target=server.kill, daemon=True).start()
        return PolicyFailure(f"the vLLM server {what}")

    def _client_here(self) -> httpx.AsyncClient:
        """The connections of this event loop and this server."""
        loop, kept = asyncio.get_running_loop(), self._async
        if kept is not None and kept[:2] == (loop, self.server):
            return kept[2]
        if self.server is not None:
            transport = httpx.AsyncHTTPTransport(uds=str(self.server.socket), limits=_NONE_KEPT)
            client = httpx.AsyncClient(transport=transport, base_url="http://vllm")
        else:
            client = httpx.AsyncClient(base_url=self._client.base_url, limits=_NONE_KEPT)
        self._async = (loop, self.server, client)
        return client

    async def aclose(self) -> None:
        """Closes this loop's connections."""
        if self._async is not None and self._async[0] is asyncio.get_running_loop():
            await self._async[2].aclose()
        self._async = None

    def _post(self, path: str, body: Any = None) -> Any:
        return self._ask("POST", path, body)

    def _get(self, path: str) -> Any:
        return self._ask("GET", path, None)

    def _ask(self, method: str, path: str, body: Any) -> Any:
        server = self.server
        try:
            answer = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._gone(server, f"broke off at {path} ({type(error).__name__}: {error})") from error
        return self._checked(path, answer, server)

    def _checked(self, path: str, answer: httpx.Response, server: ServerProcess | None) -> Any:
        """Returns the JSON of an answer, None where there is none.

        Raises:
            UserError: what the server refuses.
            PolicyFailure: what went wrong inside it.
        """
        if answer.is_success:
            if not answer.headers.get("content-type", "").startswith("application/json"):
                return None
            return answer.json()
        said = answer.text.strip()[:400]
        if answer.status_code >= 500:
            raise self._gone(server, f"failed at {path} (HTTP {answer.status_code}: {said})")
        if answer.status_code == 404 and self.url is not None:
            raise UserError(
                f"the vLLM server at {self.url} has no {path}: start it with --enable-scale-out and, for new weights, "
                "VLLM_SERVER_DEV_MODE=1 and the flags in docs/policies.md"
            )
        raise UserError(f"the vLLM server refuses {path} (HTTP {answer.status_code}): {said}")


def _number(version: str) -> int:
    return int(version) if version.lstrip("-").isdigit() else 0
