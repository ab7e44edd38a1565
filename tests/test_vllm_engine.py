"""The vLLM policy on vLLM itself, in this process and behind its server: ``make vllm-test``. Nothing is mocked."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXTS
from helpers import contexts, perturbed
from test_vllm import gone, until

from agentrl.batch import build_batch, score
from agentrl.config import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.config.schema import LoRAConfig
from agentrl.errors import AgentRLError, PolicyFailure, UserError
from agentrl.models.init import init_model
from agentrl.models.load import fingerprint, load_model, load_tokenizer, save_model
from agentrl.models.lora import add_adapter
from agentrl.policy import PolicyRequest, Sampling
from agentrl.rollout import Collector, Task, run
from agentrl.train.engine import sync_engine
from policies.transformers.sampler import truncate
from policies.vllm import VLLMPolicy

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make vllm-test"),
]

CLOSE = 1e-4
"""Nats, float32."""
SMALL: dict[str, Any] = {"threads": 1, "kv_cache_gib": 0.25, "max_num_seqs": 32}
MARK = f"agentrl-test-{uuid.uuid4().hex}"
"""In the environment of every process that is started here."""
RANK = 8
PLAIN = Sampling()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with tied embeddings and heads that vLLM has kernels for; neither flat nor certain."""
    path = tmp_path_factory.mktemp("vllm") / "base"
    init_model(path, TEXTS, hidden=128, layers=2, heads=4)
    model = load_model(path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    save_model(model, load_tokenizer(path), path)
    return path


@pytest.fixture(scope="module")
def trained(base: Path) -> Any:
    return load_model(base, train=True)


@pytest.fixture(scope="module", params=["local", "server"])
def engine(request: pytest.FixtureRequest, base: Path, trained: Any) -> Iterator[VLLMPolicy]:
    """One engine of each kind for all tests, which leave it as it likes: tests take `policy`."""
    os.environ["AGENTRL_TEST_MARK"] = MARK
    options = {"mode": "local"} if request.param == "local" else {"mode": "server", "lora_rank": RANK, "restarts": 9}
    policy = VLLMPolicy(trained, tokenizer=load_tokenizer(base), **SMALL, **options)
    yield policy
    run(policy.aclose())
    if request.param == "server":
        until(lambda: not marked(), 30.0)


@pytest.fixture
def policy(engine: VLLMPolicy, trained: Any) -> VLLMPolicy:
    """The engine with the weights of `trained`, as version 1."""
    sync_engine(engine, trained, 1)
    return engine


@pytest.fixture
def server(policy: VLLMPolicy) -> VLLMPolicy:
    if not hasattr(policy.engine, "server"):
        pytest.skip("of the server only")
    return policy


@pytest.fixture
def local(policy: VLLMPolicy) -> VLLMPolicy:
    if hasattr(policy.engine, "server"):
        pytest.skip("of the engine in this process only")
    return policy


def marked() -> list[int]:
    """Processes other than this one that were started here."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            inside = MARK.encode() in (folder / "environ").read_bytes()
        except OSError:
            continue
        if inside and int(folder.name) != os.getpid() and not gone(int(folder.name)):
            found.append(int(folder.name))
    return found


def requests_of(n: int = 12, seed: int = 0, **sampling: Any) -> list[PolicyRequest]:
    random = np.random.default_rng(seed)
    given = Sampling(**{"max_new_tokens": 12, **sampling})
    return [
        PolicyRequest(
            f"episode-{i}",
            0,
            "",
            (),
            context_ids=random.integers(5, 300, random.integers(1, 200)).tolist(),
            seed=1000 * seed + i,
            sampling=given,
        )
        for i in range(n)
    ]


def logits_of(model: Any, context: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """(len(ids), V) logits from which `ids` were drawn after `context`."""
    with torch.no_grad():
        return model(torch.tensor([[*context, *ids]])).logits[0, len(context) - 1 : -1]


def logp_of(model: Any, context: Sequence[int], ids: Sequence[int], sampling: Sampling = PLAIN) -> torch.Tensor:
    """(len(ids),) log-probs under the distribution that `sampling` makes of the model's."""
    logp = torch.log_softmax(logits_of(model, context, ids) / sampling.temperature, -1)
    top_k, top_p = torch.full((len(ids),), sampling.top_k), torch.full((len(ids),), sampling.top_p)
    if sampling.top_k or sampling.top_p < 1:
        logp = truncate(logp, top_k, top_p)
    return logp.gather(-1, torch.tensor(ids)[:, None])[:, 0]


def off_by(model: Any, requests: Sequence[PolicyRequest], actions: Sequence[Any]) -> float:
    """The largest difference of recorded log-probs from those of `model`."""
    return max(
        float((logp_of(model, q.context_ids or (), a.ids, q.sampling) - torch.tensor(a.logprobs)).abs().max())
        for q, a in zip(requests, actions, strict=True)
    )


def mismatch(model: Any, trajectories: Sequence[Any]) -> float:
    """The largest difference of recorded log-probs from the trainer's own."""
    batch = build_batch(trajectories)
    with torch.no_grad():
        return float((score(model, batch, budget=10**6).logprob - batch.behaviour).abs().max())


def act(policy: VLLMPolicy, requests: Sequence[PolicyRequest]) -> list[Any]:
    return run(policy.act(requests))


# --- what is sampled, and what is said about it ---


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.8}, {"temperature": 1.5, "top_k": 30, "top_p": 0.9}],
    ids=str,
)
def test_log_probs_are_those_of_the_distribution_sampled_from(
    policy: VLLMPolicy, trained: Any, sampling: dict[str, Any]
) -> None:
    requests = requests_of(**sampling)
    actions = act(policy, requests)
    assert all(1 <= len(action.ids) <= 12 for action in actions)
    assert off_by(trained, requests, actions) < CLOSE


def test_greedy_answers_are_the_models_own(policy: VLLMPolicy, trained: Any) -> None:
    requests = requests_of(temperature=0.0)
    for request, action in zip(requests, act(policy, requests), strict=True):
        best = logits_of(trained, request.context_ids or (), action.ids).argmax(-1)
        assert action.ids == best.tolist()
        assert action.logprobs == [0.0] * len(action.ids)


def test_the_same_seed_gives_the_same_action_in_any_company(policy: VLLMPolicy) -> None:
    requests = requests_of()
    together = act(policy, requests)
    alone = [act(policy, [request])[0] for request in requests[:3]]
    assert [action.ids for action in alone] == [action.ids for action in together[:3]]
    others = act(policy, requests_of(seed=1))
    assert [action.ids for action in others] != [action.ids for action in together]


def test_an_action_ends_at_the_codecs_stop_tokens_and_keeps_them(policy: VLLMPolicy) -> None:
    actions = act(policy, requests_of(40, max_new_tokens=60))
    stops = policy.chat.stop_ids
    ended = [action for action in actions if action.finish == "stop"]
    assert ended
    assert all(action.ids[-1] in stops for action in ended)
    assert all(not stops & set(action.ids[:-1]) for action in actions)
    assert all(len(action.ids) == 60 for action in actions if action.finish == "length")


def test_trajectories_of_both_engines_have_the_same_log_probs(policy: VLLMPolicy, base: Path, trained: Any) -> None:
    """One set sampled by each; the trainer scores both, and vLLM scores what transformers sampled."""
    from agentrl.policy import load_policy

    theirs = load_policy("transformers", model=trained, tokenizer=load_tokenizer(base))
    rollout = RolloutConfig(max_new_tokens=8, max_context_tokens=900)
    played = {}
    for name, player in (("vllm", policy), ("transformers", theirs)):
        with Collector(player, EnvConfig(id="Sokoban-v0", max_turns=6), rollout, OutcomeConfig()) as collector:
            played[name] = collector.collect([Task(i, str(i), 2) for i in range(4)]).trajectories
        assert mismatch(trained, played[name]) < CLOSE
    run(theirs.aclose())
    for trajectory in played["transformers"]:
        turn, context = trajectory.turns[-1], contexts(trajectory)[-1]
        scored = policy.engine.score([*context, *turn.action_ids])[len(context) - 1 :]
        assert np.abs(np.subtract(scored, turn.action_logprobs)).max() < CLOSE


def test_a_cancelled_call_leaves_the_engine_idle(policy: VLLMPolicy) -> None:
    async def cancel() -> None:
        (request,) = requests_of(1, max_new_tokens=2000)
        call = asyncio.ensure_future(policy.act([request]))
        await policy.act(requests_of(1, seed=1, max_new_tokens=1))  # the engine has begun
        policy.release(request.episode)
        with pytest.raises(asyncio.CancelledError):
            await call

    run(cancel())
    until(lambda: unfinished(policy) == 0)


def unfinished(policy: VLLMPolicy) -> int:
    if hasattr(policy.engine, "server"):
        text = policy.engine.connection.client.get("/metrics").text
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting{")
        return sum(int(float(line.split()[-1])) for line in text.splitlines() if line.startswith(names))
    return policy.engine._call(lambda: policy.engine._llm.get_num_unfinished_requests())


# --- weights ---


def test_new_weights_are_used_at_once_and_named(policy: VLLMPolicy, trained: Any) -> None:
    requests = requests_of()
    before = act(policy, requests)  # fills the prefix cache with the old weights' keys and values
    new = perturbed(trained, 0.3)
    assert sync_engine(policy, new, 5) < CLOSE  # type: ignore[operator]
    assert policy.fingerprint() == fingerprint(new)
    after = act(policy, requests)
    assert off_by(new, requests, after) < CLOSE
    assert [action.ids for action in before] != [action.ids for action in after]
    assert {action.version for action in before} == {1}
    assert {action.version for action in after} == {5}


def test_a_request_under_way_goes_on_with_the_new_weights_alone(policy: VLLMPolicy, trained: Any) -> None:
    new = perturbed(trained, 0.3)
    (request,) = requests_of(1, max_new_tokens=700)
    policy_stops, policy.chat.stop_ids = policy.chat.stop_ids, frozenset()

    async def play() -> Any:
        call = asyncio.ensure_future(policy.act([request]))
        await policy.act(requests_of(1, seed=1, max_new_tokens=10))  # some tokens of the call's are there
        await asyncio.to_thread(policy.load_weights, new.state_dict(), 2)
        return (await call)[0]

    try:
        action = run(play())
    finally:
        policy.chat.stop_ids = policy_stops
    (old_version, old), (new_version, rest) = action.versions
    assert (old_version, new_version, old + rest) == (1, 2, 700)
    assert action.version == 1
    context = [*(request.context_ids or ())]
    first = logp_of(trained, context, action.ids[:old]) - torch.tensor(action.logprobs[:old])
    second = logp_of(new, context + action.ids[:old], action.ids[old:]) - torch.tensor(action.logprobs[old:])
    assert float(first.abs().max()) < CLOSE
    assert float(second.abs().max()) < CLOSE


def test_the_canary_catches_a_tied_head_that_was_not_packed_again(
    local: VLLMPolicy, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = perturbed(trained, 0.3)
    with monkeypatch.context() as patch:
        patch.setattr("policies.vllm.worker.repack_heads", lambda model: None)
        with pytest.raises(AgentRLError, match=r"-?\d+\.\d{4} in the engine, -?\d+\.\d{4} in the trainer"):
            sync_engine(local, new, 2)
        assert local.fingerprint() == fingerprint(new), "the weights did arrive"
    assert sync_engine(local, new, 3) < CLOSE  # type: ignore[operator]


def test_weights_from_outside_the_exchange_are_refused(server: VLLMPolicy, trained: Any) -> None:
    engine: Any = server.engine
    engine._post("/start_weight_update")
    with pytest.raises(PolicyFailure, match=r"failed at /update_weights"):
        engine._post("/update_weights", {"update_info": {"file": "../elsewhere", "names": []}})
    assert sync_engine(server, trained, 6) < CLOSE  # type: ignore[operator]


# --- adapters ---


def adapted(base: Path, seed: int) -> Any:
    """The base under an adapter that changes what it says."""
    model = add_adapter(load_model(base, train=False), LoRAConfig(rank=4), str(base))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def check_adapters(policy: VLLMPolicy, base: Path) -> None:
    requests = requests_of()
    said = []
    for version, seed in ((7, 0), (8, 1)):
        model = adapted(base, seed)
        assert sync_engine(policy, model, version) < 1e-3  # type: ignore[operator]
        actions = act(policy, requests)  # the same contexts: no cached prefix of the adapter before may be used
        assert {action.version for action in actions} == {version}
        assert off_by(model, requests, actions) < 1e-3
        said.append([action.ids for action in actions])
    assert said[0] != said[1]


def test_adapters_are_swapped_in_place(server: VLLMPolicy, base: Path, trained: Any) -> None:
    check_adapters(server, base)
    assert sync_engine(server, trained, 9) < CLOSE  # type: ignore[operator]
    requests = requests_of()
    assert off_by(trained, requests, act(server, requests)) < CLOSE, "no adapter stays over new weights"


def test_an_engine_started_without_room_for_adapters_says_so(local: VLLMPolicy, base: Path) -> None:
    with pytest.raises(UserError, match="start it with lora_rank=R"):
        local.load_lora(adapted(base, 0), 2)


# --- a server that fails ---


def api_server(policy: VLLMPolicy) -> int:
    """Process id of the server itself, behind its guard."""
    (child,) = Path(f"/proc/{policy.engine.server.pid}/task/{policy.engine.server.pid}/children").read_text().split()  # type: ignore[union-attr]
    return int(child)


def test_a_server_killed_in_mid_rollout_is_replaced_and_no_episode_is_lost(server: VLLMPolicy, trained: Any) -> None:
    new = perturbed(trained, 0.1)
    sync_engine(server, new, 4)
    before, killed = set(marked()), []

    def kill_once(trajectory: Any) -> None:
        if not killed:
            killed.append(api_server(server))
            os.kill(killed[0], signal.SIGKILL)

    restarts = server.engine.restarts  # type: ignore[union-attr]
    rollout = RolloutConfig(max_new_tokens=8, max_context_tokens=900, retries=2)
    env = EnvConfig(id="Sokoban-v0", max_turns=4)
    with Collector(server, env, rollout, OutcomeConfig(), on_episode=kill_once) as collector:
        collected = collector.collect([Task(i, str(i), 2) for i in range(12)])
    assert len(collected.trajectories) == 24
    assert not collected.failed
    assert collected.retried > 0
    assert server.engine.restarts == restarts + 1  # type: ignore[union-attr]
    assert mismatch(new, collected.trajectories) < CLOSE
    assert {turn.policy_version for t in collected.trajectories for turn in t.turns} == {4}
    until(lambda: all(map(gone, before)))


def test_a_server_that_stops_answering_is_replaced_after_its_deadline(
    server: VLLMPolicy, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = server.engine
    os.killpg(engine.server.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "answer_s", 1.0)
        with pytest.raises(PolicyFailure, match="no answer within answer_s=1 s"):
            act(server, requests_of(2))
    requests = requests_of()
    assert off_by(trained, requests, act(server, requests)) < CLOSE


def test_a_server_that_may_not_be_started_again_fails_its_episodes(
    server: VLLMPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = server.engine
    os.kill(api_server(server), signal.SIGKILL)
    until(lambda: not engine.server.alive)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "restarts_left", 0)
        with pytest.raises(PolicyFailure, match=r"(?s)ended; the last lines of its log.*killed by signal 9"):
            act(server, requests_of(1))
    assert act(server, requests_of(1))[0].ids
