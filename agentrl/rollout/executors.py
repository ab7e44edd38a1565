"""Where environments run: on the event loop, in a thread each, or in a process each.

An environment that declares ``fast = True`` is called directly. Any other gets a thread of its own for its whole life
(many libraries tie handles to a thread), or a worker process; a semaphore in the collector bounds how many of them work
at once. A call that misses its deadline is given up together with its environment: the thread is left to end by
itself, the process is killed, and the next episode gets a fresh environment.

Not a `ThreadPoolExecutor`: a hung call would hold its slot for ever and keep the interpreter from exiting.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import gymnasium as gym

from agentrl.config.schema import EnvConfig
from agentrl.envs import make
from agentrl.errors import DeadlineExceeded, EnvironmentFailure, UserError

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

    def reset(self, seed: int, options: dict[str, Any]) -> Reset:
        assert self._env is not None
        answer = self._env.reset(seed=seed, options=options)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise EnvironmentFailure(f"returned {answer!r:.80}; wanted (observation, info)")
        observation, info = answer
        has = self._env.has_wrapper_attr("instructions")
        return observation, info, str(self._env.get_wrapper_attr("instructions")) if has else ""

    def step(self, action: str) -> Any:
        assert self._env is not None
        return self._env.step(action)

    def close(self) -> None:
        if self._env is not None:
            self._env.close()

    def kill(self) -> None:
        pass


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


class EnvironmentPool:
    """Environments of one configuration, made on demand and kept between episodes and collections."""

    def __init__(self, config: EnvConfig, executor: str, *, evaluation: bool = False) -> None:
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

    def _new(self) -> Environment:
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

    def take(self) -> Environment:
        """Returns a free environment, or a new one that is still to be made."""
        environment = self._free.pop() if self._free else self._new()
        self._out.add(environment)
        return environment

    def give_back(self, environment: Environment, *, usable: bool) -> None:
        """Takes an environment back; one that is not `usable` is ended."""
        self._out.discard(environment)
        if usable and environment.made and not environment.busy:
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
