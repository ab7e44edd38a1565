"""`agentrl new-env`: what it writes works as written; and `agentrl envs --stats`, which measures it."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from typer.testing import CliRunner

from agentrl.cli import app
from agentrl.envs import TextEnv, register, registry
from agentrl.envs.check import check_env
from agentrl.envs.scaffold import new_environment
from agentrl.errors import UserError
from agentrl.evaluate import environments
from agentrl.evaluate.environments import agent_stats


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder; what is imported from there is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    registry.load_plugins()
    modules, known, ours = set(sys.modules), dict(gym.registry), dict(registry._OURS)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]
    for books, before in ((gym.registry, known), (registry._OURS, ours)):
        books.clear()
        books.update(before)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.mark.parametrize("name", ["treasure-hunt", "AVeryLongNameOfAnEnvironmentThatGoesOn"])
def test_the_scaffold_is_at_most_40_lines_and_passes_its_check(name: str) -> None:
    made = new_environment(name)
    lines = made.module.read_text().splitlines()
    assert len(lines) <= 40
    report = check_env(made.env_id)
    assert report.passed, str(report)
    assert "expert solved 5 of 5" in str(report)


def test_its_own_test_passes_as_written(folder: Path) -> None:
    made = new_environment("treasure-hunt", folder / "new" / "place")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", made.test.name]
    done = subprocess.run(command, cwd=made.test.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_its_own_test_fails_where_the_environment_is_broken(folder: Path) -> None:
    made = new_environment("treasure-hunt")
    made.module.write_text(made.module.read_text().replace("self.np_random.integers(1, 32)", "7"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", made.test.name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "all give the same episode" in done.stdout


@pytest.mark.parametrize(
    ("name", "module", "env_id"),
    [
        ("treasure-hunt", "treasure_hunt", "TreasureHunt-v0"),
        ("treasure_hunt", "treasure_hunt", "TreasureHunt-v0"),
        ("TreasureHunt", "treasure_hunt", "TreasureHunt-v0"),
        ("treasure hunt", "treasure_hunt", "TreasureHunt-v0"),
        ("lamps2", "lamps_2", "Lamps2-v0"),
        ("LLMGame", "llm_game", "LLMGame-v0"),
        ("x", "x", "X-v0"),
    ],
)
def test_names_are_derived(name: str, module: str, env_id: str) -> None:
    made = new_environment(name)
    assert (made.env_id, made.module.name, made.test.name) == (
        f"{module}:{env_id}",
        f"{module}.py",
        f"test_{module}.py",
    )
    importlib.invalidate_caches()
    importlib.import_module(module)
    assert env_id in gym.registry


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "a letter first"),
        ("3d", "a letter first"),
        ("../up", "a letter first"),
        ("two__words", "a letter first"),
        ("naïve", "a letter first"),
        ("class", "'class' already"),
        ("Json", "'json' already"),
        ("pytest", "'pytest' already"),
        ("sokoban", "'Sokoban-v0' exists already"),
    ],
)
def test_bad_and_taken_names_are_refused_and_nothing_is_written(name: str, says: str, folder: Path) -> None:
    with pytest.raises(UserError, match=says):
        new_environment(name)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("existing", ["treasure_hunt.py", "test_treasure_hunt.py"])
def test_nothing_is_overwritten(existing: str, folder: Path) -> None:
    (folder / existing).write_text("mine")
    result = invoke("new-env", "treasure-hunt")
    assert result.exit_code == 2
    assert f"{existing} exists and is not overwritten" in result.stderr
    assert [path.name for path in folder.iterdir()] == [existing]
    assert (folder / existing).read_text() == "mine"


def test_the_command_says_what_to_do_next(folder: Path) -> None:
    result = invoke("new-env", "treasure-hunt", "--out", "worlds")
    assert result.exit_code == 0, result.output
    assert (folder / "worlds" / "treasure_hunt.py").is_file()
    assert "cd worlds && python -m agentrl check-env treasure_hunt:TreasureHunt-v0" in result.output
    assert "cd worlds && python -m pytest test_treasure_hunt.py" in result.output


def test_stats_measure_every_agent_of_an_environment(folder: Path) -> None:
    new_environment("treasure-hunt")
    importlib.invalidate_caches()
    env_id = "treasure_hunt:TreasureHunt-v0"
    result = invoke("envs", env_id, "Lock-v0", "--stats", "--episodes", "30", "--json", "stats.json")
    assert result.exit_code == 0, result.output
    assert "words" in result.output
    assert "tokens" not in result.stdout
    report = json.loads((folder / "stats.json").read_text())
    agents = {(agent["env"], agent["role"]): agent for agent in report["agents"]}
    assert [*agents] == [(env_id, "random"), (env_id, "expert"), *(("Lock-v0", r) for r in registry.ROLES)]
    expert, lock = agents[env_id, "expert"], agents["Lock-v0", "expert"]
    assert expert["success"] | {"low": 0} == {"value": 1, "low": 0, "high": 1, "episodes": 30}
    assert agents[env_id, "random"]["success"]["value"] < 0.9
    assert expert["policy"] == "halve"
    assert 7.9 < expert["words"] <= 9
    assert (lock["turns"], lock["characters"], lock["words"], lock["tokens"]) == (6, 13, 6, None)
    assert all(agent["steps_per_second"] > 100 for agent in agents.values())


def test_tokens_are_counted_where_there_is_a_tokenizer() -> None:
    stats = agent_stats("Lock-v0", "expert", episodes=2, tokens=lambda text: len(text) + 1)
    assert stats.tokens == stats.characters + 1 == 14


def test_speed_is_that_of_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(environments, "_REPLAY_S", 1e9)
    monkeypatch.setattr(environments, "perf_counter", lambda: float(next(clock)))
    stats = agent_stats("Lock-v0", "expert", episodes=4)
    assert (stats.steps_per_second, stats.resets_per_second) == (6, 1), "the clock ticks once a reset, once an episode"


class Missing(TextEnv):
    def __init__(self) -> None:
        raise UserError("needs the package shop: pip install 'agentrl[shop]'")

    begin = parse_action = play = None  # type: ignore[assignment]


def test_environments_that_cannot_be_measured_are_named_and_the_rest_is_shown() -> None:
    register("StatsMissing-v0", Missing, agents={"random": "random"})
    register("StatsBare-v0", "environments.lock.env:LockEnv", max_turns=5)
    register("StatsBroken-v0", "environments.lock.env:LockEnv", max_turns=5, agents={"naive": "no-such"})
    result = invoke(
        "envs", "StatsMissing-v0", "StatsBare-v0", "StatsBroken-v0", "Lock-v0", "--stats", "--episodes", "3"
    )
    assert result.exit_code == 0, result.output
    assert "StatsMissing-v0: needs the package shop: pip install 'agentrl[shop]'" in result.stderr
    assert "StatsBare-v0: registered without scripted agents" in result.stderr
    assert "StatsBroken-v0, naive: no policy 'no-such'" in result.stderr
    assert re.search(r"Lock-v0 *\n +random .*\n +naive .*\n +expert ", result.stdout)
    assert "Stats" not in result.stdout


def test_a_role_without_an_agent_is_said_and_a_table_of_nothing_is_not_shown() -> None:
    register("StatsLone-v0", "environments.lock.env:LockEnv", max_turns=5, agents={"random": "random"})
    result = CliRunner().invoke(
        app, ["envs", "StatsLone-v0", "Sokoban-v0", "--stats", "--episodes", "3"], env={"COLUMNS": "80"}
    )
    assert re.search(r"StatsLone-v0 *\n +random .*\n +naive: none *\n +expert: none", result.stdout)
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    register("StatsMissing-v0", Missing)
    bare = invoke("envs", "StatsMissing-v0", "--stats", "--episodes", "3")
    assert (bare.exit_code, bare.stdout) == (0, "")


def test_options_of_stats_without_it_are_refused() -> None:
    result = invoke("envs", "--json", "x.json")
    assert result.exit_code == 2
    assert "go with --stats" in result.stderr
    with pytest.raises(UserError, match="has no master agent"):
        agent_stats("Lock-v0", "master")
    assert invoke("envs", "--stats", "Lok-v0", "--episodes", "2").exit_code == 0


def test_an_environments_page_names_its_agents() -> None:
    result = invoke("envs", "Lock-v0", "Sokoban-v0")
    assert result.exit_code == 0, result.output
    assert "naive: lock-noisy-solver --policy-arg skill=0.5" in result.output
    assert "expert: sokoban-solver" in result.output
