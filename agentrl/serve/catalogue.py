"""Which environments a server offers, with which arguments, and what clients may ask of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

from agentrl.envs import environment_ids
from agentrl.envs.wrappers import WRAPPERS
from agentrl.errors import UserError, unknown_name
from agentrl.remote.address import name_of
from agentrl.remote.protocol import Code, CreateRequest, EnvSpec
from agentrl.rollout.executors import Host, LocalHost
from agentrl.rollout.process import ProcessHost
from agentrl.rollout.values import checked_observation
from agentrl.serve.answers import Refused
from agentrl.serve.settings import Settings

log = logging.getLogger("agentrl.serve")

RESERVED = frozenset({"env_id", "id", "max_turns", "max_episode_steps", "wrappers", "render_mode"})
"""Names that `make` or Gymnasium take for themselves, or that mean nothing over a wire."""


class Recipe(NamedTuple):
    """What an environment is made from; equal recipes share environments."""

    env: str
    kwargs: str
    """JSON of all keyword arguments, the server's included."""
    max_turns: int | None
    wrappers: str
    """JSON."""


class Entry:
    """One served environment."""

    def __init__(self, env_id: str, kwargs: Mapping[str, Any], *, process: bool) -> None:
        self.env_id, self.kwargs, self._process = env_id, dict(kwargs), process
        facts = self._describe()
        self.local_arguments: frozenset[str] | None = facts.pop("local_arguments")
        defaults = {**facts.pop("defaults"), **self.kwargs}
        shown = {name: value for name, value in defaults.items() if name not in (self.local_arguments or ())}
        summary = environment_ids().get(name_of(env_id), "")
        self.spec = EnvSpec(id=env_id, summary=summary, kwargs=shown, **facts)
        hidden = [value for name, value in self.kwargs.items() if name not in shown]
        self._secrets = sorted({text for text in _texts(hidden) if len(text) > 2}, key=len, reverse=True)

    def without_secrets(self, text: str) -> str:
        """Returns `text` without the values of arguments that clients may not know."""
        for secret in self._secrets:
            text = text.replace(secret, "...")
        return text

    def host(self, max_turns: int | None, kwargs: dict[str, Any], wrappers: list[dict[str, Any]]) -> Host:
        """Returns a host for a new environment."""
        kind = ProcessHost if self._process and not self.spec.fast else LocalHost
        return kind(self.env_id, max_turns, kwargs, wrappers)

    def _describe(self) -> dict[str, Any]:
        """Makes the environment once, with the server's arguments, and asks it what it is."""
        host = (ProcessHost if self._process else LocalHost)(self.env_id, None, self.kwargs)
        try:
            host.make()
            checked_observation(self.env_id, host.reset(0, {})[0])
            return host.describe()
        finally:
            host.close()


def _texts(value: Any) -> Iterator[str]:
    """Yields the texts in `value`, as they are and as they are printed."""
    if isinstance(value, str):
        yield from (value, repr(value)[1:-1])
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


class Catalogue:
    """The served environments by id.

    Raises:
        UserError: an environment that does not exist, refuses its arguments, or is named twice.
    """

    def __init__(self, settings: Settings) -> None:
        self.entries: dict[str, Entry] = {}
        self._fixed = settings.fixed_arguments
        for text in settings.envs:
            env_id, kwargs = parse_env(text)
            if env_id in self.entries:
                raise UserError(f"environment {env_id!r} is named twice; a server has each once")
            try:
                self.entries[env_id] = Entry(env_id, kwargs, process=settings.executor == "process")
            except UserError as error:
                if env_id in str(error):
                    raise
                raise UserError(f"environment {env_id!r}: {error}") from error
            except Exception as error:
                raise UserError(f"environment {env_id!r} cannot be served: {type(error).__name__}: {error}") from error

    def entry(self, env_id: str) -> Entry:
        """Returns the environment called `env_id`.

        Raises:
            Refused: it is not served here.
        """
        found = self.entries.get(env_id)
        if found is None:
            message = unknown_name("environment", env_id[:100], self.entries, "served here: GET /v1/envs")
            raise Refused(Code.UNKNOWN_ENV, message, field="env")
        return found

    def recipe(self, entry: Entry, request: CreateRequest) -> tuple[Recipe, bool]:
        """Returns what to make for `request`, and whether the server's owner alone chose its arguments.

        Raises:
            Refused: arguments or wrappers that a client may not set.
        """
        for name, value in request.kwargs.items():
            self._check_argument(entry, name, value)
        if self._fixed and request.wrappers:
            raise Refused(Code.FORBIDDEN, "this server fixes all arguments: no wrappers", field="wrappers")
        for number, wrapper in enumerate(request.wrappers):
            _check_wrapper(number, wrapper)
        kwargs = json.dumps({**entry.kwargs, **request.kwargs}, sort_keys=True)
        recipe = Recipe(entry.env_id, kwargs, request.max_turns, json.dumps(request.wrappers, sort_keys=True))
        return recipe, not (request.kwargs or request.wrappers or request.options)

    def _check_argument(self, entry: Entry, name: str, value: Any) -> None:
        where, shown = f"kwargs.{name}"[:200], ascii(name[:60])
        if name in RESERVED:
            raise Refused(Code.INVALID, f"{shown} is no argument of an environment over HTTP", field=where)
        if self._fixed:
            raise Refused(Code.FORBIDDEN, f"argument {shown}: this server fixes all arguments", field=where)
        if entry.local_arguments is None:
            raise Refused(
                Code.FORBIDDEN,
                f"argument {shown}: {entry.env_id!r} does not say which arguments are safe to take from others "
                "(TextEnv.local_arguments); the server's owner sets them",
                field=where,
            )
        # A number that is the owner's own changes nothing: a configuration may say what it counts on.
        if name in entry.local_arguments and not (isinstance(value, int | float) and entry.kwargs.get(name) == value):
            raise Refused(
                Code.FORBIDDEN,
                f"argument {shown} of {entry.env_id!r} names files, commands or limits of the server; its owner sets "
                f"it: agentrl serve '{entry.env_id}?{name}=...'",
                field=where,
            )


def _check_wrapper(number: int, wrapper: dict[str, Any]) -> None:
    name, where = wrapper.get("name"), f"wrappers.{number}"
    if isinstance(name, str) and ":" in name:
        raise Refused(
            Code.FORBIDDEN,
            f"wrapper {name!a:.80} would run code of the client's choice; by name: {', '.join(sorted(WRAPPERS))}",
            field=f"{where}.name",
        )
    if not isinstance(name, str) or name not in WRAPPERS:
        message = unknown_name("wrapper", ascii(name).strip("'")[:60], WRAPPERS)
        raise Refused(Code.INVALID, message, field=f"{where}.name")
    if taken := sorted(WRAPPERS[name].local_arguments & wrapper.keys()):
        raise Refused(
            Code.FORBIDDEN, f"wrapper {name!r}: {taken[0]} names a file of the server", field=f"{where}.{taken[0]}"
        )


def parse_env(text: str) -> tuple[str, dict[str, Any]]:
    """Returns id and arguments of ``WebShop-v0?products=2000&kinds=3``; values are YAML.

    Raises:
        UserError: no id, or an argument without a value.
    """
    from agentrl.config.load import parse_assignments

    env_id, _, query = text.partition("?")
    if not env_id:
        raise UserError(f"{text!r} names no environment; write for instance 'WebShop-v0?products=2000'")
    parts = [unquote(part) for part in query.split("&") if part]
    kwargs = parse_assignments(parts, f"'{env_id}?size=6'")
    if reserved := sorted(kwargs.keys() & RESERVED):
        raise UserError(f"{text!r}: {reserved[0]} is no argument of an environment; clients choose it themselves")
    return env_id, kwargs
