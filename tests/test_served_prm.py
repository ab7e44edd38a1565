"""A served PRM, against a real HTTP server on the loopback: its protocol and its faults."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers import episodes, trajectory, turn

from agentrl.batch import build_batch
from agentrl.config import PRMConfig
from agentrl.errors import DataError, InfrastructureError, UserError
from agentrl.prm import ServedPRM
from agentrl.types import ImagePart, TextPart


class Server:
    """Answers every request with what `reply(body, number of the request)` says: (status, JSON or bytes)."""

    def __init__(self):
        self.bodies, self.headers = [], []
        self.reply = good
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.bodies.append(body)
                    self.headers.append(dict(handler.headers))
                    number = len(self.bodies)
                status, said = self.reply(body, number)
                said = said if isinstance(said, bytes) else json.dumps(said).encode()
                handler.send_response(status)
                handler.send_header("Content-Length", str(len(said)))
                handler.end_headers()
                handler.wfile.write(said)

            def log_message(handler, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(server, *_):
                """A client that no longer waits is part of the test."""

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def worth(step):
    """A score that depends on what was said alone."""
    return len(step["action"]) % 7 / 10


def good(body, number):
    return 200, {"scores": [[worth(step) for step in t["turns"]] for t in body["trajectories"]]}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("AGENTRL_PRM_TOKEN", raising=False)
    made = Server()
    yield made
    made.close()


def client(url, **options):
    return ServedPRM(url, **{"backoff_s": 0.0, "timeout_s": 30.0} | options)


def spoken(count=5):
    """Trajectories with 0 to count - 1 turns, each of which says something else."""
    return [
        trajectory(f"t{n}", "g", 1.0, [say(f"see {n}.{t}", "x" * (3 * n + t)) for t in range(n)]) for n in range(count)
    ]


def say(observation, action):
    return turn([1], [1], new_row=True).model_copy(update={"observation": observation, "action": action})


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_scores_come_back_in_the_order_of_the_turns_whatever_the_chunks(server, chunk, concurrency):
    made = spoken()
    scores = client(server.url, chunk=chunk, concurrency=concurrency).score(made)
    expected = [worth({"action": step.action}) for t in made for step in t.turns]
    assert scores.tolist() == expected
    assert len(scores) == build_batch(made).index.M
    assert len(server.bodies) == -(-len(made) // chunk)


def test_no_trajectories_need_no_request(server):
    assert client(server.url).score([]).shape == (0,)
    assert server.bodies == []


def test_the_request_holds_texts_and_no_outcome(server):
    """A PRM that is told how it ended would not be judging the turns."""
    seen = [TextPart(text="a "), ImagePart(path="b.png"), TextPart(text="box")]
    client(server.url).score([trajectory("a", "g", 1.0, [say(seen, "up")], instructions="Push.")])
    assert server.bodies == [
        {
            "version": 1,
            "trajectories": [{"id": "a", "instructions": "Push.", "turns": [{"observation": "a box", "action": "up"}]}],
        }
    ]


def test_the_bearer_token_is_sent_where_there_is_one(server, monkeypatch):
    client(server.url).score(spoken(2))
    monkeypatch.setenv("AGENTRL_PRM_TOKEN", "s3cret\n")
    client(server.url).score(spoken(2))
    monkeypatch.setenv("OTHER", "0ther")
    client(server.url, token_env="OTHER").score(spoken(2))
    assert [h.get("Authorization") for h in server.headers] == [None, "Bearer s3cret", "Bearer 0ther"]


def test_a_token_that_no_header_can_hold_is_refused_without_being_shown(monkeypatch):
    monkeypatch.setenv("AGENTRL_PRM_TOKEN", "s3\ncret")
    with pytest.raises(UserError, match=r"\$AGENTRL_PRM_TOKEN") as caught:
        ServedPRM("http://127.0.0.1")
    assert "cret" not in str(caught.value)


# --- faults that may heal ---


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_fails_is_asked_again(server, status):
    server.reply = lambda body, number: good(body, number) if number == 3 else (status, b"busy")
    assert len(client(server.url, retries=2).score(spoken(3))) == 3
    assert len(server.bodies) == 3


def test_a_server_that_goes_on_failing_is_an_infrastructure_error(server):
    server.reply = lambda body, number: (502, b"upstream is away")
    with pytest.raises(InfrastructureError, match=r"failed 3 times.*HTTP 502.*upstream is away") as caught:
        client(server.url, retries=2).score(spoken(2))
    assert server.url in str(caught.value)
    assert len(server.bodies) == 3


def test_silence_ends_at_the_deadline(server):
    over = threading.Event()

    def silent(body, number):
        over.wait(30)
        return 200, {}

    server.reply = silent
    try:
        with pytest.raises(InfrastructureError, match=r"no answer within 0\.05 s \(prm\.served_timeout_s\)") as caught:
            client(server.url, timeout_s=0.05, retries=1).score(spoken(2))
        assert not over.is_set()
    finally:
        over.set()
    assert server.url in str(caught.value)


def test_nobody_there_is_an_infrastructure_error(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and never listens
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(InfrastructureError, match=r"failed 2 times, the last: ConnectError") as caught:
            client(url, retries=1).score(spoken(2))
    assert url in str(caught.value)


def test_pauses_grow_are_random_and_have_an_end(server, monkeypatch):
    pauses = []
    monkeypatch.setattr("agentrl.prm.served.time.sleep", pauses.append)
    server.reply = lambda body, number: (500, b"")
    with pytest.raises(InfrastructureError):
        client(server.url, retries=10, backoff_s=1.0).score(spoken(2))
    limits = [min(30.0, 2.0**n) for n in range(10)]
    assert all(limit / 2 <= pause <= limit for pause, limit in zip(pauses, limits, strict=True))
    assert len({pause / limit for pause, limit in zip(pauses, limits, strict=True)}) > 1


# --- faults that will not ---


def test_a_refusal_is_not_repeated(server):
    server.reply = lambda body, number: (401, b"who are you?")
    with pytest.raises(UserError, match=r"HTTP 401.*who are you\?.*\$AGENTRL_PRM_TOKEN"):
        client(server.url).score(spoken(2))
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[], [0.1], [0.5, 1.5]], r"trajectory 't2', turn 1: score 1\.5 is outside \[0, 1\]"),
        ([[], [-0.1], [0.5, 0.5]], r"trajectory 't1', turn 0: score -0\.1 is outside"),
        ([[], [float("nan")], [0.5, 0.5]], r"trajectory 't1', turn 0: score nan is outside"),
        ([[], [0.1], [0.5]], r"trajectory 't2': 1 scores for 2 turns: turn 1 has none"),
        ([[], [0.1, 0.1], [0.5, 0.5]], r"trajectory 't1': 2 scores for 1 turns: there is no turn 1"),
        ([[], [0.1]], r"scores of 2 trajectories for 3 \('t0' to 't2'\)"),
        ([[], [0.1], [0.5, "high"]], r"trajectory 't2', turn 1: .*valid number"),
        ([[], [0.1], [0.5, None]], r"trajectory 't2', turn 1: .*valid number"),
        ([[], 0.1, [0.5, 0.5]], r"trajectory 't1', .*valid array"),
        ("none", r"scores: .*valid array"),
    ],
)
def test_wrong_scores_name_trajectory_and_turn(server, scores, message):
    server.reply = lambda body, number: (200, {"scores": scores})
    with pytest.raises(DataError, match=message) as caught:
        client(server.url).score(spoken(3))
    assert server.url in str(caught.value)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("said", "message"), [(b"<html>", "Invalid JSON"), ({"rewards": []}, "scores: Field required")]
)
def test_an_answer_in_another_language_is_a_data_error(server, said, message):
    server.reply = lambda body, number: (200, said)
    with pytest.raises(DataError, match=message):
        client(server.url).score(spoken(2))


def test_one_bad_chunk_of_many_is_an_error(server):
    def reply(body, number):
        scores = good(body, number)[1]["scores"]
        return 200, {"scores": [[2.0 for _ in row] if len(row) == 3 else row for row in scores]}

    server.reply = reply
    with pytest.raises(DataError, match=r"trajectory 't3', turn 0: score 2\.0"):
        client(server.url, chunk=1).score(spoken(8))


def test_scores_are_exact_in_float64(server):
    server.reply = lambda body, number: (200, {"scores": [[], [0.1]]})
    scores = client(server.url).score(spoken(2))
    assert scores.dtype == torch.float64
    assert scores.tolist() == [0.1]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/score", ""])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(UserError, match="http"):
        ServedPRM(url)
    with pytest.raises(ValueError, match="served_url"):
        PRMConfig(served_url=url)


def test_ragged_episodes_have_a_score_for_each_turn(server):
    made = episodes(0)
    assert len(client(server.url, chunk=2).score(made)) == build_batch(made).index.M
