"""The policy contract: requests in, actions out.

A policy answers a *batch* of requests, one per episode that waits for it. Scripted policies return text alone. Model
policies also return the sampled ids, the log-prob of each under the distribution truly sampled from, and the version of
their weights; and they take new weights. Policies are plugins: they are found through the entry-point group
``agentrl.policies`` (`load_policy`), and the framework imports none of them by name.
"""

from __future__ import annotations

import abc
import asyncio
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, cast

from agentrl.errors import AgentRLError, PolicyFailure, UnknownNameError, UserError
from agentrl.types import Content, ImageSpan, Message

if TYPE_CHECKING:
    import torch

    from agentrl.models.chat import ChatCodec


@dataclass(frozen=True, slots=True)
class Sampling:
    """How actions are drawn. `temperature=0` is greedy. `top_k=0` and `top_p=1` switch truncation off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 16
    """Token limit of one turn."""


@dataclass(slots=True)  # not frozen, which would take five times as long to make: one is made for every turn
class PolicyRequest:
    """One episode's wish for an action. To be read: `dataclasses.replace` makes another."""

    episode: str
    """Key of the episode: engines keep its KV cache under this name until `Policy.release`."""
    turn: int
    observation: Content
    messages: Sequence[Message]
    """The conversation so far, last observation included (scripted and text-in engines)."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """The environment's last info. Scripted policies may look at it; model policies must not."""
    context_ids: list[int] | None = None
    """Model policies: every id of the current row, to be continued. Token in, token out."""
    context_images: Sequence[ImageSpan] = ()
    """Pictures in `context_ids`, in order."""
    seed: int = 0
    """Seed of this action's randomness. Same seed, weights and context give the same action."""
    sampling: Sampling = Sampling()


@dataclass(frozen=True, slots=True)
class PolicyAction:
    """One answer. `ids`, `logprobs` and `version` are None for policies without tokens."""

    text: str
    ids: list[int] | None = None
    logprobs: list[float] | None = None
    version: int | None = None
    """Version of the weights; the oldest where it changed in the middle."""
    versions: Sequence[tuple[int, int]] = ()
    """Where it changed in the middle: (version, number of ids), in order."""
    finish: Literal["stop", "length"] = "stop"
    """`length`: the turn's token limit cut the action off."""


class Policy(abc.ABC):
    """Answers requests. Subclasses: scripted agents, model engines, clients of remote servers."""

    name: str = "policy"
    batched: bool = True
    """True: one `act` call at a time with all waiting requests. False: each request is its own concurrent call."""
    interactive: bool = False
    """True: a person at this terminal acts. Nothing else draws there, no deadline hurries them, and an episode that
    they leave is not played again."""

    @abc.abstractmethod
    async def act(self, requests: Sequence[PolicyRequest]) -> list[PolicyAction]:
        """Returns one action per request, in order.

        Raises:
            PolicyFailure: the engine could not answer (the episodes stop with `StopReason.POLICY_ERROR`).
        """

    def release(self, episode: str) -> None:
        """Frees what is kept for `episode` (KV cache). Called once when the episode ends, in whatever way.

        It may come while `act` is still running, after a deadline even for an episode of that very call.
        """

    async def aclose(self) -> None:
        """Ends the policy: servers stopped, memory freed."""


class ModelPolicy(Policy):
    """A policy with weights and a tokenizer."""

    chat: ChatCodec
    """How a conversation becomes token ids."""
    version: int = 0
    """Version of the weights now in the engine."""

    @abc.abstractmethod
    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Replaces the weights; every action after this call carries `version`."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A short hash of the weights in the engine, to compare with the trainer's after each sync."""

    def rest(self) -> None:
        """Gives back memory that only sampling needs: the trainer calls it between its episodes and its updates."""

    def canary(self, ids: Sequence[int]) -> list[float] | None:
        """Log-probs (len(ids) - 1,) in nats that the engine itself computes for ``ids[1:]`` at temperature 1.

        The trainer compares them with its own after each sync: weights may have arrived and still not be those that the
        engine computes with. None: the engine runs the trainer's own model.
        """
        return None


class FunctionPolicy(Policy):
    """A plain function as a policy. Where the environment is inline too, the collector calls it without a detour.

    Args:
        function: ``request -> text``, or ``observation -> text``.
        name: shown in reports and trajectories; by default the function's own.
        reads: what `function` takes.
    """

    batched = False  # where the function fails for one episode, it has not failed the others

    def __init__(
        self,
        function: Callable[[Any], Any],
        name: str | None = None,
        *,
        reads: Literal["request", "observation"] = "request",
    ) -> None:
        self.function = function
        self.name = str(name or getattr(function, "__name__", type(function).__name__))
        self.reads = reads

    async def act(self, requests: Sequence[PolicyRequest]) -> list[PolicyAction]:
        """Returns what the function answers to each request.

        Raises:
            PolicyFailure: it raised.
        """
        with _as_failures():
            return [PolicyAction(text=self.function(self._read(request))) for request in requests]

    def _read(self, request: PolicyRequest) -> Any:
        return request if self.reads == "request" else request.observation


class AsyncFunctionPolicy(FunctionPolicy):
    """An async function as a policy: episodes wait for it side by side."""

    async def act(self, requests: Sequence[PolicyRequest]) -> list[PolicyAction]:
        with _as_failures():
            return list(await asyncio.gather(*map(self._one, requests)))

    async def _one(self, request: PolicyRequest) -> PolicyAction:
        return PolicyAction(text=await self.function(self._read(request)))


@contextmanager
def _as_failures() -> Iterator[None]:
    """What a function raises is a failure of the policy; errors of this package say more, and stay what they are."""
    try:
        yield
    except AgentRLError:
        raise
    except Exception as error:
        raise PolicyFailure(f"{type(error).__name__}: {error}") from error


def as_policy(policy: Policy | Callable[..., Any], name: str | None = None) -> Policy:
    """Returns `policy`, or the policy that a function is, plain or async.

    Args:
        policy: a policy, or a function from the observation to the action's text; from the whole `PolicyRequest` where
            its first parameter is called ``request`` or annotated so.
        name: of the function in reports and trajectories; by default its own.

    Raises:
        UserError: it is neither, or takes no argument.
    """
    if isinstance(policy, Policy):
        return policy
    if not callable(policy):
        raise UserError(f"policy is a Policy or a function observation -> action, not {type(policy).__name__}")
    waits = any(map(inspect.iscoroutinefunction, (policy, type(policy).__call__)))
    reads: Literal["request", "observation"] = "request" if _takes_request(policy) else "observation"
    return (AsyncFunctionPolicy if waits else FunctionPolicy)(policy, name, reads=reads)


def _takes_request(function: Callable[..., Any]) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of code that is not Python
        return False
    if not parameters:
        raise UserError(f"{function!r} takes no argument; a policy needs one, the observation or the request")
    first = parameters[0]
    return first.name == "request" or first.annotation in (PolicyRequest, "PolicyRequest")


PolicyFactory = Callable[..., Policy]
_REGISTERED: dict[str, PolicyFactory] = {}


def register_policy(name: str, factory: PolicyFactory) -> None:
    """Registers `factory` (keyword options -> Policy) under `name`, beside those found through entry points."""
    _REGISTERED[name] = factory


@cache
def _entry_points() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group="agentrl.policies")}


def policy_names() -> list[str]:
    """Names that `load_policy` knows, sorted."""
    return sorted({*_REGISTERED, *_entry_points()})


def load_policy(name: str, /, **options: Any) -> Policy:
    """Makes the policy registered as `name` with `options`; ``module:function`` is ``scripted`` with that function.

    Raises:
        UnknownNameError: no policy has this name; the message offers the nearest.
        UserError: no such module or function.
    """
    if name in _REGISTERED:
        return _REGISTERED[name](**options)
    points = _entry_points()
    if ":" in name and name not in points:
        return load_policy("scripted", function=name, **options)
    if name not in points:
        raise UnknownNameError("policy", name, policy_names(), "agentrl policies lists all")
    factory: PolicyFactory = points[name].load()
    return factory(**options)


def load_function(name: str) -> Callable[..., Any]:
    """Imports what ``module:function`` names, from the current folder too.

    Raises:
        UserError: no such module or function, a module that fails, or nothing to call.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"{name!r} is not of the form 'module:function'")
    found = _imported(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = ", ".join(key for key in dir(found) if key[:1] != "_" and callable(getattr(found, key, None)))
            raise UserError(f"{module_name!r} has no {attribute!r}; it has: {known or 'nothing to call'}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{name!r} is {type(found).__name__}, not something to call")
    return cast("Callable[..., Any]", found)


def _imported(name: str) -> Any:
    here = os.getcwd()
    added = here not in sys.path  # a console script does not look there; last, so that it hides nothing installed
    if added:
        sys.path.append(here)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:
        if added:
            sys.path.remove(here)
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            hint = "; name the file without .py" if name.endswith(".py") else ""
            raise UserError(f"no module {error.name!r}, neither here in {here} nor on PYTHONPATH{hint}") from None
        raise UserError(f"module {name!r} cannot be imported: {type(error).__name__}: {error}") from error
