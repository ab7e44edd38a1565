"""Dialogues: profiles, actions, partners, self-chat, and a judge over HTTP with every fault that one can have."""

from __future__ import annotations

import json
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import agentrl
from agentrl import envs
from agentrl.envs.check import check_env
from agentrl.errors import ActionError, DataError, EnvironmentFailure, UserError
from agentrl.policy import FunctionPolicy, load_policy, register_policy
from agentrl.types import StopReason
from environments.social.actions import LONGEST, ActionType, SocialAction, parse
from environments.social.client import ChatClient, Usage
from environments.social.env import SocialEnv, describe, in_split
from environments.social.judge import DIMENSIONS, Verdict
from environments.social.profiles import AgentProfile, Relationship, load_casts, shown_to

FAST = {"backoff_s": 0.0, "retries": 2, "timeout_s": 5.0}
GOOD = dict(zip(DIMENSIONS, (8, 1, 3, 0, 0, 2, 7), strict=True))
OTHER = dict(zip(DIMENSIONS, (6, -5, 0, -10, -10, -5, 4), strict=True))


class Served:
    """A model on the loopback interface: answers with `script`, one entry a request, its last one for ever."""

    def __init__(self, *script: Any) -> None:
        self.script, self.requests, self.headers = list(script), list[dict[str, Any]](), list[dict[str, str]]()
        self.closing = threading.Event()
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                served.answer(self)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.requests.append(body | {"path": handler.path})
        self.headers.append(dict(handler.headers))
        entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        entry = entry(body) if callable(entry) else entry
        if entry == "hang":
            self.closing.wait(30)
            return
        status, content = entry if isinstance(entry, tuple) else (200, entry)
        usage = {"prompt_tokens": 100, "completion_tokens": 20}
        reply = {"choices": [{"message": {"role": "assistant", "content": content}}], "usage": usage}
        raw = content if isinstance(content, bytes) else json.dumps(reply).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    running: list[Served] = []

    def start(*script: Any) -> Served:
        running.append(Served(*script))
        return running[-1]

    yield start
    for served in running:
        served.close()


def verdict(one: dict[str, int] = GOOD, two: dict[str, int] = OTHER) -> str:
    return json.dumps({"reasoning": "as said", "agent_1": one, "agent_2": two})


def dialogue(judge: Served, **kwargs: Any) -> SocialEnv:
    return SocialEnv(judge_url=judge.url, judge_options=FAST, **kwargs)


def talk(env: SocialEnv, seed: int = 0, text: str = "Shall we share?") -> tuple[list[Any], dict[str, Any]]:
    """Says `text` until the end. Returns (observations and rewards, last info)."""
    observation, info = env.reset(seed=seed)
    seen, done = [observation], False
    while not done:
        observation, reward, done, _, info = env.step(text)
        seen += [observation, reward]
    return seen, info


# --- profiles ---


def test_at_least_forty_scenarios_ship_easy_and_hard():
    casts = load_casts()
    assert len({cast.scenario.codename for cast in casts}) >= 40
    tags = [cast.scenario.tag for cast in casts]
    assert (tags.count("easy"), tags.count("hard")) == (20, 24)
    assert len({cast.scenario.scenario for cast in casts}) == len(casts)
    for cast in casts:
        assert all(agent.secret and agent.public_info and 18 <= agent.age <= 99 for agent in cast.agents)
        assert all(shown_to(goal, None).count("<") == 0 for goal in cast.scenario.agent_goals)


def test_both_splits_have_scenarios_and_share_none():
    train, test = ([c for c in load_casts() if in_split(c, split)] for split in ("train", "test"))
    assert len(test) >= 3
    assert not {c.scenario.scenario for c in train} & {c.scenario.scenario for c in test}
    assert len(train) + len(test) == len(load_casts())


EXPORT = {
    "environments": [
        {
            "pk": "01H7",
            "codename": "tea",
            "source": "mine",
            "scenario": "Two meet at tea. <p viewer='agent_1'>The cake is old.</p>",
            "agent_goals": ["Eat <extra_info>you like cake</extra_info>", "Warn"],
            "relationship": 2,
            "age_constraint": "[(18, 30), (40, 70)]",
            "occupation_constraint": None,
            "agent_constraint": None,
            "created_at": "2023-10-01",
        }
    ],
    "agents": [
        {"pk": "a", "first_name": "Ann", "last_name": "Lee", "age": 20, "secret": "eats at night", "mbti": "INTJ"},
        {"pk": "b", "first_name": "Bob", "last_name": "Ray", "age": 50, "moral_values": ["Care"]},
        {"pk": "c", "first_name": "Cem", "age": 60},
    ],
}


@pytest.mark.parametrize("form", ["object", "list", "jsonl", "folder"])
def test_a_sotopia_export_loads_in_every_form(form, tmp_path):
    entries = [*EXPORT["environments"], *EXPORT["agents"]]
    path = tmp_path / {"jsonl": "all.jsonl"}.get(form, "all.json")
    if form == "object":
        path.write_text(json.dumps(EXPORT))
    elif form == "list":
        path.write_text(json.dumps(entries))
    elif form == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, entries)))
    else:
        (tmp_path / "agents.jsonl").write_text("\n".join(map(json.dumps, EXPORT["agents"])))
        (tmp_path / "scenarios.json").write_text(json.dumps(EXPORT["environments"]))
        path = tmp_path
    casts = load_casts(path)
    assert [cast.key for cast in casts] == ["01H7/a/b", "01H7/a/c"], "ages decide who may play"
    assert casts[0].scenario.relationship is Relationship.ACQUAINTANCE


def test_combos_say_who_plays(tmp_path):
    path = tmp_path / "all.json"
    path.write_text(json.dumps(EXPORT | {"combos": [{"env_id": "01H7", "agent_ids": ["c", "a"]}]}))
    assert [cast.key for cast in load_casts(path)] == ["01H7/c/a"]


SCENE, ANN = EXPORT["environments"][0], EXPORT["agents"][0]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.json", "[\n{,}\n]", r"x\.json, line 2: not JSON"),
        ("x.jsonl", json.dumps(ANN) + "\n{", r"x\.jsonl, line 2: not JSON"),
        ("x.jsonl", json.dumps(ANN) + "\n\n" + json.dumps(ANN | {"age": "old"}), r"line 3, field age: .*got 'old'"),
        ("x.json", json.dumps([ANN, SCENE | {"agent_goals": ["one"]}]), r"entry 2, field agent_goals: "),
        (
            "x.json",
            json.dumps({"environments": [SCENE | {"relationship": 9}]}),
            r"environments\[0\], field relationship",
        ),
        ("x.json", json.dumps([SCENE | {"age_constraint": "18-70"}]), r"entry 1, field age_constraint: .*two ranges"),
        ("x.json", json.dumps([{"name": "Ann"}]), r"entry 1: .* this has none"),
        ("x.json", json.dumps([7]), r"entry 1: an object with fields, not int"),
        ("x.json", json.dumps({"agents": 7}), r"field agents: a list of entries, not int"),
        ("x.json", json.dumps([ANN, ANN]), r"entry 2: 'a' stands twice"),
        ("x.json", json.dumps([ANN]), r"0 scenarios and 1 agents"),
        ("x.json", json.dumps([SCENE, ANN, EXPORT["agents"][1] | {"age": 20}]), r"nobody may play '01H7'"),
        ("x.json", json.dumps(EXPORT | {"combos": [{"env_id": "?", "agent_ids": ["a", "b"]}]}), r"no scenario '\?'"),
        ("x.json", json.dumps(EXPORT | {"combos": [{"env_id": "01H7", "agent_ids": ["a", "z"]}]}), r"no agent 'z'"),
        ("x.json", b"\xff\xfe\x00", r"x\.json: cannot be read"),
    ],
)
def test_a_bad_file_is_refused_with_file_line_and_field(name, content, says, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says):
        load_casts(path)


def test_missing_files_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.json: cannot be read"):
        load_casts(tmp_path / "nothing.json")
    with pytest.raises(DataError, match=r"no \.json or \.jsonl file"):
        load_casts(tmp_path)


def test_what_is_for_one_viewer_is_shown_to_that_one_and_the_judge():
    assert shown_to(SCENE["scenario"], 0) == "Two meet at tea."
    assert shown_to(SCENE["scenario"], 1) == shown_to(SCENE["scenario"], None) == "Two meet at tea. The cake is old."


def test_how_much_is_known_of_the_other_follows_from_the_relationship():
    agent = AgentProfile(first_name="Ann", occupation="nurse", public_info="Sings.", big_five="Calm", secret="Owes 5")
    known = [describe(agent, relationship) for relationship in (*Relationship, None)]
    for word, since in (("Ann", 0), ("nurse", 2), ("Sings", 2), ("Calm", 3), ("Owes 5", 6)):
        assert [word in text for text in known] == [number >= since for number in range(7)], word


# --- actions ---


@pytest.mark.parametrize(
    ("text", "kind", "argument"),
    [
        ("Hello there", ActionType.SPEAK, "Hello there"),
        ("  two\n\nlines ", ActionType.SPEAK, "two lines"),
        ("[leave]", ActionType.LEAVE, ""),
        ("[LEAVE] bye", ActionType.LEAVE, ""),
        ("[none]", ActionType.NONE, ""),
        ("[action] gives her the book", ActionType.ACTION, "gives her the book"),
        ("[non-verbal] nods", ActionType.NON_VERBAL, "nods"),
        ("[non-verbal communication] nods", ActionType.NON_VERBAL, "nods"),
        ('{"action_type": "speak", "argument": "Hi\nyou"}', ActionType.SPEAK, "Hi you"),
        ('{"action_type": "leave", "argument": ""}', ActionType.LEAVE, ""),
        ("half \ud800 and \x1b[31m and \x00", ActionType.SPEAK, "half ? and [31m and"),
        ("x" * 10**6, ActionType.SPEAK, "x" * LONGEST),
    ],
)
def test_actions_are_read(text, kind, argument):
    action = parse(text)
    assert (action.type, action.argument.strip()) == (kind, argument)


@pytest.mark.parametrize(
    "text", ["", " \n", "[dance] wildly", "[action]", '{"action_type": "dance"}', '{"action_type": ', "\x00\x01"]
)
def test_other_text_is_no_action(text):
    with pytest.raises(ActionError):
        parse(text)


def test_actions_are_told_as_in_sotopia():
    assert SocialAction(ActionType.SPEAK, "Hi").told("Ann") == 'Ann said: "Hi"'
    assert SocialAction(ActionType.NON_VERBAL, "nods").told("Ann") == "Ann [non-verbal communication] nods"
    assert SocialAction(ActionType.LEAVE).told("Ann") == "Ann left the conversation"


# --- an episode ---


def test_without_a_judge_it_is_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"judge_url.*Bargain-v0"):
        envs.make("Social-v0")


@pytest.mark.parametrize("seat", [0, 1])
def test_the_goal_score_of_the_agents_own_seat_is_the_reward(seat, serve):
    judge = serve(verdict())
    seen, info = talk(dialogue(judge, seat=seat))
    mine = (GOOD, OTHER)[seat]
    assert seen[-1] == mine["goal"]
    assert info["reward_parts"] == mine
    assert info["scores"] == [GOOD, OTHER]
    assert info["success"] is (seat == 0)
    assert all(reward == 0 for reward in seen[2:-1:2])
    assert len(judge.requests) == 1, "one call an episode"


@pytest.mark.parametrize(("goal", "threshold", "success"), [(6, 6.0, False), (7, 6.0, True), (7, 7.5, False)])
def test_success_is_strictly_above_the_threshold(goal, threshold, success, serve):
    judge = serve(verdict(GOOD | {"goal": goal}))
    assert talk(dialogue(judge, seat=0, threshold=threshold))[1]["success"] is success


def test_a_dialogue_has_twenty_turns_of_both_and_a_judge_who_reads_everything(serve):
    judge = serve(verdict())
    env = dialogue(judge, seat=0, partner="chatterbox")
    _, info = talk(env, text="mine")
    assert info["turns_left"] == 0
    read = judge.requests[0]["messages"][1]["content"]
    assert read.count('said: "mine"') == read.count('said: "word') == 10
    for agent, goal in zip(env._cast.agents, env._cast.scenario.agent_goals, strict=True):
        assert agent.secret in read
        assert shown_to(goal, None) in read


register_policy("chatterbox", lambda: FunctionPolicy(lambda request: f"word {request.turn}"))


def test_the_agent_sees_its_own_goal_and_neither_the_others_goal_nor_secret(serve):
    env = dialogue(serve(verdict()), seat=0)
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        (me, other), (mine, theirs) = env._cast.agents, env._cast.scenario.agent_goals
        assert me.secret in observation
        assert shown_to(mine, 0) in observation
        assert other.secret not in observation
        assert shown_to(theirs, 1) not in observation


def test_either_may_leave(serve):
    judge = serve(verdict())
    env = dialogue(judge, seat=0)
    env.reset(seed=0)
    assert env.step("[leave]")[2]
    register_policy("hermit", lambda: FunctionPolicy(lambda request: "[leave]"))
    env = dialogue(judge, seat=0, partner="hermit")
    env.reset(seed=0)
    assert env.step("Hello")[2]


def test_endless_garbage_counts_as_leaving(serve):
    judge = serve(verdict())
    env = dialogue(judge, seat=0, turns=4)
    observation, _ = env.reset(seed=0)
    for _ in range(3):
        shown, reward, done, _, info = env.step("")
        assert (reward, done, info["valid_action"]) == (0, False, False)
        assert shown.endswith(observation)
    assert env.step("")[2]
    assert "left the conversation" in judge.requests[0]["messages"][1]["content"]


@pytest.mark.parametrize(("seat", "spoken", "left"), [(0, 5, [5, 3, 1]), (1, 6, [5, 3, 1])])
def test_a_turn_limit_of_the_run_ends_the_dialogue_and_the_judge_still_speaks(seat, spoken, left, serve):
    judge = serve(verdict())
    kwargs = {"judge_url": judge.url, "judge_options": FAST, "partner": "chatterbox", "seat": seat}
    env = envs.make("Social-v0", max_turns=3, **kwargs)
    _, info = env.reset(seed=0)
    for wanted in left:
        assert info["turns_left"] == wanted
        _, reward, terminated, truncated, info = env.step("mine")
    assert (reward, terminated, truncated, info["turns_left"]) == ((7, 4)[seat], True, False, 0)
    assert len(env.unwrapped._dialogue) == spoken
    assert judge.requests[0]["messages"][1]["content"].count('said: "mine"') == 3


def test_with_a_judge_it_passes_the_checks_that_every_environment_passes(serve):
    kwargs = {"judge_url": serve(verdict()).url, "judge_options": FAST, "partner": "chatterbox"}
    report = check_env("Social-v0", kwargs=kwargs, seeds=[0, 1, 2], actions=60)
    assert report.passed, str(report)


def test_invalid_answers_count_for_the_run_s_turn_limit(serve):
    judge = serve(verdict())
    env = dialogue(judge, seat=0, max_turns=2)
    env.reset(seed=0)
    assert not env.step("")[2]
    assert env.step("")[2]
    assert "left the conversation" in judge.requests[0]["messages"][1]["content"]


def test_in_self_chat_the_limit_counts_the_turns_of_both(serve):
    env = dialogue(serve(verdict()), partner="self", max_turns=4)
    _, info = talk(env)
    assert (len(env._dialogue), info["turns_left"]) == (4, 0)


def test_episodes_of_a_run_with_a_turn_limit_are_judged(serve):
    judge = serve(verdict(GOOD, GOOD))
    kwargs = {"judge_url": judge.url, "judge_options": FAST, "partner": "chatterbox"}
    limited = {"id": "Social-v0", "max_turns": 2, "kwargs": kwargs}
    env = agentrl.RunConfig.model_validate(config_of(limited)).env
    played = agentrl.collect(load_policy("chatterbox"), env, episodes=3).trajectories
    assert [(len(each.turns), each.stop_reason, each.outcome) for each in played] == [(2, StopReason.TERMINATED, 1)] * 3


def test_same_seed_same_transcript_other_seed_another(serve):
    env = dialogue(serve(verdict()))
    state = random.getstate()
    assert talk(env, 3)[0] == talk(env, 3)[0] != talk(env, 4)[0]
    assert random.getstate() == state


def test_a_cast_can_be_given(serve):
    env = dialogue(serve(verdict()))
    key = list(env.casts)[5]
    assert env.reset(seed=0, options={"cast": key})[1]["cast"] == key
    with pytest.raises(UserError, match="cast='nobody'"):
        env.reset(options={"cast": "nobody"})


def test_it_can_be_pickled_in_the_middle_of_a_dialogue(serve):
    env = dialogue(serve(verdict()))
    env.reset(seed=1)
    twin = pickle.loads(pickle.dumps(env))
    assert twin.step("Hello")[0] == env.step("Hello")[0]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"turns": 1}, "turns=1"),
        ({"max_turns": 0}, "max_turns=0"),
        ({"threshold": 10}, "threshold=10"),
        ({"seat": 2}, "seat=2"),
        ({"split": "tset"}, "split='tset'"),
        ({"difficulty": "medium"}, "difficulty='medium'"),
        ({"partner": "nobody-known"}, "no policy 'nobody-known'"),
        ({"partner": "social-talker", "partner_options": {"mood": 1}}, "partner_options|mood"),
        ({"judge_options": {"colour": 1}}, "judge_options.*colour"),
        ({"judge_options": {"timeout_s": 0}}, "timeout_s=0"),
        ({"judge_url": "localhost:8000"}, "an address such as"),
        ({"judge_url": "http://me:secret@host/v1"}, "user name"),
    ],
)
def test_impossible_settings_are_refused(kwargs, says):
    with pytest.raises(UserError, match=says) as caught:
        envs.make("Social-v0", **({"judge_url": "http://127.0.0.1:1/v1"} | kwargs))
    assert "secret" not in str(caught.value)


# --- self-chat and model partners ---


def test_in_self_chat_one_policy_plays_both_seats_and_the_mean_counts(serve):
    judge = serve(verdict())
    env = dialogue(judge, partner="self", turns=4)
    observation, info = env.reset(seed=0)
    seats, done = [], False
    while not done:
        seats.append(info["seat"])
        me, other = env._cast.agents[info["seat"]], env._cast.agents[1 - info["seat"]]
        assert f"You are {me.first_name}." in observation
        assert me.secret in observation
        assert other.secret not in observation
        observation, reward, done, _, info = env.step(f"line {len(seats)}")
        assert done or f'said: "line {len(seats)}"' in observation, "each view is complete"
    assert seats == [0, 1, 0, 1]
    assert reward == (GOOD["goal"] + OTHER["goal"]) / 2
    assert info["reward_parts"]["relationship"] == -2


def test_a_served_partner_sees_its_own_side_and_is_asked_again_after_nonsense(serve):
    judge = serve(verdict())
    partner = serve("Good day", "[dance]", "", '{"action_type": "action", "argument": "nods twice"}', "[leave]")
    env = dialogue(judge, seat=0, partner=partner.url, partner_model="qwen", partner_options=FAST)
    env.reset(seed=0)
    assert 'said: "Good day"' in env.step("Hello")[0]
    assert "[action] nods twice" in env.step("Well?")[0]
    _, _, done, _, info = env.step("And?")
    assert done
    view = partner.requests[0]["messages"][1]["content"]
    me, other = env._cast.agents
    assert partner.requests[0]["model"] == "qwen"
    assert other.secret in view
    assert me.secret not in view
    assert (info["usage"]["partner"]["calls"], info["usage"]["partner"]["attempts"]) == (3, 5)


@pytest.mark.parametrize("script", [[(500, "")], ["[dance]"]])
def test_a_partner_that_stays_down_or_senseless_is_no_fault_of_the_agent(script, serve):
    env = dialogue(serve(verdict()), seat=0, partner=serve(*script).url, partner_options=FAST)
    env.reset(seed=0)
    with pytest.raises(EnvironmentFailure, match="no usable answer in 3 attempts"):
        env.step("Hello")


def test_a_scripted_partner_that_answers_nonsense_is_no_fault_of_the_agent(serve):
    register_policy("mute", lambda: FunctionPolicy(lambda request: ""))
    env = dialogue(serve(verdict()), seat=0, partner="mute")
    env.reset(seed=0)
    with pytest.raises(EnvironmentFailure, match="partner 'mute'"):
        env.step("Hello")


# --- the judge ---


def test_the_judge_is_asked_for_a_schema_that_its_own_answer_meets(serve):
    judge = serve(verdict())
    talk(dialogue(judge, seat=0, judge_model="strict-judge"))
    asked = judge.requests[0]
    assert asked["path"] == "/v1/chat/completions"
    assert asked["model"] == "strict-judge"
    assert asked["response_format"]["type"] == "json_schema"
    schema = asked["response_format"]["json_schema"]["schema"]
    assert schema == Verdict.model_json_schema()
    ranges = {name: (p["minimum"], p["maximum"]) for name, p in schema["$defs"]["Scores"]["properties"].items()}
    assert ranges == {
        "believability": (0, 10),
        "relationship": (-5, 5),
        "knowledge": (0, 10),
        "secret": (-10, 0),
        "social_rules": (-10, 0),
        "financial_and_material_benefits": (-5, 5),
        "goal": (0, 10),
    }


OUT_OF_RANGE = [
    verdict(GOOD | {name: value})
    for name, values in {
        "believability": (-1, 11),
        "relationship": (-6, 6),
        "knowledge": (-1, 11),
        "secret": (-11, 1),
        "social_rules": (-11, 1),
        "financial_and_material_benefits": (-6, 6),
        "goal": (-1, 11),
    }.items()
    for value in values
]
FAULTS = {
    "down": (500, ""),
    "overloaded": (429, ""),
    "no json": "I would give it a seven.",
    "other json": json.dumps({"goal": 7}),
    "a score missing": verdict({k: v for k, v in GOOD.items() if k != "goal"}),
    "one too many": verdict(GOOD | {"charm": 10}),
    "a word for a number": verdict(GOOD | {"goal": "7"}),  # type: ignore[dict-item]
    "a fraction": verdict(GOOD | {"goal": 6.5}),  # type: ignore[dict-item]
    "no completion": (200, b'{"choices": []}'),
    "not even json": (200, b"<html>"),
    "not an object": (200, b"[]"),
    "empty": (200, b""),
    "null": (200, None),
} | {f"out of range {number}": text for number, text in enumerate(OUT_OF_RANGE)}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again_and_if_it_stays_nobody_is_scored(fault, serve):
    passing = serve(FAULTS[fault], FAULTS[fault], verdict())
    seen, info = talk(dialogue(passing, seat=0, turns=2))
    assert seen[-1] == 7
    assert (info["usage"]["judge"]["calls"], info["usage"]["judge"]["attempts"]) == (1, 3)
    staying = serve(FAULTS[fault])
    with pytest.raises(EnvironmentFailure, match="no usable answer in 3 attempts"):
        talk(dialogue(staying, seat=0, turns=2))
    assert len(staying.requests) == 3


def test_a_judge_that_never_answers_is_given_up(serve):
    judge = serve("hang")
    env = SocialEnv(judge_url=judge.url, judge_options=FAST | {"timeout_s": 0.05, "retries": 1}, turns=2)
    with pytest.raises(EnvironmentFailure, match="2 attempts: ReadTimeout"):
        talk(env)


def test_a_judge_that_is_not_there_is_given_up(serve):
    gone = serve(verdict())
    gone.close()
    with pytest.raises(EnvironmentFailure, match="ConnectError"):
        talk(dialogue(gone, turns=2))


@pytest.mark.parametrize("status", [400, 401, 404])
def test_an_answer_that_no_retry_can_change_is_not_tried_again(status, serve):
    judge = serve((status, ""))
    with pytest.raises(EnvironmentFailure, match=f"HTTP {status}"):
        talk(dialogue(judge, turns=2))
    assert len(judge.requests) == 1


def test_a_fence_around_the_json_is_forgiven(serve):
    assert talk(dialogue(serve(f"```json\n{verdict()}\n```"), seat=0, turns=2))[0][-1] == 7


def test_waits_double_and_are_shortened_at_random(serve, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("environments.social.client.time.sleep", waits.append)
    client = ChatClient(serve((503, "")).url, retries=4, backoff_s=1.0)
    with pytest.raises(EnvironmentFailure):
        client.ask([], str, Usage())
    assert len(waits) == 4
    assert all(2**n / 2 <= wait <= 2**n for n, wait in enumerate(waits))
    assert len({wait / 2**n for n, wait in enumerate(waits)}) == 4, "jitter"


def test_cost_and_time_are_recorded_with_failed_attempts(serve):
    judge = serve("nonsense", verdict())
    options = FAST | {"usd_per_million": (1.0, 10.0)}
    info = talk(SocialEnv(judge_url=judge.url, judge_options=options, turns=2))[1]
    record = info["usage"]["judge"]
    assert {name: record[name] for name in ("prompt_tokens", "completion_tokens")} == {
        "prompt_tokens": 200,
        "completion_tokens": 40,
    }
    assert record["usd"] == pytest.approx(200e-6 + 400e-6)
    assert record["seconds"] > 0


def test_the_key_is_sent_and_appears_nowhere_else(serve, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", "sk-top-secret\n")
    judge = serve((200, b"you sent Bearer sk-top-secret"))
    env = SocialEnv(judge_url=judge.url, judge_options=FAST | {"key_env": "JUDGE_KEY"}, turns=2)
    with caplog.at_level(0), pytest.raises(EnvironmentFailure) as caught:
        talk(env)
    assert judge.headers[0]["Authorization"] == "Bearer sk-top-secret"
    for text in (str(caught.value), caplog.text, repr(env.judge), pickle.dumps(env).decode("latin-1")):
        assert "top-secret" not in text
    monkeypatch.setenv("JUDGE_KEY", "sk-top-\x07secret")
    with pytest.raises(EnvironmentFailure, match="JUDGE_KEY holds characters") as caught:
        talk(env)
    assert "secret" not in str(caught.value)


def test_without_a_key_none_is_sent(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge = serve(verdict())
    talk(dialogue(judge, turns=2))
    assert "Authorization" not in judge.headers[0]


# --- with the framework ---


def test_episodes_without_a_verdict_are_counted_and_not_scored(serve):
    probe = SocialEnv(judge_url="http://127.0.0.1:1/v1")
    probe.reset(seed=0)
    unlucky = probe._cast.scenario.scenario
    judge = serve(lambda body: (500, "") if unlucky in body["messages"][1]["content"] else verdict())
    kwargs = {"judge_url": judge.url, "judge_options": FAST | {"retries": 0}, "turns": 4}
    env = agentrl.RunConfig.model_validate(config_of({"id": "Social-v0", "kwargs": kwargs})).env
    played = agentrl.collect(load_policy("social-talker"), env, episodes=3)
    [first], others = played.failed, played.trajectories
    assert (first.seed, first.stop_reason, first.scorable) == (0, StopReason.ENVIRONMENT_ERROR, False)
    assert "HTTP 500" in str(first.error)
    assert all(trajectory.scorable for trajectory in others)
    assert played.counts[StopReason.ENVIRONMENT_ERROR] == 1


def config_of(env: dict[str, Any]) -> dict[str, Any]:
    return {"env": env, "model": {"path": "unused"}}


@pytest.mark.parametrize("name", ["social-talker", "social-random"])
@pytest.mark.parametrize("partner", ["social-talker", "self"])
def test_the_scripted_agents_play_to_the_end(name, partner, serve):
    kwargs = {"judge_url": serve(verdict()).url, "judge_options": FAST, "partner": partner}
    env = agentrl.RunConfig.model_validate(config_of({"id": "Social-v0", "kwargs": kwargs})).env
    played = agentrl.collect(load_policy(name), env, episodes=5)
    assert [t.stop_reason for t in played.trajectories] == [StopReason.TERMINATED] * 5
    assert all(turn.info["valid_action"] for t in played.trajectories for turn in t.turns)


def test_a_partner_answers_where_a_loop_is_running_already(serve):
    import asyncio

    async def notebook() -> str:
        env = dialogue(serve(verdict()), seat=0)
        env.reset(seed=0)
        return str(env.step("Hello")[0])

    assert "What do you do?" in asyncio.run(notebook())


def test_the_shipped_file_is_small():
    folder = Path(__file__).resolve().parents[1] / "environments" / "social" / "data"
    assert sum(file.stat().st_size for file in folder.glob("*.json")) < 200_000
