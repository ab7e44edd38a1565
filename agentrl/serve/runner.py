"""Where environments run, and the environments that wait for their next episode.

Those that are declared fast are called on the event loop; all others in a thread or process of their own
(`agentrl.rollout.executors.Environment`), a bounded number at once, each call under a deadline. A call that misses it
is given up together with its environment: the process is killed, the thread left to end by itself. The same holds for
making and resetting a fast environment with arguments of a client's choice, which may be neither fast nor sane.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any

from agentrl.errors import AgentRLError, DeadlineExceeded, EnvironmentFailure
from agentrl.rollout.executors import Environment, Method
from agentrl.serve.catalogue import Catalogue, Recipe
from agentrl.serve.settings import Settings


class Runner:
    """Makes, calls and keeps environments."""

    def __init__(self, catalogue: Catalogue, settings: Settings, clock: Callable[[], float]) -> None:
        self._catalogue, self._settings, self._clock = catalogue, settings, clock
        self._slots = asyncio.Semaphore(settings.workers)
        self._free: dict[Recipe, list[tuple[float, Environment]]] = {}
        self._out: set[Environment] = set()
        self._given_up: set[Environment] = set()
        self._numbers = itertools.count()

    @property
    def free(self) -> int:
        """Environments that wait for an episode."""
        return sum(map(len, self._free.values()))

    @property
    def stuck(self) -> int:
        """Given up calls that have still not come back."""
        self._given_up = {environment for environment in self._given_up if environment.busy}
        return len(self._given_up)

    def take(self, recipe: Recipe) -> Environment:
        """Returns a free environment, or a new one that is still to be made."""
        waiting = self._free.get(recipe)
        if waiting:
            environment = waiting.pop()[1]
            if not waiting:
                del self._free[recipe]
        else:
            if len(self._out) + self.free >= self._settings.max_sessions:
                self._evict()
            entry = self._catalogue.entries[recipe.env]
            host = entry.host(recipe.max_turns, json.loads(recipe.kwargs), json.loads(recipe.wrappers))
            environment = Environment(host, f"env-{recipe.env}-{next(self._numbers)}", threaded=True)
        self._out.add(environment)
        return environment

    async def start(self, environment: Environment, seed: int, options: dict[str, Any], *, trusted: bool) -> Any:
        """Makes the environment where it is not, and resets it. Returns observation, info, instructions.

        Args:
            environment: from `take`.
            seed: for `reset`.
            options: for `reset`.
            trusted: the server's owner chose the arguments, so that a declaration of speed can be believed.

        Raises:
            AgentRLError: it cannot be made or reset, or not in time.
        """
        if trusted and environment.made and not environment.slow:
            return environment.call("reset", seed, options)
        environment.slow = True
        limit_s = self._settings.create_deadline_s
        if not environment.made:
            await self._submit(environment, limit_s, "make")
            environment.made = True
        answer = await self._submit(environment, limit_s, "reset", seed, options)
        if environment.host.fast:
            environment.inline()
        return answer

    async def step(self, environment: Environment, action: str) -> Any:
        """Plays `action` in an environment that is not fast. Returns what its `step` returns.

        Raises:
            AgentRLError: it failed, or took longer than the deadline.
        """
        return await self._submit(environment, self._settings.step_deadline_s, "step", action)

    async def _submit(self, environment: Environment, limit_s: float, method: Method, *arguments: Any) -> Any:
        async with self._slots:
            future: asyncio.Future[tuple[bool, Any]] = asyncio.get_running_loop().create_future()
            environment.submit(method, arguments, future)
            try:
                async with asyncio.timeout(limit_s):
                    good, value = await future
            except TimeoutError:
                raise DeadlineExceeded(f"{method} took longer than {limit_s:g} s") from None
        if good:
            return value
        if isinstance(value, AgentRLError):
            raise value
        raise EnvironmentFailure(f"{type(value).__name__}: {value}") from value

    def give_back(self, recipe: Recipe, environment: Environment, *, usable: bool) -> None:
        """Takes an environment back; one that is not `usable` is ended."""
        self._out.discard(environment)
        if usable and environment.made and not environment.busy:
            self._free.setdefault(recipe, []).append((self._clock(), environment))
            return
        if environment.busy:
            self._given_up.add(environment)
        environment.discard()

    def sweep(self) -> None:
        """Ends environments that nobody wanted for a session's time to live."""
        limit = self._clock() - self._settings.session_ttl_s
        for recipe, waiting in list(self._free.items()):
            while waiting and waiting[0][0] < limit:
                waiting.pop(0)[1].discard()
            if not waiting:
                del self._free[recipe]

    def _evict(self) -> None:
        """Ends a free environment, so that no more than `max_sessions` exist at once."""
        for recipe, waiting in self._free.items():
            waiting.pop(0)[1].discard()
            if not waiting:
                del self._free[recipe]
            return

    async def close(self, patience_s: float = 2.0) -> None:
        """Ends all environments; waits at most about `patience_s` for those that do not end by themselves."""
        environments = [*self._out, *(each for waiting in self._free.values() for _, each in waiting)]
        for environment in environments:
            environment.discard()
        environments += self._given_up
        self._free, self._out, self._given_up = {}, set(), set()
        await asyncio.to_thread(_join, environments, patience_s)


def _join(environments: list[Environment], patience_s: float) -> None:
    for environment in environments:
        if not environment.join(patience_s):
            patience_s = 0.01
