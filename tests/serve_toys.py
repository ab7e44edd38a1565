"""An environment that does on command what servers fear, and a clock that tests turn."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import gymnasium as gym
import httpx
import numpy as np
from toys import register

from agentrl.envs import AnyText, TextEnv
from agentrl.errors import UserError
from agentrl.images import image_part
from agentrl.serve import Settings, create_app
from agentrl.types import TextPart

FINAL = 12
"""The turn after which a trial is over."""


class Hall:
    """Where hanging trials wait: `entered` is set when one comes in, `leave` lets all go."""

    def __init__(self) -> None:
        self.entered, self.leave = threading.Event(), threading.Event()

    def wait(self) -> None:
        """Hangs."""
        self.entered.set()
        self.leave.wait()


halls: dict[str, Hall] = {}
"""By the `hall` argument of the environments that use it: each test has its own."""


class Trial(TextEnv):
    """Counts its turns. `turns` of all instances together are in `played`, so that a step played twice shows."""

    instructions = "Try."
    local_arguments = frozenset({"file"})
    fast = False
    made = 0
    played: deque[str] = deque(maxlen=1000)

    def __init__(self, hall: str = "", file: str = "", size: int = 1, broken: bool = False) -> None:
        super().__init__()
        type(self).made += 1
        if broken:
            raise RuntimeError("made of glass (secret/place.py:7)")
        if size < 1:
            raise UserError(f"size={size}: at least 1")
        self.hall, self.size = hall, size

    def begin(self, options: dict[str, Any]) -> Any:
        self.turn = 0
        if options.get("start") == "hang":
            halls[self.hall].wait()
        if options.get("start") == "crash":
            raise RuntimeError("cannot start")
        return f"size {self.size} draw {self.np_random.integers(10**9)}", {"turn": 0}

    def parse_action(self, text: str) -> str:
        return text

    def play(self, action: str) -> Any:
        self.turn += 1
        self.played.append(action)
        observation: Any = f"turn {self.turn}"
        if action == "hang":
            halls[self.hall].wait()
        elif action == "crash":
            raise ValueError("fell over at /srv/secret/place.py")
        elif action == "exit":
            raise SystemExit("leaving")
        elif action == "user":
            raise UserError("ask otherwise")
        elif action == "nan":
            return observation, float("nan"), False, {}
        elif action == "odd":
            observation = object()
        elif action.startswith("big"):
            observation = "x" * int(action[3:])
        elif action == "say":
            observation = "half \ud800 🙂 \u2028"
        elif action == "picture":
            part = image_part(np.full((4, 4, 3), self.turn, np.uint8), alt="a square")
            observation = [TextPart(text="look"), part, part]
        info = {"turn": self.turn, "inf": float("inf"), "array": np.arange(2), "tuple": (1, "a")}
        return observation, 0.1, action == "win" or self.turn == FINAL, info


class QuickTrial(Trial):
    fast = True


class Plain(gym.Env[str, str]):
    """Not a `TextEnv`: says nothing about its arguments."""

    observation_space = action_space = AnyText()

    def __init__(self, size: int = 1) -> None:
        self.size = size

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return "plain", {}

    def step(self, action: str) -> Any:
        return "plain", 0.0, True, False, {}


register("Trial-v0", Trial)
register("QuickTrial-v0", QuickTrial)
register("ShortTrial-v0", QuickTrial, max_turns=2)
gym.register("Plain-v0", Plain, disable_env_checker=True, order_enforce=False)

_keys = itertools.count()


def wanted(env: str = "QuickTrial-v0", seed: int = 0, **more: Any) -> dict[str, Any]:
    """A `CreateRequest` with a key of its own."""
    return {"env": env, "seed": seed, "request": f"key-{next(_keys)}", **more}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Client(httpx.AsyncClient):
    """Speaks to an application in this process. `app` is the application."""

    app: Any

    async def create(self, env: str = "QuickTrial-v0", seed: int = 0, **more: Any) -> str:
        """Makes a session. Returns its id."""
        answer = await self.post("/v1/sessions", json=wanted(env, seed, **more))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["session"])

    async def step(self, session: str, step: int, action: str) -> httpx.Response:
        """Plays a step."""
        return await self.post(f"/v1/sessions/{session}/step", json={"step": step, "action": action})

    async def steps(self, *items: tuple[str, int, str]) -> list[dict[str, Any]]:
        """Plays a batch. Returns the results."""
        names = ("session", "step", "action")
        body = {"steps": [dict(zip(names, item, strict=True)) for item in items]}
        answer = await self.post("/v1/steps", json=body)
        assert answer.status_code == 200, answer.text
        results: list[dict[str, Any]] = answer.json()["results"]
        return results


@asynccontextmanager
async def client_of(*envs: str, clock: Any = None, token: str = "", **settings: Any) -> AsyncIterator[Client]:
    """A client of an application that serves `envs`; all its sessions are ended afterwards."""
    options = {} if clock is None else {"clock": clock}
    app = create_app(Settings(envs=list(envs) or ["QuickTrial-v0"], **{"rate": 0.0} | settings), **options)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
    try:
        async with Client(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            client.app = app
            yield client
    finally:
        for hall in halls.values():
            hall.leave.set()
        await app.api.sessions.stop()


async def entered(hall: Hall) -> None:
    """Waits until an environment hangs in `hall`."""
    assert await asyncio.to_thread(hall.entered.wait, 30)
