"""The client of vLLM's server against one that plays vLLM: restarts, hangs, keys, names, weights. Without vLLM."""

from __future__ import annotations

import asyncio
import json
import logging
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_vllm import policy_with, until

from agentrl.config import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.config.schema import LoRAConfig
from agentrl.errors import PolicyFailure, UserError
from agentrl.models.load import files_fingerprint, load_model
from agentrl.models.lora import add_adapter
from agentrl.rollout import Collector, Task
from policies.vllm import local, remote
from policies.vllm import policy as vllm_policy
from policies.vllm.connection import served_card
from policies.vllm.engine import ADAPTER_NAME, Settings, WeightsError
from policies.vllm.policy import VLLMPolicy
from policies.vllm.remote import RemoteEngine
from policies.vllm.transfer import Exchange

GENERATE = "/inference/v1/generate"
KEY = "sk-of-this-test-alone"
PARAMS: Mapping[str, Any] = {"max_tokens": 1}


@dataclass
class Acts:
    """How a server behaves, and what it was asked."""

    cards: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "base", "root": "/m", "max_model_len": 4096}])
    key: str = ""
    """That it wants."""
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Paths that are answered with this status and text."""
    shut: dict[str, threading.Event] = field(default_factory=dict)
    """Paths that are answered once the event is set; ``greeting`` is the first request for a token."""
    hangs: tuple[str, ...] = ()
    """Paths that are never answered."""
    logprob: float = -1.0
    fingerprint: str = ""
    label: str = "default"
    calls: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Of requests for tokens."""
    running: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    """Answers like vLLM."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._act(None)

    def do_POST(self) -> None:
        self._act(json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null"))

    def _act(self, body: Any) -> None:
        acts: Acts = self.server.acts  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        acts.calls.append(path)
        greeting = path == GENERATE and body["sampling_params"].get("top_k") == 1
        if path in acts.hangs and not greeting:
            acts.over.wait()
            return
        if gate := acts.shut.get("greeting" if greeting else path):
            assert gate.wait(20.0)
        guarded = path.startswith(("/v1", "/inference"))
        if guarded and acts.key and self.headers.get("Authorization") != f"Bearer {acts.key}":
            return self._say({"error": "Unauthorized"}, 401)
        if path in acts.answers and not greeting:
            status, text = acts.answers[path]
            return self._say({"error": text}, status)
        if path == "/pause":
            acts.running.clear()
        elif path == "/resume":
            acts.running.set()
        elif path == "/update_weight_version":
            acts.label = body["new_version"]
        elif path == "/finish_weight_update":
            acts.label = body["weight_version"]
        elif path == GENERATE:
            return self._generate(acts, body, greeting)
        found = {
            "/version": {"version": "0.32.0"},
            "/v1/models": {"data": acts.cards},
            "/get_world_size": {"world_size": 1},
        }
        found["/collective_rpc"] = {"results": [acts.fingerprint]}
        self._say(found.get(path, {}))

    def _generate(self, acts: Acts, body: Any, greeting: bool) -> None:
        ids = body["token_ids"]
        if greeting:
            return self._say({"choices": [{"logprobs": {"content": [{"logprob": 0.0}]}}]})
        while not acts.running.wait(0.01):
            if acts.over.is_set():
                return
        acts.bodies.append(body)
        span = {"version": acts.label, "start": 0, "end": 1}
        scored = [None, *({str(token): {"logprob": acts.logprob}} for token in ids[1:])]
        choice = {"token_ids": [7], "logprobs": {"content": [{"logprob": acts.logprob}]}, "weight_versions": [span]}
        self._say({"choices": [choice], "prompt_logprobs": scored})

    def _say(self, answer: Any, status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class OverUnix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    acts: Acts
    daemon_threads, request_queue_size = True, 64


class OverTCP(socketserver.ThreadingMixIn, socketserver.TCPServer):
    acts: Acts
    daemon_threads, request_queue_size = True, 64


class Fake:
    """One server that plays vLLM; to `RemoteEngine` a `ServerProcess`."""

    def __init__(self, acts: Acts, socket: Path | None = None) -> None:
        self.acts, self.socket, self.alive = acts, socket, True
        acts.running.set()
        self._server: Any = OverTCP(("127.0.0.1", 0), Handler) if socket is None else OverUnix(str(socket), Handler)
        self._server.acts = acts
        self._gate = threading.Lock()
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def kill(self) -> None:
        with self._gate:
            if self.alive:
                self.alive = False
                self.acts.over.set()
                self._server.shutdown()
                self._server.server_close()

    stop = kill

    def describe_end(self) -> str:
        return "no log"


class Fleet:
    """Starts servers, each with the next of `acts`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made, self.acts = folder, [], []  # type: ignore[var-annotated]
        self._number = count()

    def start(self) -> Any:
        number = next(self._number)
        self.made.append(Fake(self.acts[number], self.folder / f"s{number}"))
        return self.made[-1]

    def engine(self, *acts: Acts, **options: Any) -> RemoteEngine:
        self.acts = list(acts)
        return RemoteEngine(start=self.start, **options)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    yield made
    for server in made.made:
        server.kill()


@pytest.fixture
def at_url() -> Iterator[Callable[[Acts], Fake]]:
    made: list[Fake] = []

    def start(acts: Acts) -> Fake:
        made.append(Fake(acts))
        return made[-1]

    yield start
    for server in made:
        server.kill()


# --- a server that takes another's place ---


@pytest.mark.parametrize("moment", ["greeting", "/v1/load_lora_adapter"])
def test_a_new_server_answers_nobody_before_it_has_the_weights(fleet: Fleet, moment: str) -> None:
    gate = threading.Event()
    new = Acts(shut={moment: gate})
    engine = fleet.engine(Acts(), new)
    engine.load_adapter("/some/adapter", 5)

    async def play() -> list[Any]:
        fleet.made[0].kill()
        first = asyncio.create_task(engine.generate([1], PARAMS))
        reached = GENERATE if moment == "greeting" else moment
        await asyncio.to_thread(until, lambda: reached in new.calls)
        second = asyncio.create_task(engine.generate([2], PARAMS))
        done, _ = await asyncio.wait([second], timeout=0.3)  # long enough for an answer, were one given
        assert not done
        assert new.label == "default", "it must not say that it has what it has not"
        gate.set()
        return [await first, await second]

    answers = asyncio.run(play())
    assert [answer.versions for answer in answers] == [((5, 1),), ((5, 1),)]
    assert [body["model"] for body in new.bodies] == [ADAPTER_NAME] * 2
    assert engine.restarts == 1


def test_a_new_server_is_named_after_its_weights_when_they_are_in(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "exchange").mkdir()
    new = Acts(fingerprint="same")
    engine = fleet.engine(Acts(fingerprint="same"), new, exchange=Exchange(0, tmp_path / "exchange"))
    engine.load_weights({"w": torch.zeros(1)}, 4)
    fleet.made[0].kill()
    assert asyncio.run(engine.generate([1], PARAMS)).versions == ((4, 1),)
    assert "/update_weight_version" not in new.calls
    assert new.calls.index("/update_weights") < new.calls.index("/finish_weight_update")


def test_a_new_server_with_other_weights_is_not_used_and_not_tried_again(fleet: Fleet, tmp_path: Path) -> None:
    engine = fleet.engine(Acts(fingerprint="a"), Acts(fingerprint="b"), exchange=Exchange(0, tmp_path))
    engine.load_weights({"w": torch.zeros(1)}, 4)
    fleet.made[0].kill()
    for _ in range(2):
        with pytest.raises(WeightsError, match="holds weights b, the old one held a"):
            asyncio.run(engine.generate([1], PARAMS))
    assert len(fleet.made) == 2


def play(policy: VLLMPolicy, **rollout: Any) -> Any:
    limits = RolloutConfig(**{"max_new_tokens": 4, "max_context_tokens": 900, **rollout})
    with Collector(policy, EnvConfig(id="Lock-v0", max_turns=2), limits, OutcomeConfig()) as collector:
        return collector.collect([Task(i, str(i), 2) for i in range(2)])


def test_a_canary_that_changed_stops_the_run_with_both_numbers(fleet: Fleet, model_dir: Path) -> None:
    engine = fleet.engine(Acts(), Acts(logprob=-1.5), Acts(logprob=-1.5))
    policy = policy_with(engine, model_dir)  # type: ignore[arg-type]
    assert policy.canary([1, 2, 3]) == [-1.0, -1.0]
    fleet.made[0].kill()
    with pytest.raises(WeightsError, match=r"token 1 of a fixed prompt -1\.5000 now, -1\.0000 before \(limit 0\.001"):
        play(policy)
    assert engine.restarts == 1, "no other server would mend it"


def test_a_server_closed_while_it_starts_is_ended(fleet: Fleet) -> None:
    gate = threading.Event()
    engine = fleet.engine(Acts(), Acts(shut={"greeting": gate}))

    async def leave() -> None:
        fleet.made[0].kill()
        call = asyncio.create_task(engine.generate([1], PARAMS))
        await asyncio.to_thread(until, lambda: len(fleet.made) == 2 and GENERATE in fleet.made[1].acts.calls)
        engine._closed = True  # as `close` has it before it ends the server that it sees: the old one
        gate.set()
        with pytest.raises(PolicyFailure):
            await call

    asyncio.run(leave())
    assert not fleet.made[1].alive


# --- a server that hangs, and callers who do not wait for `answer_s` ---


@pytest.mark.parametrize("hangs", [(GENERATE, "/health"), (GENERATE,)], ids=["server", "engine"])
def test_a_server_that_hangs_is_replaced_where_the_callers_deadline_is_shorter(
    fleet: Fleet, model_dir: Path, monkeypatch: pytest.MonkeyPatch, hangs: tuple[str, ...]
) -> None:
    monkeypatch.setattr(remote, "_HEALTH_S", 0.3)
    engine = fleet.engine(Acts(hangs=hangs), Acts(), answer_s=300.0 if "/health" in hangs else 1.0)
    collected = play(policy_with(engine, model_dir), policy_deadline_s=0.5, retries=6)  # type: ignore[arg-type]
    assert engine.restarts == 1
    assert collected.retried >= 4
    assert not collected.failed
    assert len(collected.trajectories) == 4
    assert all(turn.action_logprobs == [-1.0] for one in collected.trajectories for turn in one.turns)
    assert fleet.made[0].acts.bodies == [], "nothing that is scored came from the one that hung"


def test_a_call_that_is_given_up_costs_a_healthy_server_nothing(fleet: Fleet) -> None:
    slow = threading.Event()
    engine = fleet.engine(Acts(shut={GENERATE: slow}))
    acts = fleet.made[0].acts

    async def give_up() -> None:
        call = asyncio.create_task(engine.generate([1], PARAMS))
        await asyncio.to_thread(until, lambda: acts.calls.count(GENERATE) == 2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.to_thread(until, lambda: "/health" in acts.calls)
        slow.set()
        assert (await engine.generate([1], PARAMS)).ids == [7]

    asyncio.run(give_up())
    assert (engine.restarts, engine.server) == (0, fleet.made[0])


def test_a_caller_who_does_not_wait_for_a_start_is_told(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    engine = fleet.engine(Acts(), Acts(shut={"greeting": gate}))

    async def give_up() -> None:
        fleet.made[0].kill()
        call = asyncio.create_task(engine.generate([1], PARAMS))
        await asyncio.to_thread(until, lambda: len(fleet.made) == 2)
        call.cancel()
        with caplog.at_level(logging.WARNING, "agentrl.vllm"), pytest.raises(asyncio.CancelledError):
            await call
        gate.set()
        assert (await engine.generate([1], PARAMS)).ids == [7], "the start went on"

    asyncio.run(give_up())
    assert "rollout.policy_deadline_s should leave it the time of a start" in caplog.text
    assert engine.restarts == 1


# --- a server at a URL: keys, names, addresses ---


def test_a_server_with_a_key_gets_it_and_one_that_is_missing_or_wrong_is_told(
    at_url: Callable[[Acts], Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    acts = Acts(key=KEY)
    url = at_url(acts).url
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"wants a key, and VLLM_API_KEY is not set \(HTTP 401\)"):
        RemoteEngine(url=url)
    monkeypatch.setenv("OTHER", KEY + "-not")
    with pytest.raises(UserError, match="refuses the key in OTHER") as refused:
        RemoteEngine(url=url, key_env="OTHER")
    assert KEY not in str(refused.value)
    monkeypatch.setenv("OTHER", KEY)
    engine = RemoteEngine(url=url, key_env="OTHER")
    assert asyncio.run(engine.generate([1], PARAMS)).ids == [7]
    acts.answers[GENERATE] = 500, f"what is {KEY}?"
    with pytest.raises(PolicyFailure, match=r"what is \*\*\*") as failed:
        asyncio.run(engine.generate([1], PARAMS))
    assert KEY not in str(failed.value)
    assert KEY not in repr(vars(engine)) + repr(vars(engine.connection))


def test_our_own_server_is_not_given_somebody_elses_key(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    policy = VLLMPolicy.__new__(VLLMPolicy)
    policy.settings, policy.lora_rank = Settings(str(model_dir)), 0
    assert KEY not in policy._environment().values()


@pytest.mark.parametrize("url", ["http://127.0.0.1:80a0", "127.0.0.1:8000", "http://me:secret@host"])
def test_an_address_that_is_none_is_a_users_error(url: str) -> None:
    with pytest.raises(UserError) as error:
        RemoteEngine(url=url)
    assert "secret" not in str(error.value)


CARDS: list[dict[str, Any]] = [
    {"id": "tuned", "root": "/a/tuned", "parent": "base"},
    {"id": "base", "root": "/models/Small-1B/", "max_model_len": 64},
]


@pytest.mark.parametrize(
    ("model", "served_model", "found"),
    [
        (None, None, "base"),
        ("base", None, "base"),
        ("/elsewhere/Small-1B", None, "base"),
        ("org/Small-1B", None, "base"),
        ("/models/Small-1B", None, "base"),
        ("/runs/other", "base", "base"),
        ("/runs/other", "tuned", "tuned"),
    ],
)
def test_the_model_is_found_among_those_served(model: str | None, served_model: str | None, found: str) -> None:
    assert served_card(CARDS, model, served_model, "it")["id"] == found


@pytest.mark.parametrize(("model", "served_model"), [("/runs/other", None), ("", None), ("/runs/Small-1B", "small")])
def test_another_model_is_refused_with_both_names(model: str, served_model: str | None) -> None:
    wanted = served_model or model
    with pytest.raises(UserError, match=rf"'base' \(from '/models/Small-1B/'\).* wanted is '{wanted}'.*served_model="):
        served_card(CARDS, model, served_model, "it")


def test_a_policy_at_a_url_checks_the_model_it_is_given(model_dir: Path, at_url: Callable[[Acts], Fake]) -> None:
    url = at_url(Acts(cards=[{"id": "other", "root": "/x/other", "max_model_len": 64}])).url
    for model in (str(model_dir), load_model(model_dir)):
        with pytest.raises(UserError, match=rf"serves 'other' \(from '/x/other'\), .*{model_dir.name}"):
            VLLMPolicy(model, tokenizer=tokenizer(model_dir), url=url)
    policy = VLLMPolicy(str(model_dir), url=url, served_model="other")
    assert policy.engine.max_model_len == 64
    asyncio.run(policy.aclose())
    with pytest.raises(UserError, match="served_model='other' is the model's name at a url"):
        VLLMPolicy(str(model_dir), served_model="other")


def tokenizer(model_dir: Path) -> Any:
    from agentrl.models.load import load_tokenizer

    return load_tokenizer(model_dir)


def serving(model_dir: Path, **acts: Any) -> Acts:
    return Acts(cards=[{"id": "served", "root": str(model_dir), "max_model_len": 64}], **acts)


@pytest.mark.parametrize("status", [404, 500], ids=["no route", "no method"])
def test_a_server_for_evaluation_alone_is_told_by_its_names(
    model_dir: Path, at_url: Callable[[Acts], Fake], status: int
) -> None:
    policy = VLLMPolicy(str(model_dir), url=at_url(serving(model_dir, answers={"/collective_rpc": (status, "no")})).url)
    told = policy.fingerprint()
    assert told == f"not read: 'served' from {str(model_dir)!r}, as the server says"
    asyncio.run(policy.aclose())


def test_weights_that_somebody_else_sent_there_are_told_by_their_fingerprint(
    model_dir: Path, at_url: Callable[[Acts], Fake]
) -> None:
    acts = serving(model_dir)
    policy = VLLMPolicy(str(model_dir), url=at_url(acts).url)
    assert policy.fingerprint() not in ("", files_fingerprint(model_dir)), "the directory here is not what it serves"
    acts.fingerprint = "theirs"
    assert policy.fingerprint() == "theirs"
    asyncio.run(policy.aclose())


# --- weights ---


@pytest.mark.parametrize("fails", ["/start_weight_update", "/update_weights", "/reset_prefix_cache"])
@pytest.mark.parametrize("status", [400, 500])
def test_a_server_at_a_url_goes_on_where_its_new_weights_fail(
    at_url: Callable[[Acts], Fake], tmp_path: Path, fails: str, status: int
) -> None:
    acts = Acts(answers={fails: (status, "no")})
    engine = RemoteEngine(url=at_url(acts).url, exchange=Exchange(0, tmp_path))
    with pytest.raises((UserError, PolicyFailure), match=fails):
        engine.load_weights({"w": torch.zeros(1)}, 1)
    assert "/pause" in acts.calls
    assert acts.running.is_set()
    engine.close()


def test_an_adapter_that_is_refused_leaves_our_server_running(fleet: Fleet) -> None:
    engine = fleet.engine(Acts(answers={"/v1/load_lora_adapter": (400, "no such folder")}))
    with pytest.raises(UserError, match="no such folder"):
        engine.load_adapter("/nowhere", 1)
    assert asyncio.run(engine.generate([1], PARAMS)).ids == [7]


def test_adapters_reach_a_server_at_a_url_through_the_exchange(
    model_dir: Path, at_url: Callable[[Acts], Fake], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    url = at_url(serving(model_dir, answers={"/collective_rpc": (404, "no")})).url
    model = add_adapter(load_model(model_dir), LoRAConfig(rank=2), str(model_dir))
    options: dict[str, Any] = {"url": url, "lora_rank": 2, "served_model": "served"}
    with pytest.raises(UserError, match="give exchange=DIR"):
        VLLMPolicy(model, tokenizer=tokenizer(model_dir), **options)
    policy = VLLMPolicy(model, tokenizer=tokenizer(model_dir), exchange=str(tmp_path), **options)
    policy.load_lora(model, 1)
    assert policy.fingerprint().startswith("not read: 'served'"), "an adapter alone tells nothing of what is under it"
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("adapter-1-"), "the one before is gone"
    assert (folder / "adapter_model.safetensors").is_file()
    beside = tmp_path / "beside"
    beside.mkdir()
    assert folder.stat().st_mode == beside.stat().st_mode, "as open as any other folder there"
    beside.rmdir()
    asyncio.run(policy.aclose())
    assert list(tmp_path.iterdir()) == []


# --- from GPU to GPU ---


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Versions that were sent by what stands in for `policies.vllm.gpu`, which needs vLLM and a GPU."""
    versions: list[int] = []

    class Sender:
        def __init__(self, kind: str, post: Callable[..., Any], workers: int, weights: Mapping[str, Any]) -> None:
            self.post = post

        def send(self, weights: Mapping[str, Any], version: int) -> None:
            self.post("/finish_weight_update", {"weight_version": str(version)})
            versions.append(version)

        def close(self) -> None:
            pass

    module: Any = ModuleType("policies.vllm.gpu")
    module.Sender = Sender
    monkeypatch.setitem(sys.modules, "policies.vllm.gpu", module)
    return versions


def test_weights_sent_between_gpus_that_died_with_their_server_are_asked_for_again(
    fleet: Fleet, model_dir: Path, sent: list[int]
) -> None:
    engine = fleet.engine(Acts(), Acts(), transfer="nccl")
    engine.load_weights({"w": torch.zeros(1)}, 3)
    assert asyncio.run(engine.generate([1], PARAMS)).versions == ((3, 1),)
    fleet.made[0].kill()
    with pytest.raises(WeightsError, match=r"(?s)weights of version 3, which transfer=nccl sends once.*resume the run"):
        play(policy_with(engine, model_dir))  # type: ignore[arg-type]
    assert len(fleet.made) == 1, "no server is started in vain"
    engine.load_weights({"w": torch.zeros(1)}, 4)
    assert asyncio.run(engine.generate([1], PARAMS)).versions == ((4, 1),)
    assert sent == [3, 4]


def test_weights_sent_between_gpus_need_no_folder(at_url: Callable[[Acts], Fake], sent: list[int]) -> None:
    acts = Acts(fingerprint="of these")
    engine = RemoteEngine(url=at_url(acts).url, transfer="nccl")
    engine.load_weights({"w": torch.zeros(1)}, 3)
    assert engine.fingerprint() == "of these"
    engine.close()


def test_sending_between_gpus_without_vllm_here_is_refused_at_the_start(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_policy, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"transfer='nccl' sends from this process .* take transfer=file"):
        VLLMPolicy(str(model_dir), transfer="nccl", python="/another/python")
    with pytest.raises(UserError, match="mode=local hands weights over in this process"):
        VLLMPolicy(str(model_dir), transfer="ipc", mode="local")


# --- in this process ---


def test_threads_are_those_of_the_engine_in_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    class Engine:
        class model_config:
            max_model_len = 8

        def set_weight_version(self, version: str) -> None:
            pass

        def has_unfinished_requests(self) -> bool:
            return False

    def start(settings: Settings) -> Engine:
        found.append(torch.get_num_threads())
        return Engine()

    monkeypatch.setattr(local, "check_installed", lambda: None)
    monkeypatch.setattr(local, "_start", start)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        engine = local.LocalEngine(Settings("m", threads=2))
        found.append(engine._call(torch.get_num_threads))
        engine.close()
        assert found == [2, 2]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
