"""`RemoteEnv`: a served environment as a Gymnasium environment, for threads and for event loops.

    env = agentrl.make("http://localhost:8000/Sokoban-v0", size=6)
    observation, info = env.reset(seed=0)

Wrappers and the turn limit are applied by the server. What came over the wire is what a local environment would have
put into a trajectory: same text, same pictures, same numbers.
"""

from __future__ import annotations

import os
import secrets
import weakref
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec as GymSpec
from pydantic import ValidationError

from agentrl.envs.content import AnyContent
from agentrl.envs.core import AnyText
from agentrl.errors import UserError
from agentrl.remote.address import parse_address
from agentrl.remote.client import (
    CREATE,
    DESCRIBE,
    PATIENCE_S,
    Client,
    Settings,
    adrive,
    anywhere,
    astep,
    drive,
    step,
)
from agentrl.remote.codec import content, created, encode, stepped
from agentrl.remote.errors import Finished, NotAServer, RemoteError, TooLarge, Unreachable
from agentrl.remote.lanes import Lanes
from agentrl.remote.protocol import MAX_ACTION, VERSION, EnvSpec
from agentrl.remote.servers import server_at
from agentrl.types import Content

TOKEN_ENV = "AGENTRL_TOKEN"
"""Environment variable with the server's token."""

Answer = tuple[Content, float, bool, bool, dict[str, Any]]


def settings_of(env_id: str, kwargs: Mapping[str, Any], token_env: str, retry_s: float, timeout_s: float) -> Settings:
    """Returns what all calls of an environment have in common; the arguments are those of `Fleet`.

    Raises:
        UserError: a token among the arguments, none where one is named, or times that make no sense.
    """
    if "token" in kwargs:
        raise UserError(
            f"environment {env_id!r}: a token given as an argument would be written into run files; put it into an "
            f"environment variable ({TOKEN_ENV}, or token_env=NAME for another)"
        )
    token = os.environ.get(token_env, "").strip() or _token_of_file(
        os.environ.get(f"{token_env}_FILE"), f"{token_env}_FILE"
    )
    if token is None and token_env != TOKEN_ENV:
        raise UserError(f"environment {env_id!r}: the environment variable {token_env!r} (token_env) is not set")
    if token is not None and not (token.isascii() and token.isprintable()):
        raise UserError(f"environment {env_id!r}: the token in {token_env} holds more than printable ASCII")
    if retry_s < 0 or timeout_s <= 0:
        raise UserError(f"environment {env_id!r}: retry_s={retry_s}, timeout_s={timeout_s}; seconds, timeout_s above 0")
    return Settings(retry_s=retry_s, timeout_s=timeout_s, token=token)


class Fleet:
    """One environment on its servers, with the arguments it is made with: what the episodes there have in common.

    Args:
        env_id: one or several URLs (`agentrl.remote.address`).
        max_turns: turn limit; None keeps the server's.
        wrappers: by registered name; the server applies them.
        token_env: environment variable with the token; where it is not set, the variable of that name with ``_FILE``
            behind it names a file that holds the token (as container secrets do).
        retry_s: seconds for which failures of servers are tried again.
        timeout_s: seconds in which a reset or step is answered.
        **kwargs: keyword arguments of the environment.

    Raises:
        UserError: no URL of an environment, or settings that make no sense.
    """

    def __init__(
        self,
        env_id: str,
        *,
        max_turns: int | None = None,
        wrappers: Sequence[Mapping[str, Any]] = (),
        token_env: str = TOKEN_ENV,
        retry_s: float = 30.0,
        timeout_s: float = 60.0,
        **kwargs: Any,
    ) -> None:
        self.env_id = env_id
        self.address = parse_address(env_id)
        self.servers = [server_at(url) for url in self.address.servers]
        self.max_turns, self.kwargs = max_turns, kwargs
        self.settings = settings_of(env_id, kwargs, token_env, retry_s, timeout_s)
        self.whole = False
        """Whether the steps of one tick of the event loop travel in one request, not in two halves."""
        self._request = {
            "env": self.address.env,
            "kwargs": kwargs,
            "max_turns": max_turns,
            "wrappers": [dict(wrapper) for wrapper in wrappers],
        }
        _check_json(env_id, "arguments", self._request)
        self._lanes: weakref.WeakKeyDictionary[AbstractEventLoop, Lanes] = weakref.WeakKeyDictionary()

    def request(self, seed: int, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """Returns a create request, with a key of its own.

        Raises:
            UserError: options that are no JSON.
        """
        if options:
            _check_json(self.env_id, "options", options)
        return {**self._request, "seed": seed, "options": dict(options or {}), "request": secrets.token_hex(16)}

    def episode(self) -> RemoteEnv:
        """Returns an environment that shares connections with the others of this fleet; nothing is sent yet."""
        return RemoteEnv(self)

    def lanes(self) -> Lanes:
        """Returns the connections of the running event loop."""
        loop = get_running_loop()
        if (lanes := self._lanes.get(loop)) is None:
            lanes = self._lanes[loop] = Lanes(self.settings, self.whole)
        return lanes

    async def settle(self) -> None:
        """Closes what is left over of the running loop's sessions, and its connections; later calls open new ones."""
        if (lanes := self._lanes.pop(get_running_loop(), None)) is not None:
            await lanes.aclose()

    @cached_property
    def description(self) -> EnvSpec:
        """What the environment is, as the first server that answers says.

        Raises:
            RemoteError: none does, or it refuses.
        """
        client = Client(self.settings)
        try:
            call = anywhere(DESCRIBE, self.servers, {"env": self.address.env}, self.settings)
            server, answer = drive(call, client)
            server.count(-1)
        finally:
            client.close()
        try:
            return EnvSpec.model_validate(answer)
        except ValidationError as error:
            theirs = answer.get("protocol") if isinstance(answer, dict) else None
            told = f"it speaks protocol {theirs}, this client {VERSION}" if theirs != VERSION else str(error)
            raise NotAServer(f"{server.url}: {self.address.env!r} is described in another way: {told}") from error


def _check_json(env_id: str, what: str, value: Any) -> None:
    try:
        encode(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"environment {env_id!r}: {what} travel as JSON: {error}") from error


def _token_of_file(path: str | None, variable: str) -> str | None:
    """Returns the first token in the file at `path`, which may be a server's own; None without a path.

    Raises:
        UserError: the file cannot be read, or holds none.
    """
    if not path:
        return None
    where = f"the token file {path!r} ({variable})"
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {where}: {error}") from None
    token = next((line for line in lines if line and not line.startswith("#")), None)
    if token is None:
        raise UserError(f"{where} holds no token: it is empty, or all comments")
    return token


class RemoteEnv(gym.Env[Content, str]):
    """One episode at a time on a server. `reset`, `step` and `close` block; `areset`, `astep`, `aclose` do not.

    `reset` begins a new session, at the server with the fewest of this process, and closes the last one. Arguments of
    the environment can be read as attributes, as those of a local one.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}
    fast = False

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._instructions: str | None = None
        self._server: Any = None
        self._session = ""
        self._step = 0
        self._over = True
        self._last: Content = ""
        self._client: Client | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Content, dict[str, Any]]:
        """Begins an episode.

        Raises:
            Refused: somebody must change something (a `UserError`).
            Failed, TooLate: no server could begin it.
        """
        super().reset(seed=seed)
        request = self.fleet.request(self._seed(seed), options)
        if self._client is None:
            self._client = Client(self.fleet.settings)
        self._end()
        return self._begun(*drive(anywhere(CREATE, self.fleet.servers, request, self.fleet.settings), self._client))

    def step(self, action: str) -> Answer:
        """Plays one action.

        Raises:
            Refused: the episode is over, or the action too long (a `UserError`).
            Failed, TooLate: the episode cannot go on.
        """
        item = self._next(action)
        assert self._client is not None
        answer = drive(step(self._server, self.fleet.servers, item, self.fleet.settings), self._client)
        return self._played(answer)

    def close(self) -> None:
        """Ends the session, and the connections of blocking calls."""
        self._end()
        if self._client is not None:
            self._client.close()
            self._client = None

    async def areset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Content, dict[str, Any]]:
        """As `reset`, on the event loop; calls of one tick travel together."""
        super().reset(seed=seed)
        request = self.fleet.request(self._seed(seed), options)
        self.leave()
        lanes = self.fleet.lanes()
        return self._begun(*await adrive(anywhere(CREATE, self.fleet.servers, request, self.fleet.settings), lanes))

    async def astep(self, action: str) -> Answer:
        """As `step`, on the event loop; calls of one tick travel together."""
        item = self._next(action)
        fleet = self.fleet
        return self._played(await astep(self._server, fleet.servers, item, fleet.settings, fleet.lanes()))

    def leave(self) -> None:
        """Has the session closed soon, together with others, by the running event loop."""
        if server := self._gone():
            self.fleet.lanes().of(server).close_session(self._session)

    async def aclose(self) -> None:
        """Ends the session, and the connections of all environments of this fleet on this event loop."""
        self.leave()
        await self.fleet.settle()

    def render(self) -> Any:
        """Returns the last observation."""
        return self._last

    @property
    def instructions(self) -> str:
        """System prompt: of this episode, before the first of the environment as the server makes it."""
        return self.fleet.description.instructions if self._instructions is None else self._instructions

    @property
    def provides(self) -> dict[str, dict[str, Any]]:
        """As `TextEnv.provides`."""
        return self.fleet.description.provides

    @property
    def single_task(self) -> bool:
        """As `TextEnv.single_task`."""
        return self.fleet.description.single_task

    @property
    def hard(self) -> bool:
        """As `TextEnv.hard`."""
        return self.fleet.description.hard

    @property
    def observation_space(self) -> AnyText:  # type: ignore[override]
        return AnyContent() if "AnyContent" in self.fleet.description.observation_space else AnyText()

    @property
    def action_space(self) -> AnyText:  # type: ignore[override]
        return self._action_space

    @cached_property
    def _action_space(self) -> AnyText:
        return AnyText()

    @property
    def spec(self) -> GymSpec:  # type: ignore[override]
        """The environment's id on the server and its turn limit."""
        wanted = self.fleet.max_turns
        limit = self.fleet.description.max_turns if wanted is None else wanted
        return GymSpec(id=self.fleet.address.env, max_episode_steps=limit)

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that the environment is made with, its defaults included."""
        return {**self.fleet.description.kwargs, **self.fleet.kwargs}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name in (arguments := self.arguments):
            return arguments[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"RemoteEnv({self.fleet.env_id!r})"

    __str__ = __repr__

    def _seed(self, seed: int | None) -> int:
        return int(self.np_random.integers(2**31)) if seed is None else int(seed)

    def _begun(self, server: Any, answer: Any) -> tuple[Content, dict[str, Any]]:
        try:
            made = created(server.url, answer)
        except RemoteError:
            server.count(-1)
            raise
        self._server, self._session = server, made.session
        self._step, self._over, self._instructions = 0, False, made.instructions
        self._last = content(server.url, made.observation)
        return self._last, made.info

    def _next(self, action: str) -> dict[str, Any]:
        if self._over:
            raise Finished(f"{self.fleet.env_id}: step after the episode ended; call reset() first")
        action = str(action)
        if len(action) > MAX_ACTION:  # in a batch it would make the whole request a bad one
            raise TooLarge(f"{self._server.url}: an action of {len(action):,} characters; at most {MAX_ACTION:,}")
        return {"session": self._session, "step": self._step + 1, "action": action}

    def _played(self, answer: Any) -> Answer:
        number, observation, reward, terminated, truncated, info = stepped(self._server.url, answer)
        if number != self._step + 1:
            raise Unreachable(f"{self._server.url}: answered step {self._step + 1} with step {number}")
        self._step += 1
        self._over = terminated or truncated
        self._last = content(self._server.url, observation)
        return self._last, reward, terminated, truncated, info

    def _gone(self) -> Any:
        """Forgets the session; returns its server, None where there is none."""
        server, self._server = self._server, None
        self._over = True
        if server is not None:
            server.count(-1)
        return server

    def _end(self) -> None:
        """Closes the session; the server reaps one that cannot be closed."""
        session = self._session
        if (server := self._gone()) is not None and self._client is not None:
            for _ in range(3):
                try:
                    self._client.request(server, "DELETE", f"/v1/sessions/{session}", None, PATIENCE_S)
                    return
                except RemoteError as error:
                    if not error.elsewhere:
                        return


def make_remote(
    env_id: str, *, max_turns: int | None = None, wrappers: Sequence[Mapping[str, Any]] = (), **kwargs: Any
) -> RemoteEnv:
    """Makes a served environment; `agentrl.make` calls this for URLs. Arguments as those of `Fleet`.

    Raises:
        UserError: no URL of an environment; the server does not know it, or the token is wrong.
        EnvironmentFailure: no server answers.
    """
    env = Fleet(env_id, max_turns=max_turns, wrappers=wrappers, **kwargs).episode()
    _ = env.fleet.description
    return env
