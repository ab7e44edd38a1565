"""The compose file, for real: build, up, a killed environment server in mid-training, the results, down.

    python docker/compose_test.py [--keep] [--json FILE]

Uses the Docker engine that answers. Where none does and AGENTRL_DOCKER_ENGINE names a script with the commands `up`,
`wheels`, `env` and `stop`, that script brings one up and takes it down again. Training is cut short (ITERATIONS,
DEMONSTRATIONS); everything else is the file as it ships.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "agentrl-compose-test"
ENVS = ("sokoban", "lock", "webshop", "bargain", "search-qa", "python-tool")
LIMITS_MB = {"agentrl-envs": 400, "agentrl-trainer": 2500}
SHORT = {
    "DEMONSTRATIONS": "1500",
    "LEVELS": "64",
    "TENSORBOARD_PORT": "0",
    "AGENTRL__ITERATIONS": "12",
    "AGENTRL__EVAL__EPISODES": "64",
}
FIGURES: dict[str, Any] = {"seconds": {}, "image_mb": {}}


class Failed(Exception):
    """A check that does not hold."""


def sh(*command: str, check: bool = True, quiet: bool = True, **kwargs: Any) -> str:
    """Runs a command in the project's root; returns its output, which a failure shows."""
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=quiet, **kwargs)
    if check and done.returncode:
        raise Failed(f"{shlex.join(command)}: exit {done.returncode}\n{(done.stdout or '')[-3000:]}{done.stderr or ''}")
    return (done.stdout or "").strip()


def compose(*arguments: str, **kwargs: Any) -> str:
    return sh("docker", "compose", "-p", PROJECT, *arguments, **kwargs)


@contextmanager
def step(name: str) -> Iterator[None]:
    started = time.perf_counter()
    print(f"{name} ...", flush=True)
    yield
    FIGURES["seconds"][name] = round(time.perf_counter() - started, 1)
    print(f"{name}: {FIGURES['seconds'][name]} s", flush=True)


def until(what: str, seconds: float, ready: Any) -> Any:
    """Asks `ready` until its answer is true; returns that answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if answer := ready():
            return answer
        time.sleep(1)
    raise Failed(f"{what}: not within {seconds:g} s\n{compose('ps', '--all')}\n{compose('logs', '--tail', '40')}")


def engine_up() -> str | None:
    """Sees to an engine. Returns the script that has to stop it again, if this started one."""
    if subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        return None
    script = os.environ.get("AGENTRL_DOCKER_ENGINE", "")
    if not script:
        raise Failed("no Docker engine answers (docker info); start one")
    sh(script, "up", quiet=False)
    return script


def image_sizes() -> None:
    for image, limit in LIMITS_MB.items():
        size = int(sh("docker", "image", "inspect", "-f", "{{.Size}}", image)) / 1e6
        FIGURES["image_mb"][image] = round(size)
        print(f"image {image}: {size:.0f} MB (limit {limit})")
        if size > limit:
            raise Failed(f"image {image} has {size:.0f} MB; the limit is {limit}")


def hardened() -> None:
    """No root, nothing to write to, no torch where none is needed, no secret in image or environment."""
    token = compose("exec", "-T", "sokoban", "cat", "/secrets/token")
    for service in ("sokoban", "python-tool"):
        if (user := compose("exec", "-T", service, "id", "-u")) == "0":
            raise Failed(f"{service} runs as root ({user})")
        write = "open('/opt/venv/x', 'w')"
        done = subprocess.run(
            ["docker", "compose", "-p", PROJECT, "exec", "-T", service, "python", "-c", write],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0 or "Read-only file system" not in done.stderr:
            raise Failed(f"{service}: its root file system can be written to: {done.stderr}")
        container = compose("ps", "-q", service)
        if token in sh("docker", "inspect", container) or token in sh("docker", "logs", container):
            raise Failed(f"{service}: its token stands in its settings or its log")
    probe = "import importlib.util as u, sys; sys.exit(bool(u.find_spec('torch')))"
    compose("exec", "-T", "sokoban", "python", "-c", probe)
    ask = (
        "import urllib.request as u, urllib.error as e\n"
        "try: u.urlopen('http://sokoban:8000/v1/envs')\n"
        "except e.HTTPError as error: print(error.code)"
    )
    if (code := compose("exec", "-T", "lock", "python", "-c", ask)) != "401":
        raise Failed(f"a request without a token was answered with {code or 200}, not 401")


def kill_in_training() -> None:
    """Kills the environment server after the second iteration, in the middle of episodes, and waits until it is healthy
    again."""
    until("two iterations", 900, lambda: iterations() >= 2)
    container = compose("ps", "-q", "sokoban")
    before = sh("docker", "inspect", "-f", "{{.RestartCount}}", container)
    kill = (
        "import os, re, signal, time, urllib.request as u\n"
        "def sessions():\n"
        "    text = u.urlopen('http://127.0.0.1:8000/metrics', timeout=5).read().decode()\n"
        "    return float(re.search(r'^agentrl_sessions (\\S+)', text, re.M)[1])\n"
        "end = time.monotonic() + 120\n"
        "while not sessions() and time.monotonic() < end: time.sleep(0.01)\n"
        "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "    words = open(f'/proc/{pid}/cmdline', 'rb').read().split(b'\\0')\n"
        "    if b'serve' in words and int(pid) not in (1, os.getpid()): os.kill(int(pid), signal.SIGKILL)"
    )
    sh("docker", "exec", container, "python", "-c", kill, check=False)
    until("the restart", 60, lambda: sh("docker", "inspect", "-f", "{{.RestartCount}}", container) != before)
    FIGURES["killed_after_iteration"] = iterations()
    state = ("docker", "inspect", "-f", "{{.State.Health.Status}}", container)
    until("the server's health", 90, lambda: sh(*state) == "healthy")


def in_volume(code: str) -> str:
    """Runs Python beside the run's files."""
    return compose("run", "--rm", "-T", "--no-deps", "--entrypoint", "python", "eval", "-c", code)


def iterations() -> int:
    """Returns how many iterations the trainer has done, from its log of metrics."""
    container = compose("ps", "-q", "--all", "trainer")
    if container and sh("docker", "inspect", "-f", "{{.State.Running}}", container) != "true":
        raise Failed(f"the trainer has stopped\n{sh('docker', 'logs', '--tail', '40', container)}")
    count = (
        "import os; p = '/runs/demo/train/metrics.jsonl'; print(sum(1 for _ in open(p)) if os.path.exists(p) else 0)"
    )
    return int(sh("docker", "exec", container, "python", "-c", count, check=False) or 0)


def artefacts() -> None:
    """Checks what the run left in the volume, and that the kill was met and mended."""
    found = json.loads(
        in_volume(
            "import json, os\n"
            "run = '/runs/demo'\n"
            "lines = [json.loads(line) for line in open(run + '/train/metrics.jsonl')]\n"
            "print(json.dumps({'summary': json.load(open(run + '/summary.json')), 'files': sorted(os.listdir(run)),\n"
            "    'model': sorted(os.listdir(run + '/train/model')), 'iterations': len(lines),\n"
            "    **{key: sum(m.get(key, 0) for m in lines) for key in ('episodes_retried', 'episodes_failed')}}))"
        )
    )
    summary = found.pop("summary")
    FIGURES["run"] = found | {name: summary[name]["value"] for name in ("base_success", "final_success")}
    print(json.dumps(FIGURES["run"]))
    for name in ("summary.json", "learning_curve.png", "report.html", "train", "base"):
        if name not in found["files"]:
            raise Failed(f"the volume has no {name}: {found['files']}")
    if "model.safetensors" not in found["model"]:
        raise Failed(f"no trained model in the volume: {found['model']}")
    if not found["episodes_retried"]:
        raise Failed("the server was killed, and no episode was played again")


def tested(keep: bool) -> None:
    with step("build"):
        compose("build")
    image_sizes()
    try:
        with step("up, all healthy"):
            compose("up", "-d", "--wait", *ENVS)
        hardened()
        with step("train, with a server killed in between"):
            compose("up", "-d", "trainer", "tensorboard")
            kill_in_training()
            trainer = compose("ps", "-q", "--all", "trainer")
            code = sh("docker", "wait", trainer)
            if code != "0":
                raise Failed(f"the trainer ended with {code}\n{sh('docker', 'logs', '--tail', '60', trainer)}")
        artefacts()
        with step("evaluation service"):
            arguments = ("http://sokoban:8000/Sokoban-v0", "--model", "/runs/demo/train/model", "--episodes", "16")
            print(compose("run", "--rm", "-T", "eval", *arguments, "--max-turns", "20", "--history", "window(0)"))
    finally:
        if not keep:
            with step("down"):
                compose("down", "-v", "--remove-orphans", "-t", "5", check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="leave containers and volumes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write times and sizes there")
    options = parser.parse_args()
    os.environ.update(SHORT | {key: os.environ[key] for key in SHORT if key in os.environ})
    script = None
    try:
        with step("engine"):
            script = engine_up()
        tested(options.keep)
    except Failed as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        if script and not options.keep:
            sh(script, "stop", quiet=False, check=False)
    if options.json:
        options.json.write_text(json.dumps(FIGURES, indent=2) + "\n")
    print("PASSED")
    return 0


if __name__ == "__main__":
    sys.exit(main())
