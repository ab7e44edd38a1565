"""The OpenEnv side of `env_server.py`, in a process (and, with ``--openenv``, an interpreter) of its own.

    python openenv_side.py serve PORT              # its stock server
    python openenv_side.py play PORT SETTINGS      # its stock client; SETTINGS is JSON, and so is what it prints

The environment and the loops are those of `env_server.py`, word for word where the two APIs allow it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from time import perf_counter
from typing import Any


def serve(port: int) -> None:
    """Serves the environment as OpenEnv's own guide does: `create_app` under uvicorn."""
    import uvicorn
    from openenv.core.env_server import Action, Environment, Observation, State, create_app

    class Said(Action):
        message: str

    class Heard(Observation):
        text: str

    class EchoEnvironment(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            super().__init__()
            self.turn = 0

        def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Heard:
            self.turn = 0
            return Heard(text=f"seed {seed}")

        def step(self, action: Said, timeout_s: float | None = None, **_: Any) -> Heard:
            self.turn += 1
            metadata = {"success": False, "valid_action": True, "turn": self.turn}
            return Heard(text=f"{self.turn}: {action.message}", reward=0.5, done=False, metadata=metadata)

        @property
        def state(self) -> State:
            return State(step_count=self.turn)

    app = create_app(EchoEnvironment, Said, Heard, env_name="echo", max_concurrent_envs=4096)
    uvicorn.run(app, port=port, log_level="critical", ws_ping_interval=None, backlog=4096)


async def play(port: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns latencies of one session, or steps per second of many."""
    from openenv.core import GenericEnvClient

    clients = [GenericEnvClient(base_url=f"http://127.0.0.1:{port}") for _ in range(settings["sessions"])]
    room = asyncio.Semaphore(32)  # opening them all at once runs into the client's own time limits

    async def begin(number: int, client: Any) -> None:
        async with room:
            await client.reset(seed=number)

    await asyncio.gather(*(begin(number, client) for number, client in enumerate(clients)))
    if settings["sessions"] == 1:
        result: dict[str, Any] = {"latencies": await latencies(clients[0], settings)}
    else:
        result = {"steps_per_second": await rate(clients, settings)}
    print(json.dumps({"ready": True}), flush=True)  # the sessions stay open while the server's memory is read
    await asyncio.to_thread(sys.stdin.readline)
    with contextlib.suppress(
        TimeoutError
    ):  # its server answers a close with an error of its own; nothing is timed here
        async with asyncio.timeout(10):
            await asyncio.gather(*(client.close() for client in clients))
    return result


async def latencies(client: Any, settings: dict[str, Any]) -> list[float]:
    """Returns seconds of `steps` steps, one after another."""
    seconds = []
    for _ in range(settings["warm_up"] + settings["steps"]):
        started = perf_counter()
        await client.step({"message": "hello"})
        seconds.append(perf_counter() - started)
    return seconds[settings["warm_up"] :]


async def rate(clients: list[Any], settings: dict[str, Any]) -> float:
    """Returns steps per second over `seconds`, every session as fast as it can."""
    count, over = 0, perf_counter() + settings["seconds"]

    async def steps(client: Any) -> None:
        nonlocal count
        while perf_counter() < over:
            await client.step({"message": "hello"})
            count += 1

    started = perf_counter()
    await asyncio.gather(*map(steps, clients))
    return count / (perf_counter() - started)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        print(json.dumps(asyncio.run(play(int(sys.argv[2]), json.loads(sys.argv[3])))))
