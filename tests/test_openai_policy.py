"""The openai policy, against a real HTTP server on the loopback: both endpoints, ids, faults and what they cost."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from typer.testing import CliRunner

import agentrl
from agentrl.cli import app
from agentrl.config import EnvConfig, RolloutConfig
from agentrl.errors import DeadlineExceeded, PolicyFailure, UnknownNameError, UserError
from agentrl.http import retry_after
from agentrl.models.init import init_model
from agentrl.policy import PolicyRequest, Sampling, load_policy
from agentrl.types import ImagePart, Message, StopReason, TextPart
from policies.openai import OpenAIPolicy

KEY = "sk-very-secret"


class Server:
    """Answers POSTs with `reply(body, number)`: (status, JSON or bytes, headers), "drop" or "hang"."""

    models = ("small", "large-instruct")

    def __init__(self):
        self.bodies, self.headers, self.paths, self.connections = [], [], [], set()
        self.alive = self.most = 0
        self.reply = said("up")
        self.end = threading.Event()
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(handler):
                listed = {"data": [{"id": name} for name in self.models]}
                send(handler, *((404, {}) if self.models is None else (200, listed)))

            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.bodies.append(body)
                    self.headers.append(dict(handler.headers))
                    self.paths.append(handler.path)
                    self.connections.add(handler.client_address)
                    number = len(self.bodies)
                    self.alive += 1
                    self.most = max(self.most, self.alive)
                try:
                    answer = self.reply(body, number)
                finally:
                    with lock:
                        self.alive -= 1
                if answer == "drop":
                    handler.connection.shutdown(socket.SHUT_RDWR)
                    handler.close_connection = True
                elif answer == "hang":
                    self.end.wait(30)
                else:
                    send(handler, *answer)

            def log_message(handler, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(server, *_):
                """A client that no longer waits is part of the test."""

        def send(handler, status, content, headers=None):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            handler.send_response(status)
            for name, value in (headers or {}).items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self):
        self.end.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def completion(text="up", **choice):
    return {
        "choices": [
            {"message": {"role": "assistant", "content": text}, "text": text, "finish_reason": "stop"} | choice
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20},
    }


def said(text="up", **choice):
    return lambda body, number: (200, completion(text, **choice))


def script(*answers):
    """Answers in turn; the last one again and again."""
    return lambda body, number: answers[min(number, len(answers)) - 1]


GOOD = (200, completion())


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    made = Server()
    yield made
    made.close()


@pytest.fixture
def policy(server):
    """Makes policies for the server, and closes them."""
    made = []

    def make(**options):
        made.append(OpenAIPolicy(**{"url": server.url, "model": "small", "backoff_s": 0.0} | options))
        return made[-1]

    yield make
    for one in made:
        asyncio.run(one.aclose())


WARM = Sampling(0.5, 0.9, 0, 32)


def request(text="a board", *, seed=7, sampling=WARM, **more):
    messages = [Message(role="system", content="Push."), Message(role="user", content=text)]
    return PolicyRequest("e", 0, text, messages, seed=seed, sampling=sampling, **more)


def act(policy, *requests):
    return asyncio.run(policy.act(requests or [request()]))


# --- what is sent and what comes back ---


def test_a_chat_carries_the_conversation_the_sampling_and_the_seed(server, policy):
    [action] = act(policy(extra={"reasoning_effort": "low"}, limit_field="max_completion_tokens"))
    assert (action.text, action.ids, action.logprobs, action.finish) == ("up", None, None, "stop")
    assert server.paths == ["/v1/chat/completions"]
    assert server.bodies == [
        {
            "model": "small",
            "messages": [{"role": "system", "content": "Push."}, {"role": "user", "content": "a board"}],
            "temperature": 0.5,
            "top_p": 0.9,
            "max_completion_tokens": 32,
            "seed": 7,
            "reasoning_effort": "low",
        }
    ]


def test_completions_write_the_conversation_out(server, policy):
    server.reply = said(" up\n", finish_reason="length")
    [action] = act(policy(endpoint="completions", seeded=False))
    assert (action.text, action.finish) == ("up", "length")
    assert server.paths == ["/v1/completions"]
    assert server.bodies[0]["prompt"] == "Push.\n\nUser: a board\n\nAssistant:"
    assert server.bodies[0]["stop"] == ["\nUser:"]
    assert "seed" not in server.bodies[0]


def test_pictures_travel_as_data_urls(server, policy):
    picture = ImagePart(path="images/a.png")
    picture._source = b"png"
    content = [TextPart(text="look: "), picture]
    asyncio.run(policy().act([PolicyRequest("e", 0, content, [Message(role="user", content=content)])]))
    assert server.bodies[0]["messages"][0]["content"] == [
        {"type": "text", "text": "look: "},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,cG5n"}},
    ]


def test_without_a_name_the_only_model_is_taken(server, policy):
    server.models = ("alone",)
    one = policy(model=None)
    act(one)
    assert (server.bodies[0]["model"], one.name) == ("alone", "alone")
    server.models = ("a", "b")
    with pytest.raises(UserError, match=r"serves 2 models; name one \(--model NAME\), e.g. a, b"):
        act(policy(model=None))


@pytest.mark.parametrize(
    ("message", "finish", "text"),
    [
        ({"content": None, "reasoning_content": "hmm"}, "length", ""),
        ({"content": None, "refusal": "I will not."}, "stop", "I will not."),
        ({"content": ""}, "stop", ""),
    ],
)
def test_answers_without_content_are_still_answers(server, policy, message, finish, text):
    server.reply = script((200, {"choices": [{"message": message, "finish_reason": finish}]}))
    assert act(policy())[0].text == text


# --- many at once ---


def test_requests_run_side_by_side_up_to_the_limit_over_kept_connections(server, policy):
    together = threading.Barrier(3, timeout=20)

    def reply(body, number):
        together.wait()  # breaks unless three are in flight at once
        return 200, completion(body["messages"][1]["content"])

    server.reply = reply
    one = policy(concurrency=3)
    for _ in range(2):  # each call on an event loop of its own, as a partner's are
        assert [a.text for a in act(one, *(request(f"say {i}") for i in range(6)))] == [f"say {i}" for i in range(6)]
    assert server.most == 3
    assert len(server.connections) == 3


def test_an_abandoned_call_frees_its_place(server, policy):
    server.reply = lambda body, number: "hang" if number == 1 else GOOD
    one = policy(concurrency=1)

    async def give_up():
        task = asyncio.create_task(one.act([request()]))
        while not server.bodies:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await one.act([request()])

    assert asyncio.run(give_up())[0].text == "up"


# --- faults ---

FAULTS = {
    "rate limit": (429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"}),
    "server fault": (500, b""),
    "overloaded": (503, {"error": "busy"}),
    "no json": (200, b"<html>"),
    "no object": (200, []),
    "no choices": (200, {"choices": []}),
    "an error that says 200": (200, {"error": {"message": "oops"}}),
    "no message": (200, {"choices": [{"finish_reason": "stop"}]}),
    "no text": (200, completion(None)),
    "a number for text": (200, completion(7)),
    "usage that counts words": (200, completion() | {"usage": {"prompt_tokens": "many"}}),
    "empty": (200, b""),
    "disconnect": "drop",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_heal_is_tried_again_and_if_it_stays_it_is_a_failure_of_the_policy(server, policy, fault):
    server.reply = script(FAULTS[fault], FAULTS[fault], GOOD)
    one = policy(retries=2)
    assert act(one)[0].text == "up"
    assert (one.usage.calls, one.usage.attempts) == (1, 3)
    server.reply = script(FAULTS[fault])
    with pytest.raises(PolicyFailure, match=r"'small' at http.*no usable answer in 3 attempts; the last: \S"):
        act(one)
    assert len(server.bodies) == 6


def test_retry_after_is_waited_for(server, policy):
    server.reply = script((429, {}, {"Retry-After": "0.3"}), GOOD)
    started = time.perf_counter()
    act(policy())
    assert time.perf_counter() - started >= 0.3


def test_retry_after_beyond_the_deadline_ends_the_request_at_once(server, policy):
    server.reply = script((429, {"error": {"message": "quota of the day"}}, {"Retry-After": "3600"}))
    with pytest.raises(DeadlineExceeded, match=r"after the deadline of 20 s; the last: HTTP 429: quota of the day"):
        act(policy(deadline_s=20))
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("said", "seconds"), [("7", 7), ("0.5", 0.5), ("", 0), ("soon", 0), ("-1", 0), ("nan", 0), ("inf", 0)]
)
def test_retry_after_in_seconds(said, seconds):
    assert retry_after(httpx.Response(429, headers={"Retry-After": said})) == seconds


def test_retry_after_as_a_date():
    headers = {"Retry-After": formatdate(time.time() + 100, usegmt=True)}
    assert 90 < retry_after(httpx.Response(429, headers=headers)) <= 100


def test_a_server_that_hangs_is_given_up_at_the_deadline(server, policy):
    server.reply = script("hang")
    with pytest.raises(DeadlineExceeded, match=r"'small' at .*: no answer within 0.2 s"):
        act(policy(deadline_s=0.2))
    one = policy(timeout_s=0.1, retries=1)
    with pytest.raises(PolicyFailure, match=r"2 attempts; the last: ReadTimeout: silent for 0.1 s"):
        act(one)


def test_a_server_that_dies_is_a_failure_and_not_a_wrong_address(server, policy):
    one = policy(retries=1)
    act(one)
    server.reply = script("drop")  # the connection that is kept
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(PolicyFailure, match="2 attempts; the last: ConnectError"):
        act(one)


def test_failed_episodes_are_played_again_and_never_scored(server):
    server.reply = script("drop", GOOD)
    one = OpenAIPolicy(server.url, "small", retries=0, backoff_s=0.0, concurrency=1)
    env, rollout = EnvConfig(id="Lock-v0", max_turns=2), RolloutConfig(retries=1)
    played = agentrl.collect(one, env, episodes=2, rollout=rollout)
    assert (played.retried, played.failed) == (1, [])
    down = len(server.bodies) + 1
    server.reply = lambda body, number: (500, b"") if number == down else GOOD
    played = agentrl.collect(one, env, episodes=4, rollout=RolloutConfig(retries=0))
    assert [t.stop_reason for t in played.failed] == [StopReason.POLICY_ERROR]
    assert len(played.trajectories) == 3
    agentrl.rollout.run(one.aclose())


# --- what the user must mend ---


def test_a_wrong_address_is_named_at_once(server, policy):
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    with pytest.raises(UserError, match=rf"nobody answers at http://127.0.0.1:{port}/v1 \(ConnectError.*is the server"):
        act(policy(url=f"http://127.0.0.1:{port}/v1"))
    server.models = None
    server.reply = script((404, b""))
    with pytest.raises(UserError, match=r"no OpenAI-compatible server at .*HTTP 404.*ends in /v1"):
        act(policy())
    server.reply = script((308, b"", {"Location": "https://elsewhere/v1"}))
    with pytest.raises(UserError, match=r"sends on to 'https://elsewhere/v1'"):
        act(policy())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"url": "localhost:8000"}, "an address such as http"),
        ({"url": "http://me:pass@host/v1"}, "put the key into OPENAI_API_KEY"),
        ({"url": "https://host/v1?api-key=pass@"}, "url='https://host/v1' goes on with a query.*OPENAI_API_KEY"),
        ({"url": "ftp://host/v1?api-key=pass@"}, "an address such as http"),
        ({"url": "https://host/v1#pass@"}, "query or a fragment"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"deadline_s": 0}, "deadline_s=0"),
        ({"endpoint": "responses"}, "chat or completions"),
        ({"usd_per_million": [1]}, "two prices"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(UserError, match=words) as caught:
        OpenAIPolicy(**options)
    assert "pass@" not in str(caught.value)


def test_a_wrong_model_name_is_answered_with_those_that_are_served(server, policy):
    server.reply = script((404, {"error": {"message": "no such model"}}))
    with pytest.raises(
        UnknownNameError, match=r"no model 'large-instuct'; did you mean 'large-instruct'\? \(.*/models"
    ):
        act(policy(model="large-instuct"))
    with pytest.raises(UserError, match=r"has no /chat/completions.*try endpoint=completions"):
        act(policy(model="small"))
    server.models = tuple(f"m-{i}" for i in range(400))
    with pytest.raises(UnknownNameError) as caught:
        act(policy(model="qqqq"))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_names_its_variable_and_is_never_shown(server, policy, monkeypatch, caplog, status):
    server.reply = script((status, {"error": {"message": f"bad key {KEY}"}}))
    with caplog.at_level(0):
        with pytest.raises(UserError, match="wants a key, and OPENAI_API_KEY is not set"):
            act(policy())
        monkeypatch.setenv("MY_KEY", KEY + "\n")
        one = policy(key_env="MY_KEY")
        with pytest.raises(UserError, match=rf"refuses the key in MY_KEY \(HTTP {status}\)") as caught:
            act(one)
    assert len(server.bodies) == 2, "no retry can change it"
    assert server.headers[1]["Authorization"] == f"Bearer {KEY}"
    for text in (str(caught.value), caplog.text, repr(vars(one)), repr(vars(one.server))):
        assert "very-secret" not in text


def test_a_key_quoted_in_a_fault_is_masked(server, policy, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.reply = script((500, {"error": {"message": f"with {KEY}"}}))
    with pytest.raises(PolicyFailure, match=r"with \*\*\*"):
        act(policy(retries=0))


@pytest.mark.parametrize(
    "quote",
    [
        lambda words: (500, {"error": {"message": words}}),
        lambda words: (500, {"error": words}),
        lambda words: (500, words.encode()),
        lambda words: (308, b"", {"Location": words}),
        lambda words: (200, completion() | {"choices": [], "more": words}),
        lambda words: (200, completion(message=words)),
        lambda words: (200, [words]),
        lambda words: (200, completion() | {"usage": {"prompt_tokens": words}}),
        lambda words: (200, completion() | {"usage": {"prompt_tokens": [words]}}),
    ],
)
def test_no_part_of_a_key_is_shown_wherever_a_long_quotation_is_cut(server, policy, monkeypatch, quote):
    key = "sk-" + "".join(f"{i:03}" for i in range(100, 116))
    monkeypatch.setenv("OPENAI_API_KEY", key)
    for before in range(80, 300, len(key) - 6):  # wherever the cut is, it falls into the key once
        server.reply = script(quote("x" * before + key))
        with pytest.raises((PolicyFailure, UserError)) as caught:
            act(policy(retries=0))
        assert not any(key[i : i + 6] in str(caught.value) for i in range(len(key) - 5))


def test_requests_that_are_refused_say_why(server, policy):
    server.reply = script((400, {"error": {"message": "top_k is not supported"}}))
    with pytest.raises(UserError, match="refuses the request; the last: HTTP 400: top_k is not supported"):
        act(policy())
    server.reply = script((429, {"error": {"message": "pay first", "code": "insufficient_quota"}}))
    with pytest.raises(UserError, match="pay first"):
        act(policy())
    server.reply = script((400, {"error": {"message": "This model's maximum context length is 8 tokens."}}))
    with pytest.raises(PolicyFailure, match=r"longer than the model's context.*window\(k\)"):
        act(policy())


def test_training_is_refused():
    with pytest.raises(UserError, match=r"cannot be trained: .* no way to send weights.*model.engine=transformers"):
        load_policy("openai", model=object(), tokenizer=object())


# --- what it costs ---


def test_tokens_and_cost_are_counted_with_failed_attempts(server, policy):
    server.reply = script((200, completion(None)), GOOD, GOOD)
    one = policy(usd_per_million=(1.0, 10.0))
    act(one, request())
    act(one, request())
    assert (one.usage.calls, one.usage.attempts) == (2, 3)
    assert (one.usage.prompt_tokens, one.usage.completion_tokens) == (300, 60)
    assert one.usage.usd == pytest.approx(300e-6 + 600e-6)
    assert one.usage.seconds > 0


def test_the_command_line_evaluates_and_shows_the_cost(server, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    arguments = ["eval", "Lock-v0", "--policy", "openai", "--model", "small", "--episodes", "2", "--max-turns", "2"]
    arguments += ["--policy-arg", f"url={server.url}", "--policy-arg", "usd_per_million=[1, 10]"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "found.json"), "--temperature", "0.5"])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["usage"]["calls"], found["temperature"]) == (len(server.bodies), 0.5)
    assert found["usage"]["completion_tokens"] > 0
    assert found["usage"]["usd"] > 0
    assert "prompt tokens" in done.output
    assert "$0.00" in done.output
    assert KEY not in done.output


def test_it_plays_the_partner_of_a_social_environment(server):
    server.reply = said("Hello, I can offer two.")
    kwargs = {"judge_url": "http://127.0.0.1:1/v1", "partner": "openai", "seat": 1, "turns": 4}
    options = {"url": server.url, "model": "small"}
    env = agentrl.make("Social-v0", **kwargs, partner_options=options)
    seen, _ = env.reset(seed=0)
    assert "Hello, I can offer two." in seen
    assert server.bodies[0]["messages"][0]["role"] == "system"


# --- token in, token out ---


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    init_model(path, ["up down left right a board"] * 3, hidden=16, layers=1, heads=2)
    return str(path)


PLAIN = Sampling(1.0, 1.0, 0, 8)


def sampler(codec, echo=True):
    """A server that samples ids which no text encodes to, with the end of the turn, each with its log-prob."""

    def reply(body, number):
        ids = [300, 301, codec.end_id]
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-0.5, -1.5, -0.25]}}
        return 200, completion("ignored", **choice, **({"prompt_token_ids": body["prompt"]} if echo else {}))

    return reply


def test_ids_go_in_and_ids_with_log_probs_come_out(server, policy, tokenizer):
    one = policy(tokenizer=tokenizer)
    server.reply = sampler(one.chat)
    [action] = act(one, request(context_ids=[5, 6, 7], sampling=PLAIN))
    assert (action.ids, action.logprobs, action.finish) == ([300, 301, one.chat.end_id], [-0.5, -1.5, -0.25], "stop")
    assert action.text == one.chat.decode([300, 301])
    body = server.bodies[0]
    assert (server.paths[0], body["prompt"], body["return_token_ids"]) == ("/v1/completions", [5, 6, 7], True)
    assert body["stop_token_ids"] == sorted(one.chat.stop_ids)
    # What a server would otherwise take from the model's generation_config.json.
    assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)


def test_whole_episodes_hold_the_ids_that_were_sampled(server, policy, tokenizer):
    one = policy(tokenizer=tokenizer)
    server.reply = sampler(one.chat, echo=False)
    played = agentrl.collect(one, EnvConfig(id="Lock-v0", max_turns=3), episodes=2, rollout=RolloutConfig())
    asked = {json.dumps(body["prompt"]) for body in server.bodies}
    for trajectory in played.trajectories:
        row = []
        for turn in trajectory.turns:
            assert turn.action_ids == [300, 301, one.chat.end_id]
            assert turn.action_logprobs == [-0.5, -1.5, -0.25]
            row = [*([] if turn.new_row else row), *turn.prompt_ids]
            assert json.dumps(row) in asked
            row += turn.action_ids
    asyncio.run(one.aclose())


def test_greedy_tokens_had_to_come(server, policy, tokenizer):
    one = policy(tokenizer=tokenizer)
    server.reply = sampler(one.chat)
    [action] = act(one, request(context_ids=[5], sampling=Sampling(0.0, 1.0, 0, 8)))
    assert action.logprobs == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.0, 0.9), Sampling(1.0, 1.0, 20)])
def test_log_probs_of_another_distribution_are_refused(server, policy, tokenizer, sampling):
    with pytest.raises(UserError, match=r"not those that the tokens were drawn with.*processed_logprobs"):
        act(policy(tokenizer=tokenizer), request(context_ids=[5], sampling=sampling))
    assert server.bodies == []
    one = policy(tokenizer=tokenizer, processed_logprobs=True)
    server.reply = sampler(one.chat)
    act(one, request(context_ids=[5], sampling=sampling))
    body = server.bodies[0]
    assert (body["temperature"], body["top_p"], body["top_k"]) == (
        sampling.temperature,
        sampling.top_p,
        sampling.top_k or -1,
    )


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({}, r"returns no token ids \(choices.*and no log-probs \(choices"),
        ({"token_ids": [1]}, r"returns no log-probs \(choices\[0\].logprobs.token_logprobs\).*fit for training"),
        ({"logprobs": {"token_logprobs": [-1.0]}}, r"returns no token ids \(choices\[0\].token_ids\).*vLLM"),
        (
            {"token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}, "prompt_token_ids": [2, 5]},
            r"read other ids than were sent \(2 for 1\)",
        ),
    ],
)
def test_a_server_whose_episodes_could_not_be_trained_on_is_refused(server, policy, tokenizer, choice, words):
    server.reply = said("up", **choice)
    with pytest.raises(UserError, match=words):
        act(policy(tokenizer=tokenizer), request(context_ids=[5], sampling=PLAIN))
    assert len(server.bodies) == 1


@pytest.mark.parametrize("logprobs", [[-1.0], [-1.0, None]])
def test_ids_without_their_log_probs_are_no_answer(server, policy, tokenizer, logprobs):
    server.reply = said("up", token_ids=[1, 2], logprobs={"token_logprobs": logprobs})
    with pytest.raises(PolicyFailure, match="log-probs"):
        act(policy(tokenizer=tokenizer, retries=0), request(context_ids=[5], sampling=PLAIN))


def test_text_requests_to_a_policy_with_a_tokenizer_are_refused(policy, tokenizer):
    with pytest.raises(UserError, match="leave tokenizer out"):
        act(policy(tokenizer=tokenizer))
