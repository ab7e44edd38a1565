"""The command line: what it prints, what it refuses, and the whole way from nothing to a trained model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import agentrl
from agentrl.buffer import read_jsonl
from agentrl.cli import app
from agentrl.cli.common import shown
from agentrl.cli.listing import reflow, signature
from agentrl.errors import InfrastructureError
from agentrl.policy import _REGISTERED, FunctionPolicy, PolicyRequest, register_policy

COMMANDS = ["envs", "policies", "collect", "init-model", "sft", "train", "eval", "benchmark"]
ENV = "Sokoban-v0"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def moves_on(request):
    """Moves on."""
    return "go"


def plain(text: str) -> str:
    """Returns `text` without colours, and with the line breaks of a narrow terminal undone."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def policies() -> Iterator[None]:
    before = dict(_REGISTERED)
    yield
    _REGISTERED.clear()
    _REGISTERED.update(before)


def refused(result: Result, *messages: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    text = plain(result.stderr)
    for message in messages:
        assert message in text


def test_help_and_version_of_the_module() -> None:
    help_text = subprocess.run([sys.executable, "-m", "agentrl", "--help"], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert command in help_text.stdout
    version = subprocess.run([sys.executable, "-m", "agentrl", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.strip() == f"agentrl {agentrl.__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: agentrl {command}" in plain(result.output)


def test_listings() -> None:
    assert ENV in run("envs").output
    details = plain(run("envs", ENV).output)
    assert "size=6" in details
    assert "first observation of seed 0" in details
    assert {"random", "transformers", "scripted"} <= set(run("policies").output.split())
    assert "threads=None" in run("policies", "transformers").output
    shown = run("policies", f"{__name__}:moves_on").output
    assert "the request" in shown
    assert "Moves on." in shown


def test_random_policy_to_a_file(tmp_path: Path) -> None:
    out = tmp_path / "new" / "t.jsonl"
    arguments = ["collect", ENV, "--policy", "random", "--episodes", 6, "--group-size", 3, "--seed", 5, "--out", out]
    result = run(*arguments, "--env-arg", "size=7", "--max-turns", 4)
    assert result.exit_code == 0, result.output
    episodes = read_jsonl(out)
    assert [(t.seed, t.group_id) for t in episodes] == [(5, "5")] * 3 + [(6, "6")] * 3
    assert all(len(t.turns) <= 4 for t in episodes)
    assert len(str(episodes[0].turns[0].observation).splitlines()) == 7
    assert "groups │ 2" in plain(result.output)
    before = out.read_bytes()
    assert run(*arguments, "--env-arg", "size=7", "--max-turns", 4).exit_code == 0
    again = read_jsonl(out)
    assert [[turn.action for turn in t.turns] for t in again] == [[turn.action for turn in t.turns] for t in episodes]
    assert len(before) > 0


def test_evaluation_as_json(tmp_path: Path) -> None:
    result = run("eval", ENV, "--policy", "random", "--episodes", 10, "--seed", 3, "--json", tmp_path / "e.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["success"]["episodes"] == found["episodes"] == 10
    assert found["seed"] == 3
    assert f"{found['success']['value']:.1%}" in result.output


def test_evaluation_with_the_settings_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"env: {{id: {ENV}, max_turns: 3, kwargs: {{size: 6}}, eval_kwargs: {{size: 8}}}}\n"
        "eval: {episodes: 4, seed: 9}\n"
    )
    arguments = ["eval", "run.yaml", "--policy", "random", "--json", "e.json"]
    assert run(*arguments).exit_code == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert (found["episodes"], found["seed"], found["env_kwargs"]) == (4, 9, {"size": 8})
    assert found["turns"] <= 3
    assert run(*arguments, "--env-arg", "size=7", "--episodes", 2).exit_code == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert (found["episodes"], found["env_kwargs"]) == (2, {"size": 7})


COLLECT = ["collect", ENV, "--policy", "random", "--out", "t.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["envs", "Sokobn-v0"], ["no environment 'Sokobn-v0'; did you mean 'Sokoban-v0'?"]),
        (["policies", "randm"], ["no policy 'randm'; did you mean 'random'?"]),
        (["collect", "Sokobn", "--policy", "random", "--out", "t.jsonl"], ["no environment 'Sokobn'"]),
        (["collect", ENV, "--policy", "rand", "--out", "t.jsonl"], ["no policy 'rand'", "'random'"]),
        (["collect", ENV, "--out", "t.jsonl"], ["--policy NAME", "--model DIR"]),
        ([*COLLECT, "--policy-arg", "x=1"], ["policy 'random' cannot be made with {'x': 1}"]),
        ([*COLLECT, "--env-arg", "siz=1"], ["'siz'"]),
        ([*COLLECT, "--env-arg", "size"], ["'size' assigns nothing", "--env-arg size=6"]),
        ([*COLLECT, "--episodes", "10", "--group-size", "3"], ["--episodes 10 is no multiple of --group-size 3"]),
        ([*COLLECT, "--history", "win"], ["history=win: history is 'full' or 'window(k)'"]),
        (["collect", ENV, "--policy", "random", "--out", "."], [". is a folder"]),
        (["eval", ENV, "--model", "nowhere"], ["no model directory 'nowhere'"]),
        (["eval", "nope.yaml", "--policy", "random"], ["no configuration file 'nope.yaml'"]),
        (["eval", ENV, "--policy", "random", "--json", "/dev/null/x/e.json"], ["cannot write to"]),
        (["train", "nope.yaml"], ["no configuration file 'nope.yaml'"]),
        (["sft", "base", "none.jsonl", "--out", "x"], ["no trajectory file 'none.jsonl'"]),
        (["init-model", "base", "--env", ENV, "--preset", "tin"], ["no preset 'tin'; did you mean 'tiny'?"]),
        (["colect"], ["No such command 'colect'", "Did you mean 'collect'?"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line(arguments: list[str], messages: list[str]) -> None:
    refused(run(*arguments), *messages)


def test_unwritable_output_is_said_before_any_episode(policies: None) -> None:
    def never(request: PolicyRequest) -> str:
        pytest.fail("played an episode that nobody can keep")

    register_policy("never", lambda: FunctionPolicy(never))
    refused(run("collect", ENV, "--policy", "never", "--out", "/dev/null/t.jsonl"), "cannot write to /dev/null")


def test_train_refuses_before_it_loads_anything(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("prm:\n  bta: 0.1\n")
    refused(run("train", "run.yaml"), "unknown key 'prm.bta' in run.yaml line 2; did you mean 'prm.beta'?")
    (tmp_path / "run.yaml").write_text("run_dir: runs/x\n")
    refused(run("train", "run.yaml", "--resume", "--overwrite"), "give one of them")
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "metrics.jsonl").write_text("")
    refused(run("train", "run.yaml"), "'runs/x' already holds a run", "--resume", "--overwrite", "--out")
    refused(run("train", "run.yaml", "run_dir=runs/y"), "model.path is empty")
    refused(run("train", "run.yaml", "run_dir=runs/y", "env.id=Sokobn-v0"), "did you mean 'Sokoban-v0'?")
    refused(run("train", "run.yaml", "run_dir=runs/y", "env.eval_kwargs.splt=test"), "'splt'")
    assert not (tmp_path / "runs" / "y").exists()


def test_other_exceptions_keep_their_traceback(policies: None) -> None:
    def broken(request: PolicyRequest) -> str:
        raise ZeroDivisionError("in the policy")

    register_policy("broken", lambda: FunctionPolicy(broken))
    result = run("collect", ENV, "--policy", "broken", "--episodes", 1, "--out", "t.jsonl")
    assert result.exit_code == 1
    assert isinstance(result.exception, (ZeroDivisionError, InfrastructureError))


@pytest.mark.parametrize("given", ["", "Push."])
def test_instructions_may_be_given(given: str, tmp_path: Path) -> None:
    out = tmp_path / "t.jsonl"
    command = ("collect", "Sokoban-v0", "--policy", "random", "--episodes", 2, "--max-turns", 2, "--out", out)
    assert run(*command, "--instructions", given).exit_code == 0
    assert {t.instructions for t in read_jsonl(out)} == {given}
    assert run(*command).exit_code == 0
    assert "Sokoban" in read_jsonl(out)[0].instructions


def test_interrupted_collection_keeps_what_was_finished(tmp_path: Path, policies: None) -> None:
    from environments.sokoban.agents import solver_policy

    solver = solver_policy()
    assert isinstance(solver, FunctionPolicy)

    def interrupting(request: PolicyRequest) -> str:
        if request.episode == "0/7/0#0":  # the eighth: episodes of a function are played one after the other
            signal.raise_signal(signal.SIGINT)
        return solver.function(request)

    register_policy("interrupting", lambda: FunctionPolicy(interrupting))
    result = run("collect", ENV, "--policy", "interrupting", "--episodes", 40, "--out", "t.jsonl")
    assert result.exit_code == 130, result.output
    assert "Traceback" not in result.output
    episodes = read_jsonl(tmp_path / "t.jsonl")
    assert [t.seed for t in episodes] == list(range(7))
    assert all(t.success for t in episodes)
    assert f"t.jsonl holds the {len(episodes)} of 40 episodes that were finished" in plain(result.stderr)


def test_interrupt_ends_a_process_with_130(tmp_path: Path) -> None:
    (tmp_path / "stop.py").write_text(
        "import signal\n\ndef play(observation):\n    signal.raise_signal(signal.SIGINT)\n    return 'up'\n"
    )
    command = [sys.executable, "-m", "agentrl", "collect", ENV, "--policy", "scripted"]
    command += ["--policy-arg", "function=stop:play", "--episodes", "2", "--out", "t.jsonl"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "t.jsonl holds the 0 of 2 episodes" in plain(done.stderr)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, fine-tuned on a few random episodes, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("models")
    shape = ["--hidden", 32, "--layers", 1, "--heads", 2]
    made = run("init-model", folder / "base", "--env", ENV, "--episodes", 4, *shape)
    assert made.exit_code == 0, made.output
    demos = folder / "demos.jsonl"
    assert run("collect", ENV, "--policy", "random", "--episodes", 24, "--max-turns", 4, "--out", demos).exit_code == 0
    demos.write_bytes(demos.read_bytes()[:-50])
    broken = run("sft", folder / "base", demos, "--out", folder / "sft", "--threads", 1)
    refused(broken, "demos.jsonl line 24: cut off before its end", "--skip-broken")
    assert not (folder / "sft").exists()
    tuned = run("sft", folder / "base", demos, "--out", folder / "sft", "--threads", 1, "--skip-broken", "--lr", 3e-3)
    assert tuned.exit_code == 0, tuned.output
    assert "episodes │ 23" in plain(tuned.output)
    assert "skipped" in tuned.stderr
    assert "line 24" in plain(tuned.stderr)
    return folder


def test_a_model_plays_and_is_measured(base: Path) -> None:
    arguments = ["--model", base / "sft", "--max-turns", 2, "--max-new-tokens", 4, "--threads", 1]
    result = run("collect", ENV, *arguments, "--episodes", 4, "--out", "m.jsonl", "--temperature", 0)
    assert result.exit_code == 0, result.output
    assert all(turn.action_ids and turn.action_logprobs for t in read_jsonl("m.jsonl") for turn in t.turns)
    result = run("eval", ENV, *arguments, "--episodes", 4, "--temperature", 0.5, "--json", "e.json")
    assert result.exit_code == 0, result.output
    found = json.loads(Path("e.json").read_text())
    assert found["temperature"] == 0.5
    assert 1 <= found["action_tokens"] <= 8


def test_train_resume_and_overwrite(base: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "run_dir": "runs/x",
        "iterations": 1,
        "env": {"max_turns": 2},
        "model": {"path": str(base / "sft"), "threads": 1},
        "rollout": {"groups": 2, "group_size": 2, "max_new_tokens": 4},
        "eval": {"every": 0},
        "log": {"tensorboard": False, "progress": False},
        "checkpoint": {"every": 1},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    refused(run("train", "run.yaml", "run_dir=/dev/null/x"), "cannot write to /dev/null/x")
    result = run("train", "run.yaml", "credit.method=grpo")
    assert result.exit_code == 0, result.output
    assert "2 groups x 2 = 4 episodes" in plain(result.output)
    assert (tmp_path / "runs" / "x" / "config.yaml").exists()
    refused(run("train", "run.yaml"), "already holds a run")
    refused(run("train", "run.yaml", "--overwrite", "model.path=runs/x/model"), "would remove 'runs/x/model'")
    refused(run("train", "run.yaml", "--overwrite", "credit.options.alfa=1"), "alfa")
    refused(run("train", "run.yaml", "--overwrite", "model.path=nowhere"), "no model directory 'nowhere'")
    assert (tmp_path / "runs" / "x" / "model").exists()
    (tmp_path / "runs" / "x" / "notes.txt").write_text("mine")
    result = run("train", "run.yaml", "credit.method=rloo", "--overwrite")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "x" / "notes.txt").read_text() == "mine"
    assert "method: rloo" in (tmp_path / "runs" / "x" / "config.yaml").read_text()
    result = run("train", "run.yaml", "credit.method=rloo", "--resume")
    assert result.exit_code == 0, result.output
    assert "1 of 1" in result.output


def test_model_output_never_replaces_something_else(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    refused(run("init-model", "mine", "--env", ENV), "holds something that is no model")
    refused(run("sft", base / "base", base / "demos.jsonl", "--out", "mine"), "holds something that is no model")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_values_as_people_read_them() -> None:
    assert shown(None) == shown({}) == "-"
    assert shown(0) == "0"
    assert shown(True) == "yes"
    assert shown(1234567) == "1,234,567"
    assert shown(0.123456) == "0.1235"
    assert shown({"turn_limit": 2, "terminated": 1}) == "2 x turn_limit, 1 x terminated"
    assert shown({"split": "test", "size": 6}) == "split=test, size=6"


def test_signatures_and_docstrings_fit_the_terminal() -> None:
    def factory(a: int, *, b: str = "x", **rest: object) -> None: ...

    assert signature(factory) == "a (required)\nb='x'"
    text = "One line that\ngoes on.\n\nArgs:\n    first: something\n        long.\n    second: more."
    assert reflow(text, 80) == ("One line that goes on.\n\nArgs:\n    first: something long.\n    second: more.")
    assert max(map(len, reflow(text, 20).splitlines())) <= 20
