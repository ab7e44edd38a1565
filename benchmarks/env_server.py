"""Steps through a server, against an OpenEnv server with the same trivial environment, on loopback.

    python benchmarks/env_server.py --json env_server.json
    python benchmarks/env_server.py --openenv ~/openenv/bin/python     # its packages live elsewhere

The environment answers with the agent's text and its turn: what is timed is the way there and back. Each server is a
process of its own, made anew for each measurement, and each side is played by its own client: ours by `RemoteEnv`
(one request a step), by the same on an event loop with a request for each step (*single*), and as it plays there by
itself (*batch*: what is ready in the same tick travels together, many steps in two halves); theirs by
`GenericEnvClient`, whose sessions are a WebSocket each. Latency: one session, one step after another. Rates: every
session steps as fast as it can. Memory: what the server's resident set grew by, over the number of sessions. The sides
take turns; figures are medians over the repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx

from agentrl import TextEnv, __version__
from agentrl.remote import lanes
from agentrl.remote.env import Fleet, RemoteEnv

HERE = Path(__file__).resolve()


class EchoEnv(TextEnv):
    """Says back what it is told, with the number of the turn."""

    fast = True

    def begin(self, options: dict[str, Any]) -> Any:
        self.turn = 0
        return f"seed {self.np_random_seed}", {}

    def parse_action(self, text: str) -> str:
        return text

    def play(self, action: str) -> Any:
        self.turn += 1
        return f"{self.turn}: {action}", 0.5, False, {"turn": self.turn}


def serve(port: int) -> None:
    """Serves the environment with our server."""
    import gymnasium as gym

    from agentrl.serve import Settings, create_app
    from agentrl.serve.server import Server, listen

    gym.register("Echo-v0", EchoEnv, disable_env_checker=True, order_enforce=False)
    settings = Settings(envs=["Echo-v0"], port=port, rate=0.0, grace_s=0.0)
    with listen(settings) as listener:
        Server(create_app(settings), settings).run(sockets=[listener])


async def play(port: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns latencies of one session, or steps per second of many."""
    fleet = Fleet(f"http://127.0.0.1:{port}/Echo-v0")
    if settings["sessions"] == 1:
        env = fleet.episode()
        env.reset(seed=0)
        result: dict[str, Any] = {"latencies": latencies(env, settings)}
        _wait()
        env.close()
        return result
    envs = [fleet.episode() for _ in range(settings["sessions"])]
    await asyncio.gather(*(env.areset(seed=number) for number, env in enumerate(envs)))
    if not settings["batch"]:
        lanes.BATCH = 1
    result = {"steps_per_second": await rate(envs, settings)}
    _wait()
    for env in envs:
        env.leave()
    await fleet.settle()
    return result


def _wait() -> None:
    print(json.dumps({"ready": True}), flush=True)  # the sessions stay open while the server's memory is read
    sys.stdin.readline()


def latencies(env: RemoteEnv, settings: dict[str, Any]) -> list[float]:
    """Returns seconds of `steps` steps, one after another."""
    seconds = []
    for _ in range(settings["warm_up"] + settings["steps"]):
        started = perf_counter()
        env.step("hello")
        seconds.append(perf_counter() - started)
    return seconds[settings["warm_up"] :]


async def rate(envs: list[RemoteEnv], settings: dict[str, Any]) -> float:
    """Returns steps per second over `seconds`, every session as fast as it can."""
    count, over = 0, perf_counter() + settings["seconds"]

    async def steps(env: RemoteEnv) -> None:
        nonlocal count
        while perf_counter() < over:
            await env.astep("hello")
            count += 1

    started = perf_counter()
    await asyncio.gather(*map(steps, envs))
    return count / (perf_counter() - started)


@contextmanager
def server(command: list[str], port: int) -> Iterator[int]:
    """Runs a server; yields its process id when it answers."""
    process = subprocess.Popen([*command, "serve", str(port)], cwd=HERE.parent)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.HTTPError:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{' '.join(command)} serve: no server came up") from None
                time.sleep(0.1)
        yield process.pid
    finally:
        process.kill()
        process.wait()


def measure(command: list[str], settings: dict[str, Any]) -> dict[str, float]:
    """Plays one server as `settings` say, in two processes of their own. Returns the figures."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with server(command, port) as pid:
        before = resident(pid)
        client = subprocess.Popen(
            [*command, "play", str(port), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE.parent,
        )
        assert client.stdin is not None
        assert client.stdout is not None
        if not client.stdout.readline():
            raise SystemExit(f"{' '.join(command)} play {settings} failed")
        grown = resident(pid) - before
        out, _ = client.communicate("\n")
    result = json.loads(out)
    if "latencies" in result:
        cuts = statistics.quantiles(result["latencies"], n=100, method="inclusive")
        return {"p50_ms": 1000 * cuts[49], "p99_ms": 1000 * cuts[98]}
    return {"steps_per_second": result["steps_per_second"], "kb_per_session": grown / 1024 / settings["sessions"]}


def resident(pid: int) -> int:
    """Returns the bytes of a process's resident set (Linux)."""
    line = next(s for s in Path(f"/proc/{pid}/status").read_text().splitlines() if s.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures both sides by turns, prints the table, and returns the figures."""
    ours, theirs = [sys.executable, str(HERE)], [options.openenv, str(HERE.with_name("openenv_side.py"))]
    version = openenv_version(options.openenv)
    base = {"warm_up": options.steps // 10, "steps": options.steps, "seconds": options.seconds}
    plans: dict[str, dict[str, Any]] = {"sequential": {"sessions": 1, "batch": False}}
    for sessions in options.sessions:
        for kind in ("single", "batch"):
            plans[f"{sessions} sessions, {kind}"] = {"sessions": sessions, "batch": kind == "batch"}
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name, plan in plans.items():
        sides = {"ours": ours, **({"openenv": theirs} if version and not plan["batch"] else {})}
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for repeat in range(options.repeat):
            for side in list(sides)[:: -1 if repeat % 2 else 1]:
                runs[side].append(measure(sides[side], {**base, **plan}))
        figures[name] = {side: _medians(each) for side, each in runs.items()}
        if plan["batch"] and version:  # they have no batches: theirs is a step at a time
            figures[name]["openenv"] = figures[name.replace("batch", "single")]["openenv"]
        print(_line(name, figures[name]), flush=True)
    around = {
        "agentrl": __version__,
        "openenv": version or "not installed",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }
    print("  ".join(f"{key}={value}" for key, value in around.items()))
    settings = {key: value for key, value in vars(options).items() if key not in ("json", "openenv")}
    return {"settings": settings, "surroundings": around, "figures": figures, "ratios": _ratios(figures)}


def openenv_version(python: str) -> str:
    """Returns the version of OpenEnv that an interpreter has; "" where it has none."""
    code = "import importlib.metadata as m, openenv.core; print(m.version('openenv-core'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in runs) for key in runs[0]}


def _ratio(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times better ours is."""
    if "openenv" not in figures:
        return {}
    ours, theirs = figures["ours"], figures["openenv"]
    faster = {key: ours[key] / theirs[key] for key in ours if key == "steps_per_second"}
    return faster | {key: theirs[key] / max(ours[key], 1e-9) for key in ours if key != "steps_per_second"}


def _ratios(figures: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {name: _ratio(each) for name, each in figures.items()}


UNITS = {"p50_ms": "ms p50", "p99_ms": "ms p99", "steps_per_second": "steps/s", "kb_per_session": "KB/session"}


def _line(name: str, figures: dict[str, dict[str, float]]) -> str:
    cells, ratios = [], _ratio(figures)
    for key, unit in UNITS.items():
        if key in figures["ours"]:
            other = f" / {figures['openenv'][key]:,.4g}, {ratios[key]:.1f}x" if ratios else ""
            cells.append(f"{figures['ours'][key]:,.4g}{other} {unit}")
    return f"{name:22} " + "   ".join(cells)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark with command-line `arguments` and returns its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, nargs="+", default=[64, 1000], help="concurrent sessions")
    parser.add_argument("--steps", type=int, default=5000, help="of the sequential measurement")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each rate")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--openenv", default=sys.executable, metavar="PYTHON", help="interpreter that has openenv-core")
    parser.add_argument("--json", metavar="FILE", help="keep the figures there")
    options = parser.parse_args(arguments)
    result = run(options)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(int(sys.argv[2]))
    elif sys.argv[1:2] == ["play"]:
        print(json.dumps(asyncio.run(play(int(sys.argv[2]), json.loads(sys.argv[3])))))
    else:
        main()
