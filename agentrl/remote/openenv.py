"""An environment on an OpenEnv server as a Gymnasium environment with text in and out.

    env = agentrl.make("openenv+http://localhost:8000", max_turns=20)

One WebSocket is one environment there; it is kept from episode to episode. OpenEnv has typed actions and observations:
the agent's text goes into one field of an action, and one field of an observation is what the agent reads, the rest is
`info`. Its protocol has no truncation, no system prompt, no step numbers (a lost connection ends the episode) and does
not say whether a seed was heard. Needs the extra ``openenv``.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, NamedTuple, TypeVar

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec as GymSpec
from gymnasium.wrappers import TimeLimit

from agentrl.envs.core import AnyText
from agentrl.envs.wrappers import wrap
from agentrl.errors import UserError
from agentrl.remote.address import parse_openenv
from agentrl.remote.codec import encode
from agentrl.remote.env import TOKEN_ENV, settings_of
from agentrl.remote.errors import (
    EnvironmentCrashed,
    Finished,
    InvalidRequest,
    NotAServer,
    RemoteError,
    ServerFull,
    TooLate,
    Unreachable,
    error_of_answer,
)
from agentrl.remote.servers import Budget, server_at
from agentrl.remote.transport import CONNECT_S, transport

T = TypeVar("T")

ACTION_KEYS = ("message",)
OBSERVATION_KEYS = ("text", "message", "observation", "output")
"""Fields that are taken for the text where there are several, in this order."""
MAX_BYTES = 64 * 1024 * 1024
"""Of the largest message that a server may send."""
_NO_TEXT = frozenset({"metadata", "done", "reward"})


class OpenEnv(gym.Env[str, str]):
    """One episode at a time on an OpenEnv server. Blocks; the server is asked for its schema when this is made.

    Args:
        env_id: ``openenv+http://host:port[/path]``.
        action_key: field of an action that takes the agent's text; by default ``message``, else the only text field, or
            the only one that is required.
        observation_key: field of an observation that the agent reads (as JSON where it is no text); by default the
            first of `OBSERVATION_KEYS`, else the only text field, else the whole observation as JSON.
        token_env: environment variable with a bearer token.
        retry_s: seconds for which a server that cannot be reached, or is full, is tried again.
        timeout_s: seconds in which a reset or step is answered.
        **parameters: of the server's `reset`, sent with each; options of `reset` come on top.

    Raises:
        UserError: no such URL, no field for the agent's text, or the package ``websockets`` is missing.
        EnvironmentFailure: the server does not answer.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}
    fast = False

    def __init__(
        self,
        env_id: str,
        *,
        action_key: str | None = None,
        observation_key: str | None = None,
        token_env: str = TOKEN_ENV,
        retry_s: float = 30.0,
        timeout_s: float = 60.0,
        **parameters: Any,
    ) -> None:
        self.env_id, self.url, self.parameters = env_id, parse_openenv(env_id), parameters
        self.observation_space: AnyText = AnyText()
        self.action_space: AnyText = AnyText()
        self.spec = GymSpec(id="OpenEnv-v0")
        self.instructions = ""
        self._settings = settings_of(env_id, parameters, token_env, retry_s, timeout_s)
        try:
            encode(parameters)
        except (TypeError, ValueError) as error:
            raise UserError(f"environment {env_id!r}: arguments travel as JSON: {error}") from error
        try:
            import websockets.sync.client  # noqa: F401
        except ModuleNotFoundError as error:
            raise UserError(f'environment {env_id!r}: {error}: pip install "agentrl[openenv]"') from error
        self._connection: Any = None
        self._opened = contextlib.ExitStack()
        self._over = True
        self._last = ""
        schema = self._retried(self._schema)
        self.action_key = action_key or _action_key(self.url, schema.get("action"))
        self.observation_key = observation_key or _observation_key(schema.get("observation"))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begins an episode; without a `seed` one is drawn, in a row that the last seed began.

        Raises:
            Refused: somebody must change something (a `UserError`).
            Failed, TooLate: the server could not begin it.
        """
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(2**31)) if seed is None else int(seed)
        data = {**self.parameters, **(options or {}), "seed": drawn}
        self._over = True
        played = self._read(self._retried(lambda: self._begin({"type": "reset", "data": data})))
        self._over, self._last = False, played.text
        self.instructions = str(played.info.pop("instructions", ""))
        return played.text, played.info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Plays one action; one whose text the server refuses comes back as an observation, as in `TextEnv`.

        Raises:
            Refused: the episode is over, or the server's actions are others (a `UserError`).
            Failed, TooLate: the episode cannot go on.
        """
        if self._over:
            raise Finished(f"{self.env_id}: step after the episode ended; call reset() first")
        try:
            answer = self._exchange({"type": "step", "data": {self.action_key: str(action)}})
        except _BadText as error:
            text = f"Invalid action: {error}\n{self._last}"
            return text, 0.0, False, False, {"valid_action": False, "action_error": str(error)}
        except RemoteError:
            self._over = True
            raise
        played = self._read(answer)
        self._last, self._over = played.text, played.done
        played.info.pop("instructions", None)
        truncated = played.done and played.truncated
        return played.text, played.reward, played.done and not truncated, truncated, played.info

    def close(self) -> None:
        """Ends the connection, and with it the environment on the server."""
        self._connection, self._over = None, True
        self._opened.close()

    def render(self) -> Any:
        """Returns the last observation."""
        return self._last

    def __repr__(self) -> str:
        return f"OpenEnv({self.env_id!r})"

    __str__ = __repr__

    def _retried(self, attempt: Callable[[], T]) -> T:
        """Makes attempts until one succeeds or fails for good; for what may be asked twice."""
        budget, server = Budget(self._settings.retry_s, self._settings.timeout_s), server_at(self.url)
        while True:
            try:
                result = attempt()
            except RemoteError as error:
                if not error.passing:
                    raise
                server.failed(error)
                budget.spend(error)
                time.sleep(max(error.retry_at - monotonic(), 0))
            else:
                server.answered()
                return result

    def _schema(self) -> dict[str, Any]:
        """Returns the server's schemas; none of a server that tells none."""
        http = transport(self.url, self._settings.headers)
        try:
            reply = http.request("GET", "/schema", b"", CONNECT_S)
        finally:
            http.close()
        body = _decoded(reply.body)
        if reply.status != 200:
            error = error_of_answer(self.url, reply.status, reply.headers, body)
            if isinstance(error, NotAServer):
                return {}
            raise error
        if not isinstance(body, dict):
            raise Unreachable(f"{self.url}: answered outside the protocol: /schema is no object")
        return body

    def _connect(self) -> Any:
        from websockets.exceptions import InvalidStatus, WebSocketException
        from websockets.sync.client import connect

        token = self._settings.token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        where = "ws" + self.url.removeprefix("http") + "/ws"
        try:
            opening = connect(
                where, additional_headers=headers, compression=None, open_timeout=CONNECT_S, close_timeout=2,
                max_size=MAX_BYTES,
            )  # fmt: skip
            return self._opened.enter_context(opening)
        except InvalidStatus as error:
            answer = error.response
            told = {name.lower(): value for name, value in answer.headers.raw_items()}
            raise error_of_answer(self.url, answer.status_code, told, _decoded(answer.body or b"")) from error
        except (WebSocketException, OSError) as error:
            raise Unreachable(f"{self.url}: no WebSocket: {str(error) or type(error).__name__}") from error

    def _begin(self, message: dict[str, Any]) -> dict[str, Any]:
        """As `_exchange`; where the connection of the last episode has gone meanwhile, over a new one."""
        if self._connection is not None:
            with contextlib.suppress(Unreachable):
                return self._exchange(message)
        return self._exchange(message)

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        """Sends a message. Returns the answer's data; any failure but `_BadText` ends the connection."""
        from websockets.exceptions import ConnectionClosed

        if self._connection is None:
            self._connection = self._connect()
        try:
            with contextlib.suppress(ConnectionClosed):  # the answer may have come before, and says why
                self._connection.send(encode(message))
            answer = json.loads(self._connection.recv(timeout=self._settings.timeout_s))
            if not isinstance(answer, dict) or not isinstance(answer.get("data"), dict):
                raise ValueError("no data")
            if answer.get("type") == "error":
                raise self._error(answer["data"])
        except _BadText:
            raise
        except BaseException as error:
            self.close()
            if isinstance(error, TimeoutError):
                raise TooLate(f"{self.url}: no answer within {self._settings.timeout_s:g} s") from None
            if isinstance(error, ConnectionClosed | OSError):
                raise Unreachable(f"{self.url}: the connection was lost: {error}") from error
            if isinstance(error, ValueError):
                raise Unreachable(f"{self.url}: answered outside the protocol: {error}") from error
            raise
        data: dict[str, Any] = answer["data"]
        return data

    def _error(self, data: dict[str, Any]) -> RemoteError:
        """Returns the exception of an error that the server answered with."""
        code, words = data.get("code"), str(data.get("message", "an error"))[:500]
        if code == "CAPACITY_REACHED":
            return ServerFull(f"{self.url}: {words}")
        if code not in ("VALIDATION_ERROR", "INVALID_JSON", "UNKNOWN_TYPE"):
            return EnvironmentCrashed(f"{self.url}: {words} ({code})")
        problems = data.get("errors")
        problems = [each for each in problems if isinstance(each, dict)] if isinstance(problems, list) else []
        places = [each["loc"] if isinstance(each.get("loc"), list) else [] for each in problems]
        told = "; ".join(
            f"{'.'.join(map(str, place))}: {each.get('msg')}" for place, each in zip(places, problems, strict=True)
        )
        alien = ("missing", "extra_forbidden")
        if problems and all(
            place[:1] == [self.action_key] and each.get("type") not in alien
            for place, each in zip(places, problems, strict=True)
        ):
            return _BadText(told)
        return InvalidRequest(f"{self.url}: {words}{': ' * bool(told)}{told} (action_key is {self.action_key!r})")

    def _read(self, data: dict[str, Any]) -> _Played:
        """Takes the server's observation apart.

        Raises:
            UserError: it lacks the field that the agent reads.
            EnvironmentFailure: outside the protocol.
        """
        observation, reward, done = data.get("observation"), data.get("reward"), data.get("done", False)
        reward = 0.0 if reward is None else reward
        finite = isinstance(reward, int | float) and math.isfinite(reward)
        if not isinstance(observation, dict | str) or not isinstance(done, bool) or not finite:
            self.close()
            raise Unreachable(f"{self.url}: answered outside the protocol: {json.dumps(data)[:200]}")
        if isinstance(observation, str):
            return _Played(observation, float(reward), done, False, {"valid_action": True})
        truncated = observation.get("truncated") is True
        if self.observation_key is None:
            return _Played(_text(observation), float(reward), done, truncated, {"valid_action": True})
        if self.observation_key not in observation:
            fields = ", ".join(observation) or "none"
            raise InvalidRequest(
                f"{self.url}: the observation has no field {self.observation_key!r} (observation_key); it has: {fields}"
            )
        text = _text(observation.pop(self.observation_key))
        observation.pop("truncated", None)
        inner = observation.pop("info", {})
        info = {"valid_action": True, **(inner if isinstance(inner, dict) else {"info": inner}), **observation}
        return _Played(text, float(reward), done, truncated, info)


class _Played(NamedTuple):
    text: str
    reward: float
    done: bool
    truncated: bool
    info: dict[str, Any]


class _BadText(InvalidRequest):
    """The server refuses the agent's text, and nothing else of the action."""


def _decoded(body: bytes | bytearray) -> Any:
    """Returns what JSON holds; None of anything else."""
    try:
        return json.loads(body)
    except ValueError:
        return None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _fields(schema: Any) -> dict[str, Any]:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return properties if isinstance(properties, dict) else {}


def _texts(schema: Any) -> list[str]:
    """Returns the text fields of a JSON schema."""

    def is_text(field: Any) -> bool:
        if not isinstance(field, dict):
            return False
        return field.get("type") == "string" or any(map(is_text, field.get("anyOf", ())))

    return [name for name, field in _fields(schema).items() if is_text(field) and name not in _NO_TEXT]


def _action_key(url: str, schema: Any) -> str:
    texts = _texts(schema)
    for name in ACTION_KEYS:
        if name in texts or not _fields(schema):
            return name
    for candidates in (texts, [name for name in texts if name in schema.get("required", ())]):
        if len(candidates) == 1:
            return candidates[0]
    fields = ", ".join(name for name in _fields(schema) if name not in _NO_TEXT) or "none"
    raise InvalidRequest(f"{url}: which field takes the agent's text? action_key names it; its actions have: {fields}")


def _observation_key(schema: Any) -> str | None:
    texts = _texts(schema)
    return next((name for name in OBSERVATION_KEYS if name in texts), texts[0] if len(texts) == 1 else None)


def make_openenv(
    env_id: str, *, max_turns: int | None = None, wrappers: Sequence[Mapping[str, Any]] = (), **kwargs: Any
) -> gym.Env[Any, Any]:
    """Makes an environment on an OpenEnv server; `agentrl.make` calls this for ``openenv+http://`` ids.

    Args:
        env_id: ``openenv+http://host:port[/path]``.
        max_turns: turn limit; None for none.
        wrappers: as those of `agentrl.make`.
        **kwargs: as those of `OpenEnv`.

    Raises:
        UserError: arguments that make no sense, or a server that refuses them.
        EnvironmentFailure: the server does not answer.
    """
    env: gym.Env[Any, Any] = OpenEnv(env_id, **kwargs)
    if max_turns is not None:
        env = TimeLimit(env, max_turns)
    return wrap(env, wrappers)
