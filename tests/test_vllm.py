"""The vLLM policy without vLLM: settings, requests and answers, processes and folders that must not outlive us."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import perturbed

from agentrl.errors import AgentRLError, PolicyFailure, UserError
from agentrl.models.chat import ChatCodec
from agentrl.models.load import Fingerprint, fingerprint, load_model, load_tokenizer
from agentrl.policy import PolicyRequest, Sampling
from agentrl.train.engine import check_canary
from policies.vllm import engine as vllm_engine
from policies.vllm import guard
from policies.vllm.engine import Generated, Settings, check_python, check_version, how_to_mend, sampling_params
from policies.vllm.policy import VLLMPolicy, _check_heads
from policies.vllm.remote import RemoteEngine
from policies.vllm.server import ServerProcess
from policies.vllm.transfer import Exchange


def until(true: Callable[[], Any], limit_s: float = 20.0) -> None:
    """Waits for something that another process does."""
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# --- settings ---


def test_the_servers_flags_say_what_the_engines_arguments_say() -> None:
    settings = Settings("m", max_model_len=64, kv_cache_gib=0.5, lora_rank=4, extra={"block_size": 32, "seed": 3})
    arguments, flags = settings.engine_args(), settings.flags()
    assert arguments["kv_cache_memory_bytes"] == 2**29
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["max_lora_rank"] == 8, "vLLM takes 1, 8, 16, ..."
    assert (arguments["block_size"], arguments["seed"]) == (32, 3)
    for name in ("enforce_eager", "enable_prefix_caching", "enable_lora"):
        assert arguments[name] is True
        assert f"--{name.replace('_', '-')}" in flags
    assert flags[flags.index("--max-model-len") + 1] == "64"
    assert json.loads(flags[flags.index("--weight-transfer-config") + 1]) == {"backend": "agentrl-file"}
    assert "--no-enable-chunked-prefill" in flags
    assert "--no-enforce-eager" in Settings("m", eager=False).flags()


def test_sampling_is_translated_whole_and_the_models_own_defaults_stay_out() -> None:
    params = sampling_params(Sampling(0.7, 0.9, 5, 12), seed=2**63 + 5, stop_ids=frozenset({9, 4}))
    assert params == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 12,
        "seed": 5,
        "stop_token_ids": [4, 9],
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_a_temperature_that_vllm_would_change_is_refused(temperature: float) -> None:
    with pytest.raises(UserError, match=r"0\.01 to 2"):
        sampling_params(Sampling(temperature), 0, frozenset())


@pytest.mark.parametrize("found", ["0.31.9", "0.33.0", "1.0"])
def test_another_version_is_refused_with_the_range(found: str) -> None:
    with pytest.raises(UserError, match=r"not supported; the range is vllm>=0.32,<0.33"):
        check_version(found, "here")
    check_version("0.32.7+cpu", "here")


def test_a_missing_vllm_is_refused_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(vllm_engine, "version", missing)
    with pytest.raises(UserError, match="not installed in this environment: pip install"):
        check_python(sys.executable, os.environ)
    with pytest.raises(UserError, match="cannot be run"):
        check_python("/no/such/python", os.environ)


@pytest.mark.parametrize(
    "line",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate",
        "ValueError: No available memory for the cache blocks.",
        "Available memory on node 0 (1/2 GiB) on kv cache allocation is less than requested memory for kv (9 GiB).",
        "agentrl: the server process was killed by signal 9",
    ],
)
def test_too_little_memory_is_told_with_the_options_that_lower_it(line: str) -> None:
    assert all(name in how_to_mend(line) for name in ("kv_cache_gib", "max_model_len", "max_num_seqs"))
    assert how_to_mend("KeyError: 3") == ""


def test_heads_without_a_kernel_on_a_cpu_are_refused_before_the_start(model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"have 8 dimensions; on a CPU vLLM has kernels for 32, 64.*--preset small"):
        _check_heads(str(model_dir))


@pytest.mark.parametrize(
    ("options", "says"),
    [({}, "needs a model"), ({"mode": "thread"}, "server or local"), ({"mode": "local", "url": "http://h"}, "url")],
)
def test_options_that_make_no_sense_are_refused(model_dir: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        VLLMPolicy(*([str(model_dir)] if options else []), **options)


def test_nobody_at_the_address_is_a_users_error() -> None:
    with pytest.raises(UserError, match=r"no vLLM server at http://127.0.0.1:9 .*url=http://HOST:PORT"):
        RemoteEngine(url="http://127.0.0.1:9")


# --- requests and answers, of an engine that says what a test wants ---


class Told:
    """An `Engine` whose answers are given; without any it waits until it is cancelled."""

    max_model_len = 40

    def __init__(self, *answers: Generated | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []
        self.cancelled = 0
        self.weights = ""

    def fingerprint(self) -> str:
        return self.weights

    async def generate(self, ids: Sequence[int], params: Mapping[str, Any]) -> Generated:
        self.asked.append({"ids": list(ids), **params})
        if not self.answers:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def policy_with(engine: Told, model_dir: Path) -> VLLMPolicy:
    policy = VLLMPolicy.__new__(VLLMPolicy)
    policy.engine, policy.chat, policy.version = engine, ChatCodec(load_tokenizer(model_dir)), 3  # type: ignore[assignment]
    policy._live = {}
    return policy


def request(episode: str = "e", ids: list[int] | None = None, **sampling: Any) -> PolicyRequest:
    given = Sampling(**{"max_new_tokens": 4, **sampling})
    return PolicyRequest(episode, 0, "", (), context_ids=[5, 6, 7] if ids is None else ids, seed=11, sampling=given)


def test_before_weights_arrive_those_of_the_directory_are_told_apart(model_dir: Path, tmp_path: Path) -> None:
    """An evaluation must not go on with other weights: it compares their hash."""
    engine = Told()
    policy = policy_with(engine, model_dir)
    policy.settings = Settings(model=str(model_dir), dtype="float32")
    first = policy.fingerprint()
    assert len(first) == 16
    assert policy.fingerprint() == first
    model = load_model(model_dir)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1.0
    model.save_pretrained(tmp_path)
    policy.settings = Settings(model=str(tmp_path), dtype="float32")
    assert policy.fingerprint() not in ("", first)
    engine.weights = "of the engine"
    assert policy.fingerprint() == "of the engine"


def test_an_action_carries_the_versions_of_its_tokens(model_dir: Path) -> None:
    whole = Generated([8, 9], [-1.0, -2.0], ((4, 2),))
    mixed = Generated([8, 9, 10], [-1.0, -2.0, -3.0], ((4, 1), (5, 2)))
    policy = policy_with(Told(whole, mixed), model_dir)
    one, two = asyncio.run(policy.act([request("a"), request("b")]))
    assert (one.ids, one.logprobs, one.version, one.versions) == ([8, 9], [-1.0, -2.0], 4, ())
    assert (two.version, two.versions) == (4, ((4, 1), (5, 2)))
    assert one.finish == "length"


def test_an_action_that_ended_itself_says_so_and_a_greedy_one_is_certain(model_dir: Path) -> None:
    engine = Told()
    policy = policy_with(engine, model_dir)
    end = policy.chat.end_id
    engine.answers = [Generated([8, end], [-1.0, -2.0], ((4, 2),))]
    (action,) = asyncio.run(policy.act([request(temperature=0.0)]))
    assert (action.finish, action.logprobs) == ("stop", [0.0, 0.0])
    assert engine.asked[0]["ids"] == [5, 6, 7]
    assert end in engine.asked[0]["stop_token_ids"]


def test_a_context_beyond_the_engines_length_is_refused_not_cut(model_dir: Path) -> None:
    policy = policy_with(Told(), model_dir)
    with pytest.raises(UserError, match=r"37 tokens with max_new_tokens=4 .* max_model_len=40"):
        asyncio.run(policy.act([request(ids=[5] * 37)]))
    with pytest.raises(PolicyFailure, match="no context ids"):
        asyncio.run(policy.act([request(ids=[])]))


def test_cancelled_calls_and_released_episodes_end_in_the_engine(model_dir: Path) -> None:
    async def play(end: Callable[[asyncio.Task[Any], VLLMPolicy], None]) -> int:
        engine = Told()
        policy = policy_with(engine, model_dir)
        call = asyncio.ensure_future(policy.act([request("a")]))
        while not engine.asked:
            await asyncio.sleep(0)
        end(call, policy)
        with pytest.raises(asyncio.CancelledError):
            await call
        assert not policy._live
        return engine.cancelled

    assert asyncio.run(play(lambda call, policy: bool(call.cancel()))) == 1
    assert asyncio.run(play(lambda call, policy: policy.release("a"))) == 1


def test_one_failure_fails_the_call_and_ends_its_other_requests(model_dir: Path) -> None:
    engine = Told(PolicyFailure("it broke off"))
    with pytest.raises(PolicyFailure, match="broke off"):
        asyncio.run(policy_with(engine, model_dir).act([request("a"), request("b")]))
    assert engine.cancelled == 1


# --- connections ---


class FlakyServer(BaseHTTPRequestHandler):
    """Answers like vLLM; hangs up on as many of the requests for tokens as `drops` says, and may then be dead."""

    drops, dead, asked = 0, False, 0

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.server.kind.dead:  # type: ignore[attr-defined]
            return
        self._say({"/version": {"version": "0.32.0"}}.get(self.path, {"data": [{"id": "m", "max_model_len": 64}]}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.server.kind  # type: ignore[attr-defined]
        kind.asked += 1
        if kind.drops:
            kind.drops -= 1
            return  # without a word: the connection is closed
        token = {"token_ids": [7], "logprobs": {"content": [{"logprob": 0.0}]}, "weight_versions": None}
        self._say({"choices": [token]})

    def _say(self, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize(("drops", "dead", "answered"), [(1, False, True), (2, False, False), (1, True, False)])
def test_a_broken_connection_is_asked_again_where_the_server_is_well(drops: int, dead: bool, answered: bool) -> None:
    kind = type("Server", (FlakyServer,), {})
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.kind = kind
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        engine = RemoteEngine(url=f"http://127.0.0.1:{server.server_port}")
        kind.asked, kind.drops, kind.dead = 0, drops, dead
        if answered:
            assert asyncio.run(engine.generate([1, 2], {})).ids == [7]
        else:
            with pytest.raises(PolicyFailure, match=r"broke off .*disconnected"):
                asyncio.run(engine.generate([1, 2], {}))
        assert kind.asked == (1 if dead else 2), "never a third time"
        engine.close()
    finally:
        server.shutdown()
        server.server_close()


# --- the canary ---


class Canary:
    """A policy that computes with weights of its own."""

    name, version = "vllm", 7

    def __init__(self, model: Any) -> None:
        self.model = model

    def canary(self, ids: Sequence[int]) -> list[float]:
        with torch.no_grad():
            logits = self.model(torch.tensor([list(ids)])).logits[0, :-1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0].tolist()


def test_the_canary_passes_equal_weights_and_shows_both_numbers_of_others(model: Any) -> None:
    off = check_canary(Canary(model), model)  # type: ignore[arg-type]
    assert off is not None
    assert off < 1e-4
    with pytest.raises(
        AgentRLError, match=r"version 7 .* log-prob of token \d+ .* -\d+\.\d{4} in the engine, -\d+\.\d"
    ):
        check_canary(Canary(perturbed(model, 0.1)), model)  # type: ignore[arg-type]


# --- weights on their way ---


def test_weights_travel_in_order_and_tied_ones_once(model: Any) -> None:
    from safetensors import safe_open

    exchange = Exchange(1)
    exchange.write({"old": torch.zeros(1)}, 1)
    weights = model.state_dict()
    file, names = exchange.write(weights, 2)
    assert [path.name for path in exchange.folder.iterdir()] == [file], "the version before is gone"
    assert exchange.folder.stat().st_mode & 0o077 == 0, "nobody else reads or writes there"
    receipt = Fingerprint()
    with safe_open(exchange.folder / file, "pt") as stored:
        for name in names:
            receipt.add(name, stored.get_tensor(name))
    assert receipt.hexdigest() == fingerprint(weights)
    assert "lm_head.weight" in weights
    assert "lm_head.weight" not in names
    exchange.close()
    assert not exchange.folder.exists()


def test_a_given_folder_is_used_and_left(tmp_path: Path) -> None:
    exchange = Exchange(0, tmp_path)
    exchange.write({"w": torch.zeros(1)}, 1)
    exchange.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="is no folder"):
        Exchange(0, tmp_path / "nowhere")


# --- processes ---

CHILDREN = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("loading weights", flush=True)
print("pids", os.getpid(), child.pid, flush=True)
{then}
"""


def started(tmp_path: Path, then: str) -> ServerProcess:
    command = [sys.executable, "-c", CHILDREN.format(then=then)]
    return ServerProcess(command, os.environ, tmp_path / "socket", tmp_path / "log", [])


def pids_of(server: ServerProcess) -> list[int]:
    until(lambda: any(line.startswith("pids") for line in server.tail()))
    line = next(line for line in server.tail() if line.startswith("pids"))
    return [int(word) for word in line.split()[1:]]


def test_a_server_that_dies_while_it_starts_shows_its_last_words_and_leaves_nothing(tmp_path: Path) -> None:
    server = started(tmp_path, "raise MemoryError('a lot')")
    with pytest.raises(
        UserError, match=r"(?s)ended while it was starting; its memory.*kv_cache_gib.*MemoryError: a lot"
    ):
        server.wait_ready(60.0)
    _, child = [int(word) for word in "\n".join(server.tail()).partition("pids ")[2].split()[:2]]
    until(lambda: gone(child))


def test_a_server_that_is_never_ready_is_ended_at_its_limit(tmp_path: Path) -> None:
    server = started(tmp_path, "time.sleep(600)")
    pids = pids_of(server)
    with pytest.raises(UserError, match=r"(?s)not ready within startup_s=0.2 s; the last lines.*loading weights"):
        server.wait_ready(0.2)
    until(lambda: all(map(gone, pids)))
    assert not server.alive


def test_what_a_killed_server_leaves_behind_is_ended(tmp_path: Path) -> None:
    server = started(tmp_path, "time.sleep(600)")
    parent, child = pids_of(server)
    os.kill(parent, signal.SIGKILL)
    until(lambda: not server.alive and gone(child))
    assert "killed by signal 9" in server.tail()[-1]
    server.kill()


def test_stop_ends_the_whole_group_also_where_the_server_will_not_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("policies.vllm.server._PATIENCE_S", 0.2)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    server = started(tmp_path, deaf)
    pids = pids_of(server)
    until(lambda: "deaf" in server.tail())
    server.stop()
    until(lambda: all(map(gone, pids)))


def test_a_killed_parent_takes_server_and_folder_along(tmp_path: Path) -> None:
    folders = [tmp_path / "weights", tmp_path / "model"]
    for folder in folders:
        folder.mkdir()
    code = CHILDREN.format(then="time.sleep(600)")
    command = [sys.executable, guard.__file__, os.pathsep.join(map(str, folders)), sys.executable, "-c", code]
    parent = f"""
import subprocess, time
guard = subprocess.Popen({command!r}, stdin=subprocess.PIPE, start_new_session=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids: list[int] = []
    for line in process.stdout:
        if line.startswith("pids"):
            pids = [int(word) for word in line.split()[1:]]
            break
    process.kill()
    process.wait()
    until(lambda: all(map(gone, pids)) and not any(folder.exists() for folder in folders))
