"""Where environments run: on the event loop, in a thread each, in a process each, or behind a server.

An environment that declares ``fast = True`` is called directly. Any other gets a thread of its own for its whole life
(many libraries tie handles to a thread), or a worker process; a semaphore in the collector bounds how many of them work
at once. A call that misses its deadline is given up together with its environment: the thread is left to end by
itself, the process is killed, and the next episode gets a fresh environment.

An environment that is served elsewhere (`agentrl.remote`) is awaited on the event loop: no thread, no bound but
`rollout.concurrency`.

Not a `ThreadPoolExecutor`: a hung call would hold its slot for ever and keep the interpreter from exiting.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import gymnasium as gym

from agentrl.config.schema import EnvConfig
from agentrl.envs import make
from agentrl.errors import DeadlineExceeded, EnvironmentFailure, UserError
from agentrl.remote.address import is_ours
from agentrl.rollout.values import jsonable

if TYPE_CHECKING:
    from agentrl.remote.env import Fleet, RemoteEnv

log = logging.getLogger("agentrl.rollout")

Reset = tuple[Any, dict[str, Any], str]
"""Observation, info, instructions."""
Method = Literal["make", "reset", "step"]


class Host(Protocol):
    """Holds one environment; every method blocks. `make` first, then `reset` and `step`, `close` last."""

    fast: bool

    def make(self) -> None: ...
    def reset(self, seed: int, options: dict[str, Any]) -> Reset: ...
    def step(self, action: str) -> Any: ...
    def describe(self) -> dict[str, Any]: ...
    def close(self) -> None: ...
    def kill(self) -> None: ...


class LocalHost:
    """An environment in this process."""

    fast = False

    def __init__(
        self, env_id: str, max_turns: int | None, kwargs: dict[str, Any], wrappers: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._arguments = (env_id, max_turns, kwargs, wrappers)
        self._env: gym.Env[Any, Any] | None = None

    def make(self) -> None:
        env_id, max_turns, kwargs, wrappers = self._arguments
        self._env = make(env_id, max_turns=max_turns, wrappers=wrappers, **kwargs)
        self.fast = bool(getattr(self._env.unwrapped, "fast", False))
        self._speaker: Any = self._env
        while isinstance(self._speaker, gym.Wrapper) and not hasattr(self._speaker, "instructions"):
            self._speaker = self._speaker.env

    def reset(self, seed: int, options: dict[str, Any]) -> Reset:
        assert self._env is not None
        answer = self._env.reset(seed=seed, options=options)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise EnvironmentFailure(f"returned {answer!r:.80}; wanted (observation, info)")
        observation, info = answer
        return observation, info, str(getattr(self._speaker, "instructions", ""))

    def step(self, action: str) -> Any:
        assert self._env is not None
        return self._env.step(action)

    def stepper(self) -> Callable[[str], Any]:
        """`step` for many calls in a row: that of the environment itself."""
        assert self._env is not None
        return self._env.step

    def describe(self) -> dict[str, Any]:
        """What the environment is, in plain types: the fields of a server's `EnvSpec` and its local arguments."""
        assert self._env is not None
        base: Any = self._env.unwrapped
        span = getattr(base, "reward_range", None)
        local = getattr(base, "local_arguments", None)
        spec = self._env.spec
        return {
            "instructions": str(getattr(base, "instructions", "")),
            "observation_space": repr(self._env.observation_space),
            "action_space": repr(self._env.action_space),
            "max_turns": None if spec is None else spec.max_episode_steps,
            "tools": jsonable(getattr(base, "tools", [])),
            "reward_range": None if span is None else (float(span[0]), float(span[1])),
            "provides": jsonable(getattr(base, "provides", {})),
            "single_task": bool(getattr(base, "single_task", False)),
            "hard": bool(getattr(base, "hard", False)),
            "fast": self.fast,
            "defaults": jsonable({**_defaults(type(base)), **({} if spec is None else spec.kwargs)}),
            "local_arguments": None if local is None else frozenset(local),
        }

    def close(self) -> None:
        if self._env is not None:
            self._env.close()

    def kill(self) -> None:
        pass


def _defaults(function: Any) -> dict[str, Any]:
    """Returns the named parameters that have a default."""
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty and one.name != "render_mode"}


class Environment:
    """One environment as an episode sees it: `call` where it is inline, else `submit`."""

    def __init__(self, host: Host, name: str = "", *, threaded: bool) -> None:
        self.host = host
        self.made = False
        self.slow = threaded
        self.busy = False
        """A submitted call has not come back yet."""
        self._inbox: queue.SimpleQueue[Callable[[], None] | Literal["close", "leave"]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._name = name

    def call(self, method: Method, *arguments: Any) -> Any:
        """Runs a method here and now."""
        return getattr(self.host, method)(*arguments)

    def submit(self, method: Method, arguments: tuple[Any, ...], future: asyncio.Future[tuple[bool, Any]]) -> None:
        """Runs a method in this environment's thread; `future` gets (True, result) or (False, exception)."""
        loop = future.get_loop()
        self.busy = True

        def settle(answer: tuple[bool, Any]) -> None:
            self.busy = False
            if not future.done():
                future.set_result(answer)

        def work() -> None:
            try:
                answer = True, getattr(self.host, method)(*arguments)
            except BaseException as error:  # SystemExit too: nothing may end this thread silently
                answer = False, error
            try:
                loop.call_soon_threadsafe(settle, answer)
            except RuntimeError:  # the loop is gone: nobody waits for this answer any more
                self.busy = False

        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        self._inbox.put(work)

    def inline(self) -> None:
        """From now on calls run where they are made; the thread ends, the environment stays."""
        self.slow = False
        if self._thread is not None:
            self._inbox.put("leave")
            self._thread = None

    def outrun(self) -> None:
        """It is not as fast as it says: from now on calls run in its thread."""
        self.host.fast, self.slow = False, True

    def discard(self) -> None:
        """Ends the environment without waiting: killed if it hangs in a process, closed as soon as it is free."""
        if self.busy:
            self.host.kill()
        if self._thread is None:
            self._close_host()
        else:
            self._inbox.put("close")

    def join(self, timeout: float) -> bool:
        """Waits for the end after `discard`. Returns whether it came; kills what can be killed otherwise."""
        if self._thread is None:
            return True
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.host.kill()
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while not isinstance(work := self._inbox.get(), str):
            work()
        if work == "close":
            self._close_host()

    def _close_host(self) -> None:
        try:
            self.host.close()
        except Exception:
            log.warning("closing an environment failed", exc_info=True)


class RemoteEnvironment(Environment):
    """A served environment as an episode sees it: what is submitted runs as a task on the event loop."""

    def __init__(self, env: RemoteEnv) -> None:
        super().__init__(LocalHost("", None, {}), threaded=True)
        self.made = True
        self._env = env
        self._task: asyncio.Task[None] | None = None

    def submit(self, method: Method, arguments: tuple[Any, ...], future: asyncio.Future[tuple[bool, Any]]) -> None:
        self.busy = True
        self._task = future.get_loop().create_task(self._work(method, arguments, future))

    def discard(self) -> None:
        """Ends the session without waiting; a call under way is called off."""
        if self._task is not None:
            self._task.cancel()
        self._env.leave()

    def join(self, timeout: float) -> bool:
        return True

    async def _work(self, method: Method, arguments: tuple[Any, ...], future: asyncio.Future[tuple[bool, Any]]) -> None:
        answer: tuple[bool, Any]
        try:
            if method == "reset":
                seed, options = arguments
                observation, info = await self._env.areset(seed=seed, options=options)
                answer = True, (observation, info, self._env.instructions)
            else:
                answer = True, await self._env.astep(*arguments)
        except Exception as error:
            answer = False, error
        self.busy = False
        if not future.done():
            future.set_result(answer)


class EnvironmentPool:
    """Environments of one configuration, made on demand and kept between episodes and collections.

    Args:
        config: which environment.
        executor: where they run (`RolloutConfig.executor`).
        evaluation: use the environment's evaluation arguments.
        whole: the policy acts on all episodes that wait, or at once, so that steps taken together should come back
            together.
    """

    def __init__(self, config: EnvConfig, executor: str, *, evaluation: bool = False, whole: bool = True) -> None:
        self.instructions = config.instructions
        self.env_id = config.id
        self.kwargs = {**config.kwargs, **config.eval_kwargs} if evaluation else dict(config.kwargs)
        self._max_turns = config.max_turns
        self._wrappers = config.wrappers
        self.executor = executor
        """``auto`` until the first environment was looked at (`decide`)."""
        self.made = 0
        self._numbers = itertools.count()
        self._free: list[Environment] = []
        self._out: set[Environment] = set()
        self._whole = whole
        self._fleet: Fleet | None = None
        """Of a served environment that is awaited."""

    def _new(self) -> Environment:
        if self._fleet is not None:
            self.made += 1
            return RemoteEnvironment(self._fleet.episode())
        host: Host
        if self.executor == "process":
            from agentrl.rollout.process import ProcessHost

            host = ProcessHost(self.env_id, self._max_turns, self.kwargs, self._wrappers)
        else:
            host = LocalHost(self.env_id, self._max_turns, self.kwargs, self._wrappers)
        self.made += 1
        name = f"env-{self.env_id}-{next(self._numbers)}"
        return Environment(host, name, threaded=self.executor != "inline")

    async def decide(self, deadline_s: float) -> None:
        """Settles ``auto``: makes one environment in a thread and asks whether it is fast.

        Raises:
            UserError: the environment does not exist or refuses its arguments.
            DeadlineExceeded: it was not made within `deadline_s`.
        """
        if is_ours(self.env_id) and self.executor in ("auto", "async"):
            self._reach()
        if self.executor == "async" and self._fleet is None:
            raise UserError(f"rollout.executor=async is for served environments (URLs); {self.env_id!r} is none")
        if self.executor != "auto":
            return
        environment = self._new()
        future: asyncio.Future[tuple[bool, Any]] = asyncio.get_running_loop().create_future()
        environment.submit("make", (), future)
        try:
            async with asyncio.timeout(deadline_s):
                good, error = await future
        except asyncio.CancelledError:
            environment.discard()
            raise
        except TimeoutError:
            environment.discard()
            raise DeadlineExceeded(f"environment {self.env_id!r} could not be made within {deadline_s:g} s") from None
        if isinstance(error, UserError):
            raise error
        self.executor = "inline" if good and environment.host.fast else "thread"
        if not good:  # the episodes will meet the same fault, count it and retry
            environment.discard()
            return
        environment.made = True
        if self.executor == "inline":
            environment.inline()
        self._free.append(environment)

    def _reach(self) -> None:
        """Prepares a served environment: nothing is sent before the first episode."""
        from agentrl.remote.env import Fleet

        if self._fleet is None:
            self._fleet = Fleet(self.env_id, max_turns=self._max_turns, wrappers=self._wrappers, **self.kwargs)
            self._fleet.whole = self._whole
        self.executor = "async"

    async def settle(self) -> None:
        """Ends a collection on the running event loop: sessions and connections of served environments are closed."""
        if self._fleet is not None:
            await self._fleet.settle()

    def take(self) -> Environment:
        """Returns a free environment, or a new one that is still to be made."""
        environment = self._free.pop() if self._free else self._new()
        self._out.add(environment)
        return environment

    def give_back(self, environment: Environment, *, usable: bool) -> None:
        """Takes an environment back; one that is not `usable` is ended."""
        self._out.discard(environment)
        if usable and environment.made and not environment.busy and self._fleet is None:
            self._free.append(environment)
            return
        environment.discard()

    def close(self, patience_s: float = 2.0) -> None:
        """Ends all environments; waits at most about `patience_s` for each that does not end by itself."""
        environments = [*self._free, *self._out]
        self._free, self._out = [], set()
        for environment in environments:
            environment.discard()
        for environment in environments:
            if not environment.join(patience_s):
                log.warning("environment %r did not close within %g s; left behind", self.env_id, patience_s)
                patience_s = 0.05
