"""Batches of steps: how they are divided, and that what is read and written by hand is what the libraries say."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from served import served
from toys import parrot

import agentrl
from agentrl.config import RolloutConfig
from agentrl.policy import as_policy
from agentrl.remote import client as wire
from agentrl.remote import codec, lanes
from agentrl.remote.client import STEP
from agentrl.remote.env import Fleet
from agentrl.remote.errors import RateLimited, TooLarge, Unreachable
from agentrl.remote.protocol import Stepped
from agentrl.serve import answers

TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # half surrogate pairs too: agents write them
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """Numbers of steps in the requests that are sent, in order."""
    sent: list[int] = []
    original = lanes.Lane._send

    async def send(self: lanes.Lane, kind: wire.Kind, batch: list[Any]) -> None:
        if kind is STEP:
            sent.append(len(batch))
        await original(self, kind, batch)

    monkeypatch.setattr(lanes.Lane, "_send", send)
    return sent


# Division


@pytest.mark.parametrize(("whole", "wanted"), [(False, [20] * 8), (True, [40] * 4)])
def test_many_steps_travel_in_two_halves_or_together(sizes, whole, wanted):
    async def play(url: str) -> None:
        fleet = Fleet(f"{url}/Echo-v0", turns=4)
        fleet.whole = whole
        envs = [fleet.episode() for _ in range(40)]
        await asyncio.gather(*(env.areset(seed=seed) for seed, env in enumerate(envs)))
        await asyncio.gather(*map(steps, envs))
        await fleet.settle()

    async def steps(env: Any) -> None:
        for _ in range(4):
            await env.astep("red")

    with served(["Echo-v0"]) as url:
        asyncio.run(play(url))
        assert sizes == wanted


@pytest.mark.parametrize(("batched", "largest"), [(True, 300), (False, lanes.BATCH)])
def test_steps_come_back_together_for_a_policy_that_answers_at_once(sizes, batched, largest):
    plain = parrot(1.0)

    async def waits(request: Any) -> str:
        return str(plain.function(request))

    policy = plain if batched else as_policy(waits)
    with served(["Echo-v0"]) as url:
        rollout = RolloutConfig(concurrency=300)
        collected = agentrl.collect(policy, f"{url}/Echo-v0", episodes=300, rollout=rollout)
    assert collected.counts == {"terminated": 300}
    assert max(sizes) <= largest
    if batched:
        assert sizes == [300, 300]
    else:
        assert len(sizes) >= 4


# Messages


@given(JSON)
def test_json_is_read_as_the_standard_library_reads_it(value):
    text = json.dumps(value)
    for body in (text.encode(), json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")):
        wanted = repr(json.loads(body))
        assert repr(codec.decode(body)) == wanted
        assert repr(answers.decode(body)) == wanted


@given(TEXT, st.integers(1, 10**9))
def test_a_step_is_written_as_any_other_message(action, step):
    item = {"session": "a_session-0", "step": step, "action": action}
    assert codec.encode_step(item) == codec.encode(item)


GOOD = {"step": 3, "observation": "on", "reward": 0.5, "terminated": False, "truncated": True, "info": {"a": [1]}}


@pytest.mark.parametrize("field", [None, *GOOD, "more"])
@pytest.mark.parametrize(
    "value", [None, 1, True, "1", "no", 2.5, float("nan"), [], {}, [{"type": "text", "text": "a"}]]
)
def test_an_answer_checked_by_hand_is_what_the_model_says(field, value):
    answer: Any = GOOD if field is None else {**GOOD, field: value}
    assert_as_the_model(answer)
    assert_as_the_model({key: item for key, item in answer.items() if key != field})
    assert_as_the_model(value)


def assert_as_the_model(answer: Any) -> None:
    try:
        model = TypeAdapter(Stepped).validate_python(answer)
    except ValidationError:
        with pytest.raises(Unreachable, match="outside the protocol"):
            codec.stepped("http://a:1", answer)
        return
    assert repr(codec.stepped("http://a:1", answer)) == repr(tuple(getattr(model, name) for name in GOOD))


# Refusals of a real server


def test_a_request_that_is_too_large_is_a_typed_error():
    with served(["Echo-v0"], max_body=2048) as url:
        env = agentrl.make(f"{url}/Echo-v0")
        env.reset(seed=0)
        with pytest.raises(TooLarge, match="at most 2,048 bytes") as told:
            env.step("x" * 3000)
        assert told.value.status == 413
        env.step("red")  # the session stands
        env.close()


def test_too_many_requests_are_a_typed_error_that_says_when_to_come_back():
    now = [0.0]
    with served(["Echo-v0"], rate=2.0, clock=lambda: now[0]) as url:
        env = agentrl.make(f"{url}/Echo-v0", retry_s=0)  # the first request
        env.reset(seed=0)
        with pytest.raises(RateLimited, match="too many requests") as told:
            env.step("red")
        assert (told.value.status, told.value.retry_after_s) == (429, 0.5)
        now[0] = 10.0
        env.step("red")
        env.close()
