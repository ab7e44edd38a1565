"""`compare` pairs tasks, says what it leaves out and refuses what cannot be compared; suites rank policies."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from typer.testing import CliRunner

import agentrl
from agentrl.buffer import write_jsonl
from agentrl.cli import app
from agentrl.errors import ConfigError, DataError, UserError
from agentrl.evaluate import wilson
from agentrl.evaluate.compare import compare
from agentrl.evaluate.suite import load_suite, play_suite
from agentrl.types import StopReason, Trajectory


def episodes(outcomes: dict[int, list[float]], env: str = "Toy-v0", **kwargs: Any) -> list[Trajectory]:
    """Trajectories by seed; success where the outcome is positive."""
    return [
        Trajectory(
            id=f"{env}-{seed}/{member}",
            group_id=f"{env}-{seed}",
            env=env,
            task={"kwargs": kwargs, "options": {}},
            seed=seed,
            outcome=value,
            success=value > 0,
        )
        for seed, values in outcomes.items()
        for member, value in enumerate(values)
    ]


def test_tasks_are_paired_and_weigh_the_same_however_many_episodes_they_have() -> None:
    a = episodes({1: [0.0], 2: [1.0, 0.0], 3: [0.0]})
    b = episodes({1: [1.0], 2: [1.0], 3: [0.0, 0.0, 1.0, 1.0]})
    found = compare(a, b)
    assert (found.tasks, found.episodes_a, found.episodes_b) == (3, 4, 6)
    assert (found.success.a, found.success.b) == pytest.approx((0.5 / 3, 2.5 / 3))
    assert found.success.difference.value == pytest.approx(2 / 3)
    assert found.success.p == pytest.approx(2 / 8)
    assert compare(b, a).success.difference.value == pytest.approx(-2 / 3)


def test_what_only_one_side_played_is_counted_and_left_out() -> None:
    failed = episodes({4: [0.0]})[0].model_copy(update={"stop_reason": StopReason.POLICY_ERROR})
    found = compare([*episodes({1: [1.0], 2: [0.0], 9: [1.0]}), failed], episodes({1: [1.0], 2: [1.0], 4: [1.0]}))
    assert (found.tasks, found.only_a, found.only_b, found.failures_a, found.failures_b) == (2, 1, 1, 1, 0)


def test_other_environments_and_arguments_are_refused_by_name() -> None:
    a = [*episodes({1: [1.0]}), *episodes({1: [1.0]}, env="Maze-v0")]
    with pytest.raises(UserError, match=r"A has episodes of Maze-v0, B has none; .*--env ID"):
        compare(a, episodes({1: [1.0]}))
    assert compare(a, episodes({1: [1.0]}), env="Toy-v0").tasks == 1
    with pytest.raises(UserError, match="B has no episode of 'Maze-v0'; it has: Toy-v0"):
        compare(a, episodes({1: [1.0]}), env="Maze-v0")
    with pytest.raises(UserError, match=r"Toy-v0: A and B .* \(size=6 and size=8\)"):
        compare(episodes({1: [1.0]}, size=6), episodes({1: [1.0]}, size=8))
    with pytest.raises(UserError, match=r"no task in common \(seeds 1\.\.2 and 5\.\.5\)"):
        compare(episodes({1: [1.0], 2: [1.0]}), episodes({5: [1.0]}))


def evaluation(folder: Path, outcomes: dict[int, list[float]], **settings: Any) -> Path:
    """A folder as `evaluate` leaves it."""
    env = {"id": "Toy-v0", "kwargs": {}, "eval_kwargs": {}, "max_turns": None, "wrappers": [], "instructions": None}
    whole = {
        "policy": {"name": "x", "options": {}},
        "environments": [env | settings.pop("env", {})],
        "rollout": {"history": "full", "max_context_tokens": 2048},
        "outcome": {"rule": "success", "success_above": None, "truncated": "scored"},
    } | settings
    write_jsonl(folder / "trajectories" / "0-Toy-v0.jsonl", episodes(outcomes))
    (folder / "settings.json").write_text(json.dumps(whole))
    return folder


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"env": {"max_turns": 5}}, "Toy-v0: max_turns: not set of A, 5 of B"),
        ({"env": {"instructions": "Hurry."}}, "Toy-v0: instructions: not set of A, 'Hurry.' of B"),
        ({"env": {"wrappers": [{"name": "w"}]}}, r"Toy-v0: wrappers: \[\] of A, \[\{'name': 'w'\}\] of B"),
        ({"outcome": {"rule": "return"}}, "outcome.rule: 'success' of A, 'return' of B"),
    ],
)
def test_other_rules_are_refused_by_name_and_compared_only_when_asked(
    tmp_path: Path, other: dict[str, Any], says: str
) -> None:
    a = evaluation(tmp_path / "a", {1: [1.0], 2: [1.0]})
    b = evaluation(tmp_path / "b", {1: [0.0], 2: [1.0]}, **other)
    for left, right in ((a, b), (a / "trajectories" / "0-Toy-v0.jsonl", b)):
        with pytest.raises(UserError, match=f"not played under the same rules: {says}; .*--anyway"):
            compare(left, right)
    found = compare(a, b, anyway=True)
    assert len(found.differences) == 1
    result = CliRunner().invoke(app, ["compare", str(a), str(b), "--anyway"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert f"Not only the policies differ: {found.differences[0]}." in result.output
    assert compare(a, evaluation(tmp_path / "c", {1: [0.0], 2: [1.0]})).differences == []


def test_what_a_model_sees_may_differ_and_is_told(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", {1: [1.0]})
    b = evaluation(tmp_path / "b", {1: [1.0]}, rollout={"history": "window(2)", "max_context_tokens": 2048})
    assert compare(a, b).differences == ["rollout.history: 'full' of A, 'window(2)' of B"]
    (b / "settings.json").write_text("[]")
    with pytest.raises(DataError, match=r"settings\.json: no settings of an evaluation"):
        compare(a, b)


def test_an_evaluation_that_was_interrupted_is_compared_only_when_asked(tmp_path: Path) -> None:
    whole = evaluation(tmp_path / "whole", {1: [1.0], 2: [0.0], 3: [0.0]}, episodes=3)
    part = evaluation(tmp_path / "part", {1: [1.0]}, episodes=3)
    for left, right in ((whole, part), (part, whole), (part / "trajectories" / "0-Toy-v0.jsonl", whole)):
        with pytest.raises(UserError, match=r"part.* is not complete \(1 of 3 episodes\): .*--anyway"):
            compare(left, right)
    assert compare(whole, whole).differences == []
    assert compare(whole, part, anyway=True).differences == [f"{part} is not complete (1 of 3 episodes)"]


def test_a_served_environment_is_paired_with_the_local_one() -> None:
    found = compare(episodes({1: [1.0], 2: [0.0]}, env="http://127.0.0.1:1/Toy-v0"), episodes({1: [1.0], 2: [1.0]}))
    assert (found.tasks, found.environments) == (2, ["Toy-v0"])
    assert found.differences == [
        "Toy-v0: 'http://127.0.0.1:1/Toy-v0' of A, 'Toy-v0' of B (arguments that a server's owner set are unknown)"
    ]


def test_a_turn_limit_that_is_the_registered_one_is_no_other_limit(tmp_path: Path) -> None:
    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "200"})

    common = ("eval", "Lock-v0", "--policy", "lock-solver", "--episodes", 8)
    limit = agentrl.make("Lock-v0").spec.max_episode_steps
    for name, options in (("own", ()), ("same", ("--max-turns", limit)), ("short", ("--max-turns", 5))):
        assert run(*common, *options, "--out", tmp_path / name).exit_code == 0
    assert run("compare", tmp_path / "own", tmp_path / "same").exit_code == 0
    refused = run("compare", tmp_path / "short", tmp_path / "own")
    assert (refused.exit_code, f"max_turns: 5 of A, {limit} of B" in refused.output) == (2, True)


def test_damaged_and_empty_files_are_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "good.jsonl", episodes({1: [1.0]}))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"id": 3')
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("empty.jsonl", "holds no trajectory"),
        ("broken.jsonl", "broken.jsonl line 1: cut off"),
        ("nowhere.jsonl", "no trajectory file"),
        ("folder", "no trajectory file in"),
    ):
        with pytest.raises(DataError, match=message):
            compare(tmp_path / "good.jsonl", tmp_path / name)
    failed = episodes({1: [0.0]})[0].model_copy(update={"stop_reason": StopReason.DEADLINE})
    with pytest.raises(DataError, match="no episode that can be scored"):
        compare([failed], episodes({1: [1.0]}))
    assert compare(tmp_path / "good.jsonl", tmp_path / "good.jsonl").success.p == 1.0


SUITE = """
name: two boards
episodes: 12
environments:
  small: {id: Sokoban-v0, kwargs: {max_solution: 3}}
  lock: {id: Lock-v0}
policies:
  random: {policy: random}
  expert: {policy: sokoban-solver, only: [small]}
  hasty: {policy: sokoban-noisy-solver, options: {skill: 0.2}, only: [small]}
"""


def test_a_suite_ranks_policies_and_plays_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(SUITE)
    suite = load_suite(tmp_path / "suite.yaml")
    assert suite.cells() == [("random", "small"), ("random", "lock"), ("expert", "small"), ("hasty", "small")]
    board = play_suite(suite, tmp_path / "out")
    assert [row.policy for row in board.rows] == ["random", "expert", "hasty"], "those that played everywhere first"
    assert board.rows[1].results["small"].success.value == 1.0
    assert f"| expert | {wilson(12, 12)} | - | - |" in board.markdown()
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.jsonl")}
    assert len(files) == 4
    result = CliRunner().invoke(
        app, ["leaderboard", str(tmp_path / "suite.yaml"), "--out", str(tmp_path / "out")], env={"COLUMNS": "80"}
    )
    assert result.exit_code == 0, result.output
    assert {file: file.stat().st_mtime_ns for file in files} == files
    written = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
    rows = [(row["policy"], row["mean_success"]) for row in written["rows"]]
    assert rows == [(row.policy, row.mean_success) for row in board.rows]


MIXED = """
episodes: 4
environments:
  lock: {id: Lock-v0}
  small: {id: Sokoban-v0, kwargs: {max_solution: 3}}
policies:
  mended: {policy: "mortal_agents:act", only: [lock]}
  solver: {policy: lock-solver, only: [lock]}
  random: {policy: random}
"""


def test_a_policy_that_fails_stops_no_other_and_is_played_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mortal_agents.py").write_text(
        "from pathlib import Path\ndef act(observation):\n    return Path('moves.txt').read_text().strip()\n"
    )
    (tmp_path / "suite.yaml").write_text(MIXED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])

    def play() -> Any:
        return CliRunner().invoke(app, ["leaderboard", "suite.yaml", "--out", "out"], env={"COLUMNS": "200"})

    first = play()
    assert first.exit_code == 1, first.output
    assert "failed: mended in lock: " in first.output
    assert "No such file or directory: 'moves.txt'" in first.output
    written = json.loads(Path("out/leaderboard.json").read_text())
    assert {row["policy"]: sorted(row["results"]) for row in written["rows"]} == {
        "mended": [],
        "solver": ["lock"],
        "random": ["lock", "small"],
    }
    table = Path("out/leaderboard.md").read_text()
    assert "| mended | failed | - | - |" in table
    assert "* mended in lock: " in table
    kept = {file: file.stat().st_mtime_ns for file in Path("out").rglob("*.jsonl") if "mended" not in file.parts}
    assert len(kept) == 3
    Path("moves.txt").write_text("a")
    second = play()
    assert second.exit_code == 0, second.output
    assert "failed" not in Path("out/leaderboard.md").read_text()
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "what was played stays"
    suite = load_suite("suite.yaml")
    suite.episodes = 8
    with pytest.raises(UserError, match="episodes=4, now episodes=8"):
        play_suite(suite, "out")
    assert json.loads(Path("out/leaderboard.json").read_text())["rows"][0]["policy"] == "random", "it is still there"


LATE = """
name: late
episodes: 8
rollout: {retries: 0}
environments: {lock: Lock-v0}
policies:
  random: random
  late: {policy: "late_agents:raises_late"}
"""


@pytest.mark.parametrize(("most", "code"), [(None, 4), (5, 4), (6, 0)])
def test_episodes_that_infrastructure_ended_are_told_in_their_cell_and_by_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int | None, code: int
) -> None:
    (tmp_path / "late_agents.py").write_text(
        "turns = []\n"
        "def raises_late(observation):\n"
        "    turns.append(observation)\n"
        "    if len(turns) > 40:\n"
        "        raise RuntimeError('worn out')\n"
        "    return 'aa'\n"
    )
    (tmp_path / "suite.yaml").write_text(LATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "late_agents", raising=False)
    options = [] if most is None else ["--max-failures", str(most)]
    result = CliRunner().invoke(app, ["leaderboard", "suite.yaml", "--out", "out", *options], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert "0.0% [0.0, 65.8] (6 failed)" in result.output
    assert "the same command plays again what failed" in result.stderr
    told = f"late in lock: infrastructure ended 6 of 8 episodes and --max-failures is {most or 0}; success is that of"
    assert (told in result.stderr) == (code == 4)
    table = Path("out/leaderboard.md").read_text()
    assert f"| late | {wilson(0, 2)} (6 failed) |" in table
    assert "in no figure: 6;" in table
    assert f"| random | {wilson(0, 8)} | 0.0% |" in table, "nothing failed there"


@pytest.mark.parametrize(
    ("lock", "message"),
    [
        ("Locc-v0", r"^environments.lock: no environment 'Locc-v0'; did you mean 'Lock-v0'"),
        ("{id: Lock-v0, kwargs: {lenght: 3}}", r"^environments.lock: .*lenght"),
        ("{id: Lock-v0, eval_kwargs: {length: 0}}", r"^environments.lock: length=0"),
        ("{id: Lock-v0, wrappers: [{name: recrd}]}", r"^environments.lock: no wrapper 'recrd'"),
        ("{id: Picky-v0}", r"^environments.lock: a size is above 0"),
    ],
)
def test_an_environment_that_cannot_be_made_is_told_before_anything_is_played(
    tmp_path: Path, picky: None, lock: str, message: str
) -> None:
    (tmp_path / "suite.yaml").write_text(SUITE.replace("{id: Lock-v0}", lock))
    with pytest.raises(UserError, match=message):
        play_suite(load_suite(tmp_path / "suite.yaml"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def picky() -> Iterator[None]:
    def refuse(**_: Any) -> gym.Env[Any, Any]:
        raise ValueError("a size is above 0")

    def lack(**_: Any) -> gym.Env[Any, Any]:
        raise SystemExit("no data set")

    gym.register("Picky-v0", refuse, disable_env_checker=True)
    gym.register("Bald-v0", lack, disable_env_checker=True)
    yield
    del gym.registry["Picky-v0"], gym.registry["Bald-v0"]


@pytest.mark.parametrize("lock", ["{id: 'http://127.0.0.1:9/Lock-v0', kwargs: {retry_s: 0}}", "Bald-v0"])
def test_an_environment_that_may_be_there_later_stops_no_other(tmp_path: Path, picky: None, lock: str) -> None:
    text = SUITE.replace("lock: {id: Lock-v0}", f"lock: {lock}") + "rollout: {retries: 0}\n"
    (tmp_path / "suite.yaml").write_text(text)
    board = play_suite(load_suite(tmp_path / "suite.yaml"), tmp_path / "out")
    assert [line.partition(":")[0] for line in board.failed] == ["random in lock"]
    assert board.rows[0].results["small"].success.episodes == 12


def test_a_name_alone_is_a_policy_or_an_environment(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text("environments: {lock: Lock-v0}\npolicies: {r: random}\n")
    suite = load_suite(tmp_path / "suite.yaml")
    assert (suite.environments["lock"].id, suite.policies["r"].policy) == ("Lock-v0", "random")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            SUITE.partition("policies:")[2],
            "",
            r"suite.yaml has no policies; give one or more, for instance policies: {",
        ),
        (SUITE.partition("policies:")[0], "", r"suite.yaml has no environments; give one or more, for instance"),
        ("{policy: random}", "{only: [lock]}", r"policies.random=.* in .*suite.yaml line 8: who acts\?"),
        ("only: [small]", "only: []", r"policies.expert.only=\[\] in .*suite.yaml line 9: .*at least 1"),
        ("policy: random", "polcy: random", r"policies.random.polcy=random in .*suite.yaml line 8"),
        ("only: [small]", "only: [big]", "names 'big'; environments are small, lock"),
        ("{policy: random}", "{}", "who acts?"),
        ("episodes: 12", "episodes: 12\nper_task: 5", "episodes=12 is no multiple of per_task=5"),
        ("episodes: 12", "episods: 12", "unknown key 'episods'"),
        ("  lock:", "  a/b:", "also that of a folder"),
    ],
)
def test_a_suite_that_cannot_run_says_why(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "suite.yaml").write_text(SUITE.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        load_suite(tmp_path / "suite.yaml")


def test_the_shipped_suite_loads() -> None:
    suite = load_suite(Path(__file__).parents[1] / "benchmarks" / "leaderboard.yaml")
    assert len(suite.cells()) == 6
