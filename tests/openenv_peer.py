"""The other side of `test_openenv.py`: OpenEnv's stock server and client, run by an interpreter that has `openenv`.

python openenv_peer.py serve     # prints its port
python openenv_peer.py run       # runs the code of standard input, which may await; prints `result`
python openenv_peer.py play URL  # a line of JSON in, {"reset": {...}}, {"step": {...}}, {"state": {}}; a line out
"""

from __future__ import annotations

import ast
import asyncio
import json
import socket
import sys
from typing import Any


def serve() -> None:
    """Serves an echo of three turns by `create_app`; one environment at a time."""
    import uvicorn
    from openenv.core.env_server import Action, Environment, Observation, State, create_app
    from pydantic import Field

    class Said(Action):
        loudness: int = 1
        said: str = Field(max_length=40)

    class Heard(Observation):
        echo: str
        turn: int

    class Echo(Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def reset(self, seed: int | None = None, episode_id: str | None = None, name: str = "nobody") -> Heard:
            self.turn = 0
            return Heard(echo=f"{name} {seed}", turn=0)

        def step(self, action: Said, timeout_s: float | None = None, **_: Any) -> Heard:
            if action.said == "crash":
                raise ValueError("the dragon is asleep")
            self.turn += 1
            return Heard(echo=f"{action.said}!", turn=self.turn, reward=0.25 * self.turn, done=self.turn == 3)

        @property
        def state(self) -> State:
            return State(step_count=self.turn)

    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    app = create_app(Echo, Said, Heard, env_name="echo", max_concurrent_envs=1)
    uvicorn.Server(uvicorn.Config(app, log_level="critical")).run(sockets=[listener])


async def play(url: str) -> None:
    """Does what the lines of standard input say with a stock client, until they end."""
    from openenv.core import GenericEnvClient

    async with GenericEnvClient(base_url=url) as client:
        while line := await asyncio.to_thread(sys.stdin.readline):
            ((name, argument),) = json.loads(line).items()
            try:
                if name == "reset":
                    result: Any = vars(await client.reset(**argument))
                elif name == "step":
                    result = vars(await client.step(argument))
                else:
                    result = await client.state()
            except RuntimeError as error:
                result = {"error": str(error)}
            print(json.dumps(result), flush=True)


async def run() -> None:
    """Runs code with an agent that goes up."""
    namespace: dict[str, Any] = {"agent": lambda text: "up"}
    code = compile(sys.stdin.read(), "stdin", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    await eval(code, namespace)
    print(json.dumps(vars(namespace["result"])))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        asyncio.run(run() if sys.argv[1] == "run" else play(sys.argv[2]))
