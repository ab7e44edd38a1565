"""Stored trajectories: played in the terminal, and scored again without environment or model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentrl.buffer import read_jsonl, write_jsonl
from agentrl.cli import app
from agentrl.config import OutcomeConfig
from agentrl.errors import DataError, UserError
from agentrl.evaluate.rescore import credit_of, load_rule, rescore, rule_of
from agentrl.types import ImagePart, StopReason, TextPart, Trajectory, Turn


def trajectory(name: str, rewards: list[float], *, success: bool, group: str = "g", **fields: Any) -> Trajectory:
    turns = [
        Turn(
            observation=f"board [bold]{i}[/bold] of {name}",
            action=f"go {i}",
            reward=reward,
            terminated=i == len(rewards) - 1,
            info={"success": success and i == len(rewards) - 1, "state_key": str(i), "valid_action": i != 1},
        )
        for i, reward in enumerate(rewards)
    ]
    return Trajectory(
        id=name,
        group_id=group,
        env="Toy-v0",
        seed=3,
        instructions="Push.",
        start_info={"state_key": "start"},
        turns=turns,
        final_observation="the end",
        outcome=float(success),
        success=success,
        policy="someone",
        **fields,
    )


@pytest.fixture
def episodes() -> list[Trajectory]:
    return [
        trajectory("lost", [0.0, 0.25, 0.5], success=False),
        trajectory("won", [0.0, 1.0], success=True),
        trajectory("died", [0.0], success=False, stop_reason=StopReason.ENVIRONMENT_ERROR, error="the server is gone"),
    ]


@pytest.fixture
def file(tmp_path: Path, episodes: list[Trajectory]) -> Path:
    write_jsonl(tmp_path / "episodes.jsonl", episodes)
    return tmp_path / "episodes.jsonl"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "80"})


def test_replay_prints_every_turn_as_it_was(file: Path) -> None:
    result = run("replay", file)
    assert result.exit_code == 0, result.output
    for line in (
        "lost (1 of 3)",
        "someone in Toy-v0, seed 3",
        "Push.",
        "board [bold]2[/bold] of lost",
        "> go 2",
        "the end",
    ):
        assert line in result.output
    assert "reward +0.25  no action" in result.output
    assert "failure: outcome 0 after 3 turns, stopped by terminated" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("choice", "shown"),
    [
        (["--id", "won"], "won (2 of 3)"),
        (["--index", -1], "the server is gone"),
        (["--outcome", "success"], "won (2 of 3)"),
        (["--outcome", "unscorable"], "stopped by environment_error"),
        (["--list"], "3 trajectories"),
    ],
)
def test_replay_chooses(file: Path, choice: list[Any], shown: str) -> None:
    assert shown in run("replay", file, *choice).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--id", "nobody"], "no trajectory with the id 'nobody' among 3; there are: lost, won, died"),
        (["--index", 3], "--index 3: the file has 3 trajectories, 0 to 2"),
        (["--index", 0, "--outcome", "success"], "give one of them"),
        (["--step"], "this is no terminal"),
    ],
)
def test_replay_says_what_is_wrong(file: Path, arguments: list[Any], message: str) -> None:
    result = run("replay", file, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_replay_of_pictures_and_broken_files(tmp_path: Path, episodes: list[Trajectory]) -> None:
    picture = ImagePart(path="images/a.png", alt="a red box")
    episodes[0].turns[0].observation = [picture, TextPart(text="what now?")]
    line = episodes[0].model_dump_json()
    (tmp_path / "half.jsonl").write_text(line + "\n" + line[:50])
    assert run("replay", tmp_path / "half.jsonl").exit_code == 2
    result = run("replay", tmp_path / "half.jsonl", "--skip-broken")
    assert "[picture images/a.png] a red box" in result.output
    assert "half.jsonl line 2: cut off" in " ".join(result.output.split())
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no trajectory" in run("replay", tmp_path / "empty.jsonl").output
    assert "is a folder" in run("replay", tmp_path).output


@pytest.mark.parametrize("arguments", [[], ["--list"], ["--id", "nobody"]])
def test_replay_shows_control_characters_and_obeys_none(tmp_path: Path, arguments: list[str]) -> None:
    evil = "\x1b[2J\x1b]0;title\x07\x9b31m\x7f\r"
    one = trajectory(f"id{evil}", [0.0], success=False, stop_reason=StopReason.POLICY_ERROR, error=f"error{evil}")
    one.turns[0].observation, one.turns[0].action = f"seen\t{evil}", f"said{evil}\ud83d"
    one.instructions = one.env = one.policy = evil
    one.task["kwargs"] = {"name": evil}
    one.final_observation = [ImagePart(path=f"p{evil}", alt=f"alt{evil}"), TextPart(text=f"last{evil}")]
    write_jsonl(tmp_path / "evil.jsonl", [one])
    result = run("replay", tmp_path / "evil.jsonl", *arguments)
    assert "\\x1b[2J\\x1b]0;title\\x07" in result.output
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", result.output)


def test_the_words_about_a_broken_line_are_harmless_too(tmp_path: Path) -> None:
    line = json.loads(trajectory("one", [0.0], success=False).model_dump_json())
    line["task"] = {"options": {}}
    line["turns"][0]["timings"] = {"\x1b[2J": "no number"}
    (tmp_path / "odd.jsonl").write_text(json.dumps(line) + "\n")
    for option in ([], ["--skip-broken"]):
        output = run("replay", tmp_path / "odd.jsonl", *option).output
        assert "\\x1b[2J" in output
        assert "\x1b" not in output


def test_rescoring_applies_a_rule_and_leaves_failures_and_originals_alone(episodes: list[Trajectory]) -> None:
    found = rescore(episodes, rule_of(OutcomeConfig(rule="return", success_above=0.5)))
    assert [(one.outcome, one.success) for one in found] == [(0.75, True), (1.0, True), (0.0, False)]
    assert [one.outcome for one in episodes] == [0.0, 1.0, 0.0]


def test_rescoring_by_a_function_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, episodes: list[Trajectory]
) -> None:
    (tmp_path / "my_judge.py").write_text(
        "import asyncio\n"
        "def short(t):\n    return 1 / len(t.turns), len(t.turns) < 3\n"
        "def number(t):\n    return -1.0\n"
        "def words(t):\n    return 'good'\n"
        "def endless(t):\n    return float('inf'), True\n"
        "def huge(t):\n    return 10**400\n"
        "def undefined(t):\n    return float('nan')\n"
        "def breaks(t):\n    raise ConnectionError('the model is gone')\n"
        "async def waits(t):\n    await asyncio.sleep(0)\n    return 0.5, len(t.turns) < 3\n"
        "async def waits_and_breaks(t):\n    raise ConnectionError('the model is gone')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert [(one.outcome, one.success) for one in rescore(episodes, load_rule("my_judge:short"))][:2] == [
        (1 / 3, False),
        (0.5, True),
    ]
    assert {(one.outcome, one.success) for one in rescore(episodes[:2], load_rule("my_judge:number"))} == {
        (-1.0, False)
    }
    waited = rescore(episodes, load_rule("my_judge:waits"))
    assert [(one.outcome, one.success) for one in waited] == [(0.5, False), (0.5, True), (0.0, False)]
    for judge, message in (
        ("words", "answered 'good' to trajectory 'lost'; wanted a finite outcome"),
        ("endless", r"answered \(inf, True\) to trajectory 'lost'; wanted a finite outcome"),
        ("huge", "answered 1000+ to trajectory 'lost'; wanted a finite outcome"),
        ("undefined", "answered nan to trajectory 'lost'; wanted a finite outcome"),
        ("breaks", "my_judge:breaks' failed on trajectory 'lost': ConnectionError: the model is gone"),
        ("waits_and_breaks", "failed on trajectory 'lost': ConnectionError: the model is gone"),
    ):
        with pytest.raises(UserError, match=message):
            rescore(episodes, load_rule(f"my_judge:{judge}"))
    for name in ("my_judge", "my_judge:nothing", "no_such_module:f"):
        with pytest.raises(UserError, match="rule "):
            load_rule(name)


def test_credit_of_scripted_episodes_is_that_of_the_method(episodes: list[Trajectory]) -> None:
    lines = credit_of(episodes, "rloo")
    assert [line["id"] for line in lines] == ["lost", "won"]
    assert lines[0]["episode"] == pytest.approx([-1.0] * 3)
    assert lines[1]["episode"] == pytest.approx([1.0] * 2)
    assert lines[0]["step"] == [0.0] * 3
    anchored = credit_of(episodes, "gigpo")
    assert anchored[0]["step"][0] < 0 < anchored[1]["step"][0], "both acted in 'start', and one of them won"
    with pytest.raises(UserError, match="needs 'prm', which a model computes"):
        credit_of(episodes, "oprl")
    with pytest.raises(UserError, match="no credit method 'gpro'; did you mean"):
        credit_of(episodes, "gpro")
    with pytest.raises(DataError, match="infrastructure ended all"):
        credit_of(episodes[2:], "rloo")


def test_rescore_writes_trajectories_and_credit(file: Path, tmp_path: Path) -> None:
    result = run(
        "rescore", file, "--rule", "return", "--success-above", 0.5, "--credit", "rloo", "--out", tmp_path / "again"
    )
    assert result.exit_code == 0, result.output
    assert "50.0%" in result.output
    assert "100.0%" in result.output
    stored = read_jsonl(tmp_path / "again" / "trajectories" / "episodes.jsonl")
    assert [one.outcome for one in stored] == [0.75, 1.0, 0.0]
    lines = [json.loads(line) for line in (tmp_path / "again" / "credit" / "episodes.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["lost", "won"]
    assert lines[1]["episode"] == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize("linked", [False, True])
def test_rescore_never_writes_over_what_it_reads(tmp_path: Path, episodes: list[Trajectory], linked: bool) -> None:
    stored = tmp_path / "run" / "trajectories" / "episodes.jsonl"
    write_jsonl(stored, episodes)
    other = tmp_path / "other.jsonl"
    write_jsonl(other, episodes)
    out = tmp_path / "run"
    if linked:
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "run")
    before = stored.read_bytes()
    result = run("rescore", other, stored, "--rule", "return", "--credit", "rloo", "--out", out)
    assert result.exit_code == 2
    assert "which is read; choose another folder" in " ".join(result.output.split())
    assert stored.read_bytes() == before
    assert [file.name for file in (tmp_path / "run").rglob("*.jsonl")] == ["episodes.jsonl"]


def test_rescore_of_files_that_share_ids_tells_their_episodes_apart(tmp_path: Path) -> None:
    for name, wins in (("a", (True, False)), ("b", (False, True))):
        write_jsonl(tmp_path / f"{name}.jsonl", [trajectory(str(n), [0.0], success=won) for n, won in enumerate(wins)])
    output = run("rescore", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--credit", "rloo").output
    assert re.search(r"successes\W+2\W+\+1\.0000", output), output
    assert re.search(r"failures\W+2\W+-1\.0000", output), output


@pytest.mark.parametrize(
    ("groups", "method", "told"),
    [
        (("a", "b"), "gigpo", True),
        (("a", "a"), "gigpo", False),
        (("a", "b"), "reinforce_pp", False),
    ],
    ids=["groups of one", "a group of two", "a method that compares with the batch"],
)
def test_credit_that_has_nothing_to_compare_with_is_told(
    tmp_path: Path, groups: tuple[str, str], method: str, told: bool
) -> None:
    pair = [trajectory(str(n), [0.0], success=n == 0, group=group) for n, group in enumerate(groups)]
    for name in ("one", "two"):  # a group lies within one file: the same name in another is another group
        write_jsonl(tmp_path / f"{name}.jsonl", pair)
    result = run("rescore", tmp_path / "one.jsonl", tmp_path / "two.jsonl", "--credit", method)
    assert result.exit_code == 0, result.output
    assert (f"every group has one trajectory, and {method} compares" in result.stderr) == told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--rule", "success", "--function", "a:b"], "give one of them"),
        (["--success-above", 1], "needs --rule return"),
        (["--credit", "rloo", "--credit-arg", "colour=red"], "colour"),
    ],
)
def test_rescore_says_what_is_wrong(file: Path, arguments: list[Any], message: str) -> None:
    result = run("rescore", file, *arguments)
    assert (result.exit_code, message in " ".join(result.output.split())) == (2, True), result.output
