"""The human policy: what a person sees, what a line means, and how they leave."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys

import pytest
from toys import register
from typer.testing import CliRunner

import agentrl
from agentrl.buffer import read_jsonl
from agentrl.cli import app
from agentrl.config import EnvConfig, RolloutConfig
from agentrl.envs import TextEnv
from agentrl.errors import InfrastructureError
from agentrl.policy import PolicyRequest, load_policy
from agentrl.types import Message, StopReason
from policies.human import HumanPolicy


class Echo(TextEnv):
    """Repeats what is said; ends after `length` turns. Knows two actions."""

    fast = True
    instructions = "Say left or right."

    def __init__(self, length=2):
        super().__init__()
        self.length = length

    def begin(self, options):
        self.turn = 0
        return "say something", {"admissible_actions": ["left", "right"]}

    def parse_action(self, text):
        return text

    def play(self, action):
        self.turn += 1
        return f"you said {action}", 1.0, self.turn == self.length, {"admissible_actions": ["left", "right"]}


register("HumanEcho-v0", Echo)
COLLECT = [sys.executable, "-u", "-m", "agentrl", "collect", "Sokoban-v0", "--policy", "human"]


def play(typed, episodes=1, **options):
    """Plays with these lines; returns what was collected and what was shown."""
    shown = io.StringIO()
    policy = HumanPolicy(reader=io.StringIO(typed), writer=shown, **options)
    played = agentrl.collect(policy, EnvConfig(id="HumanEcho-v0"), episodes=episodes, rollout=RolloutConfig(retries=3))
    return played, shown.getvalue()


def actions(played):
    return [[turn.action for turn in trajectory.turns] for trajectory in played.trajectories]


def test_a_person_sees_instructions_observations_and_actions():
    played, shown = play("left\nright\n")
    assert actions(played) == [["left", "right"]]
    first, later = shown.split("--- turn 1")
    assert "Say left or right.\n\nsay something\nactions: 1 left, 2 right\n> " in first
    assert "\nyou said left\nactions: 1 left, 2 right\n> " in later


def test_a_number_is_the_action_at_that_place_and_an_empty_line_asks_again():
    assert actions(play("2\n\n   \n 1 \n")[0]) == [["right", "left"]]
    assert actions(play("3\n0\n")[0]) == [["3", "0"]]
    assert actions(play("2\n1\n", numbers=False)[0]) == [["2", "1"]]


def test_no_text_of_an_episode_controls_the_terminal():
    """OSC 52 fills the clipboard, CSI moves the cursor; C1 codes are the same in one character."""
    odd = "".join(map(chr, (*range(32), *range(127, 160)))) + "\x1b]52;c;cm0gLXJm\x07 \ud800 é 箱\tend"
    messages = [Message(role="system", content=odd), Message(role="user", content=odd)]
    shown = io.StringIO()
    policy = HumanPolicy(reader=io.StringIO("1\n"), writer=shown)
    request = PolicyRequest("e", 0, odd, messages, {"admissible_actions": [odd]})
    [action] = asyncio.run(policy.act([request]))
    assert action.text == odd, "what is sent is what the environment listed"
    text = shown.getvalue()
    assert all(letter.isprintable() or letter in "\n\t" for letter in text)
    assert text.count(r"\x1b]52;c;cm0gLXJm\x07 \ud800 é 箱" + "\tend") == 3
    assert text.count(r"\x9b") == text.count(r"\x0d") == text.count(r"\x7f") == 3


def test_one_episode_is_played_after_the_other():
    played, shown = play("a\nb\nc\nd\ne\nf\n", episodes=3)
    assert actions(played) == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert [f"=== episode {number}\n" in shown for number in range(1, 5)] == [True, True, True, False]


def test_who_leaves_cancels_what_is_not_over_and_is_not_asked_again():
    played, shown = play("a\nb\nc\n", episodes=3)
    assert actions(played) == [["a", "b"]]
    assert [t.stop_reason for t in played.failed] == [StopReason.CANCELLED] * 2
    assert [[turn.action for turn in t.turns] for t in played.failed] == [["c"], []]
    assert played.retried == 0
    assert shown.count("cancelled") == 1
    with pytest.raises(InfrastructureError, match="cancelled"):
        play("")


def test_nobody_is_hurried():
    read, write = os.pipe()
    limits = RolloutConfig(policy_deadline_s=1e-6, episode_deadline_s=1e-6, executor="inline")
    with os.fdopen(read) as reader, os.fdopen(write, "w") as writer:
        writer.write("a\nb\n")
        writer.flush()
        policy = HumanPolicy(reader=reader, writer=io.StringIO())
        assert actions(agentrl.collect(policy, "HumanEcho-v0", episodes=1, rollout=limits)) == [["a", "b"]]


def test_a_waiting_person_does_not_block_the_loop():
    read, write = os.pipe()

    async def both(policy):
        asked = asyncio.create_task(policy.act([PolicyRequest("e", 0, "x", [Message(role="user", content="x")])]))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not asked.done()
        os.write(write, b"le")
        os.write(write, "ft é\nrest".encode())
        return (await asked)[0].text

    with os.fdopen(read) as reader:
        assert asyncio.run(both(HumanPolicy(reader=reader, writer=io.StringIO()))) == "left é"
    os.close(write)


def test_it_is_found_by_name_and_plays_from_the_command_line(tmp_path):
    out = tmp_path / "mine.jsonl"
    typed = "up\n1\nno such thing\nup\n"
    done = subprocess.run(
        [*COLLECT, "--episodes", "2", "--max-turns", "3", "--out", str(out)],
        input=typed,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "(that was no action)" not in done.stdout.split("> ")[1]
    assert "#" in done.stdout
    [trajectory] = read_jsonl(out)
    assert [turn.action for turn in trajectory.turns] == ["up", "up", "no such thing"]
    assert f"{trajectory.final_observation}\nover: outcome 0\n" in done.stdout
    assert load_policy("human").interactive


def test_leaving_before_the_end_is_said_without_a_traceback(tmp_path):
    arguments = ["collect", "Sokoban-v0", "--policy", "human", "--episodes", "1", "--out", str(tmp_path / "x.jsonl")]
    done = CliRunner().invoke(app, arguments, input="")
    assert done.exit_code == 130, done.output
    assert "no episode was finished" in done.output
    assert not (tmp_path / "x.jsonl").exists()


def test_ctrl_c_keeps_what_was_finished(tmp_path):
    out = tmp_path / "mine.jsonl"
    process = subprocess.Popen(
        [*COLLECT, "--episodes", "2", "--max-turns", "1", "--out", str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        process.stdin.write(b"up\n")
        process.stdin.flush()
        seen = b""
        while seen.count(b"> ") < 2:
            block = os.read(process.stdout.fileno(), 4096)
            assert block, "it ended before the second episode"
            seen += block
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"holds the 1 of 2 episodes" in said
    assert len(list(read_jsonl(out))) == 1
