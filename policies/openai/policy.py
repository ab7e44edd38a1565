"""`OpenAIPolicy`: a model behind an OpenAI-compatible URL acts."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from agentrl.errors import UserError
from agentrl.http import Usage
from agentrl.images import png_bytes
from agentrl.policy import Policy, PolicyAction, PolicyRequest, Sampling
from agentrl.types import Content, ImagePart, Message, text_of
from policies.openai.server import LoopThread, Server

_STOP = "\nUser:"
"""What ends an answer on the completions endpoint without a tokenizer: the reader's next turn."""


class OpenAIPolicy(Policy):
    """A model behind a URL that speaks OpenAI's protocol acts: for evaluation, collecting, partners and judges.

    By default text goes in and text comes out, so that the episodes hold no tokens and cannot be trained on. With
    `tokenizer` context ids go in and sampled ids with their log-probs come out (vLLM's ``/v1/completions`` does this),
    never text encoded again; a server that does not return them is refused.

    Args:
        url: base address, e.g. ``http://localhost:8000/v1``.
        model: name of the model there (``--model``); by default the only one served.
        endpoint: ``chat``, or ``completions`` for models without a chat form: the conversation is then written out as
            "User: ... Assistant:". With `tokenizer` it is always ``completions``.
        tokenizer: model directory or hub name of the served model's tokenizer: token ids instead of text.
        processed_logprobs: the server returns log-probs after temperature, top-p and top-k (vLLM:
            ``--logprobs-mode processed_logprobs``). Without it, sampling with these is refused where ids are wanted.
        key_env: environment variable with the key; unset: none is sent. It is read for each call and never stored.
        concurrency: requests in flight at once.
        timeout_s: seconds of silence after which an attempt is given up.
        deadline_s: seconds for one action, with all attempts and pauses.
        retries: further attempts after one that failed.
        backoff_s: longest first pause, in seconds; doubled each time. A longer ``Retry-After`` is respected.
        usd_per_million: prices of a million prompt and completion tokens, for `usage`.
        seeded: send each action's seed. Some servers do not know the field.
        limit_field: name of the token limit's field; newer OpenAI models want ``max_completion_tokens``.
        extra: further fields of each request, e.g. ``{"reasoning_effort": "low"}``.

    Raises:
        UserError: an option is wrong, or a model to be trained is given.
    """

    batched = False

    def __init__(
        self,
        url: str = "http://localhost:8000/v1",
        model: str | None = None,
        *,
        endpoint: Literal["chat", "completions"] = "chat",
        tokenizer: Any = None,
        processed_logprobs: bool = False,
        key_env: str = "OPENAI_API_KEY",
        concurrency: int = 32,
        timeout_s: float = 120.0,
        deadline_s: float = 300.0,
        retries: int = 5,
        backoff_s: float = 0.5,
        usd_per_million: Sequence[float] = (0.0, 0.0),
        seeded: bool = True,
        limit_field: str = "max_tokens",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if model is not None and not isinstance(model, str):
            raise UserError(
                "the openai policy cannot be trained: its protocol has no way to send weights; take "
                "model.engine=transformers. Episodes collected with --policy-arg tokenizer=DIR, from a server that "
                "returns token ids and log-probs, can be learned from afterwards"
            )
        if endpoint not in ("chat", "completions"):
            raise UserError(f"endpoint={endpoint!r}: chat or completions")
        if len(usd_per_million) != 2 or min(usd_per_million) < 0:
            raise UserError(f"usd_per_million={usd_per_million!r}: two prices, of prompt and of completion tokens")
        self.server = Server(
            url,
            key_env=key_env,
            concurrency=concurrency,
            timeout_s=timeout_s,
            deadline_s=deadline_s,
            retries=retries,
            backoff_s=backoff_s,
        )
        self.model, self.endpoint = model, endpoint
        self.name = model or "openai"
        self.processed_logprobs, self.seeded, self.limit_field = processed_logprobs, seeded, limit_field
        self.usd_per_million = (float(usd_per_million[0]), float(usd_per_million[1]))
        self.extra = dict(extra or {})
        if tokenizer is not None:
            from agentrl.models.chat import ChatCodec
            from agentrl.models.load import load_tokenizer

            self.endpoint = "completions"
            self.chat = ChatCodec(load_tokenizer(tokenizer))
        self._thread = LoopThread("agentrl-openai")

    @property
    def usage(self) -> Usage:
        """Calls, attempts, tokens, seconds and cost so far."""
        return self.server.usage

    async def act(self, requests: Sequence[PolicyRequest]) -> list[PolicyAction]:
        """Returns one action per request; all are sent at once, up to `concurrency`.

        Raises:
            PolicyFailure: no usable answer after all attempts.
            DeadlineExceeded: none within `deadline_s`.
            UserError: wrong URL, key or model name, or what is asked for is not to be had from this server.
        """
        return await asyncio.wrap_future(self._thread.submit(self._all(requests)))

    async def aclose(self) -> None:
        await asyncio.wrap_future(self._thread.submit(self.server.aclose()))
        self._thread.stop()

    async def _all(self, requests: Sequence[PolicyRequest]) -> list[PolicyAction]:
        if self.model is None:
            self.model = self.name = await self._only_model()
        tasks = [asyncio.ensure_future(self._one(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _only_model(self) -> str:
        names = await self.server.models()
        if names is None:
            raise UserError(
                f"{self.server.url}/models lists no models; check the address (most end in /v1), or name the model "
                "(--model NAME)"
            )
        if len(names) != 1:
            some = ", ".join(sorted(names)[:10]) or "none"
            raise UserError(f"{self.server.url} serves {len(names)} models; name one (--model NAME), e.g. {some}")
        return names[0]

    async def _one(self, request: PolicyRequest) -> PolicyAction:
        body: dict[str, Any] = {
            "model": self.model,
            self.limit_field: request.sampling.max_new_tokens,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,  # also where it is off: servers have defaults of their own
        }
        if self.seeded:
            body["seed"] = request.seed % 2**31
        if hasattr(self, "chat"):
            return await self._sample_ids(request, body)
        if request.sampling.top_k:
            body["top_k"] = request.sampling.top_k
        if self.endpoint == "chat":
            body["messages"] = [_message(message) for message in request.messages]
            return await self.server.post("/chat/completions", body | self.extra, self._read_text)
        body |= {"prompt": _transcript(request.messages), "stop": [_STOP]}
        return await self.server.post("/completions", body | self.extra, self._read_text)

    # Errors of reading quote all of what was read: `Server` masks the key and cuts afterwards.

    def _read_text(self, answer: Any) -> PolicyAction:
        choice = self._choice(answer)
        finish: Literal["stop", "length"] = "length" if choice.get("finish_reason") == "length" else "stop"
        if self.endpoint == "completions":
            text = choice.get("text")
        else:
            message = choice.get("message")
            if not isinstance(message, Mapping):
                raise ValueError(f"a choice without message: {choice!r}")
            text = message.get("content")
            if text is None:  # thinking took all the tokens, or the model refused
                text = message.get("refusal") or ("" if finish == "length" else None)
        if not isinstance(text, str):
            raise ValueError(f"the completion holds {type(text).__name__}, not text")
        return PolicyAction(text=text.strip() if self.endpoint == "completions" else text, finish=finish)

    def _choice(self, answer: Any) -> Mapping[str, Any]:
        """Counts what the answer cost and returns its first choice."""
        if not isinstance(answer, Mapping):
            raise ValueError(f"{type(answer).__name__} {answer!r} instead of an object")
        try:
            self.usage.count(answer.get("usage"), self.usd_per_million)
        except ValueError as error:
            raise ValueError(f"usage {answer['usage']!r} cannot be counted") from error
        match answer.get("choices"):
            case [Mapping() as choice, *_]:
                return choice
        raise ValueError(f"no choices in {answer!r}")

    async def _sample_ids(self, request: PolicyRequest, body: dict[str, Any]) -> PolicyAction:
        """Token in, token out."""
        if request.context_ids is None:
            raise UserError(
                "the openai policy has a tokenizer and takes token contexts; where text is given (as a partner or a "
                "judge), leave tokenizer out"
            )
        sampling = request.sampling
        _check_logprobs(sampling, self.processed_logprobs)
        body |= {
            "prompt": request.context_ids,
            "logprobs": 1,
            "return_token_ids": True,
            "stop_token_ids": sorted(self.chat.stop_ids),
            # What is left out would come from the model's generation_config.json.
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        ids, logprobs = await self.server.post("/completions", body | self.extra, lambda a: self._read_ids(a, request))
        if sampling.temperature == 0:  # greedy: the one token had to come
            logprobs = [0.0] * len(ids)
        stopped = bool(ids) and ids[-1] in self.chat.stop_ids
        return PolicyAction(self.chat.decode(ids), ids, logprobs, finish="stop" if stopped else "length")

    def _read_ids(self, answer: Any, request: PolicyRequest) -> tuple[list[int], list[float]]:
        choice = self._choice(answer)
        ids = choice.get("token_ids")
        logprobs = choice.get("logprobs")
        logprobs = logprobs.get("token_logprobs") if isinstance(logprobs, Mapping) else None
        found = {"token ids (choices[0].token_ids)": ids, "log-probs (choices[0].logprobs.token_logprobs)": logprobs}
        if missing := [name for name, value in found.items() if not isinstance(value, list)]:
            raise UserError(
                f"the server at {self.server.url} returns no {' and no '.join(missing)}: its episodes would not be fit "
                "for training; vLLM's /v1/completions returns both, and without tokenizer= text alone is asked for"
            )
        assert isinstance(ids, list) and isinstance(logprobs, list)  # noqa: PT018
        if len(ids) != len(logprobs) or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"{len(ids)} token ids with {len(logprobs)} log-probs")
        if not all(isinstance(logprob, float | int) for logprob in logprobs):
            raise ValueError(f"log-probs that are no numbers: {logprobs!r}")
        seen = choice.get("prompt_token_ids", request.context_ids)
        if seen is not None and seen != request.context_ids:
            raise UserError(
                f"the server at {self.server.url} read other ids than were sent ({len(seen)} for "
                f"{len(request.context_ids or ())}); it must take `prompt` as a list of ids, without adding any"
            )
        return ids, [float(logprob) for logprob in logprobs]


def _check_logprobs(sampling: Sampling, processed: bool) -> None:
    """Refuses log-probs of another distribution than the one that was sampled from: every ratio would be biased."""
    plain = sampling.temperature in (0, 1) and sampling.top_p == 1 and sampling.top_k == 0
    if not plain and not processed:
        raise UserError(
            f"temperature={sampling.temperature}, top_p={sampling.top_p}, top_k={sampling.top_k}: servers return the "
            "log-probs before these, which are not those that the tokens were drawn with; sample with temperature 1 "
            "and without top_p and top_k, or start the server so that it returns them afterwards (vLLM: "
            "--logprobs-mode processed_logprobs) and say so with processed_logprobs=true"
        )


def _message(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": _content(message.content)}


def _content(content: Content) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not any(isinstance(part, ImagePart) for part in content):
        return text_of(content)
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, ImagePart):
            url = "data:image/png;base64," + base64.b64encode(png_bytes(part)).decode("ascii")
            parts.append({"type": "image_url", "image_url": {"url": url}})
        else:
            parts.append({"type": "text", "text": part.text})
    return parts


def _transcript(messages: Sequence[Message]) -> str:
    """A conversation for a model without chat form."""
    names = {"user": "User: ", "assistant": "Assistant: ", "tool": "User: ", "system": ""}
    said = [names[message.role] + text_of(message.content) for message in messages]
    return "\n\n".join([*said, "Assistant:"])
