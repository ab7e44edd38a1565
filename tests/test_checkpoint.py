"""A run that is killed, stopped or interrupted goes on as if nothing had happened: same metrics, same weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from doomed import TESTS
from toys import SOKOBAN, run_config, timeless
from typer.testing import CliRunner

from agentrl.buffer import TrajectoryBuffer, read_jsonl
from agentrl.cli import app
from agentrl.config import RunConfig, dump_config
from agentrl.errors import DataError, UserError
from agentrl.models.load import load_model, load_tokenizer
from agentrl.train.checkpoint import checkpoint_path, checkpoints, read_state, write_checkpoint
from agentrl.train.metrics import read_metrics
from agentrl.train.stop import StopRequest
from agentrl.train.trainer import Trainer, train

SETTINGS: dict[str, Any] = {
    "iterations": 6,
    "env": SOKOBAN | {"id": "doomed:Doomed-v0"},
    "rollout__concurrency": 4,
    "eval": {"every": 3, "episodes": 4},
    "checkpoint__every": 2,
    "policy_update__minibatches": 2,
    "policy_update__schedule": "cosine",
}
"""Environment resets: 1-4 evaluate, 5-28 play iterations 1-3, 29-32 evaluate, 33-40 play iteration 4; four at once."""
IN_ITERATION_3, IN_EVALUATION, IN_ITERATION_4 = 26, 30, 38

METHODS: dict[str, dict[str, Any]] = {
    "rloo": {},
    "oprl": {
        "credit__method": "oprl",
        "buffer__keep_iterations": 2,
        "prm": {"lr": 1e-3, "reference": "frozen", "centred": True, "replay_iterations": 2},
        "policy_update__kl_coef": 0.01,
    },
    # The reference moves before iterations 3 and 5; the checkpoint after iteration 3 lies in between.
    "rebase": {
        "credit__method": "oprl",
        "prm": {"lr": 1e-3, "reference": "rebase", "rebase_every": 2, "updates": 2},
        "checkpoint__every": 3,
    },
}


@dataclass
class Ended:
    """A run whose process has ended."""

    config: RunConfig
    status: int
    """Exit code, or minus the signal that killed it."""
    output: str

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def kept(self) -> list[int]:
        return [int(path.name[-6:]) for path in checkpoints(self.folder / "checkpoints")]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> dict[str, Ended]:
    """Runs of the command line that ended before their time."""
    folder = tmp_path_factory.mktemp("ended")
    kill, interrupt, terminate = int(signal.SIGKILL), int(signal.SIGINT), int(signal.SIGTERM)
    ends: dict[str, tuple[str, dict[str, Any]]] = {
        **{method: (method, {"plan": {IN_ITERATION_4: [kill]}}) for method in METHODS},
        "writing": ("rloo", {"dies_writing": 2}),
        "interrupted": ("rloo", {"plan": {IN_ITERATION_3: [interrupt]}}),
        "terminated": ("oprl", {"plan": {IN_EVALUATION: [terminate]}}),
        "at once": ("rloo", {"plan": {IN_ITERATION_3: [interrupt, terminate]}}),
    }
    jobs, configs = [], []
    for name, (method, end) in ends.items():
        config = run_config(folder / name, warm, **SETTINGS | METHODS[method])
        dump_config(config, folder / f"{name}.yaml")
        jobs.append({"argv": ["train", str(folder / f"{name}.yaml")], "log": str(folder / f"{name}.log"), **end})
        configs.append(config)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(TESTS / "doomed.py"), str(folder / "jobs.json"), str(warm)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "300"})
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout)
    logs = [Path(job["log"]).read_text() for job in jobs]
    return {name: Ended(*one) for name, one in zip(ends, zip(configs, statuses, logs, strict=True), strict=True)}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> Any:
    """method -> folder of the run that nothing stopped."""
    done: dict[str, Path] = {}

    def play(method: str) -> Path:
        if method not in done:
            done[method] = tmp_path_factory.mktemp("unbroken") / method
            train(run_config(done[method], warm, **SETTINGS | METHODS[method]))
        return done[method]

    return play


def same(one: Path, other: Path) -> None:
    """Both runs have the same metrics in all but time, the same weights to the bit, the same trajectories."""
    mine, theirs = read_metrics(one), read_metrics(other)
    assert [record["iteration"] for record in mine] == list(range(7))
    assert [timeless(record) for record in mine] == [timeless(record) for record in theirs]
    elapsed = [record["elapsed"] for record in mine[1:]]
    assert elapsed == sorted(elapsed)
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    assert Path("model/model.safetensors") in files
    assert Path("checkpoints/iteration-000006/policy/model.safetensors") in files
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    for number in range(6):
        name = f"trajectories/iteration-{number:06d}.jsonl"
        pairs = zip(read_jsonl(one / name), read_jsonl(other / name), strict=True)
        assert all(
            [(s.action_ids, s.action_logprobs) for s in a.turns] == [(s.action_ids, s.action_logprobs) for s in b.turns]
            for a, b in pairs
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_in_the_middle_of_an_iteration_ends_like_an_unbroken_one(
    method: str, ended: dict[str, Ended], unbroken: Any
) -> None:
    run = ended[method]
    assert run.status == -signal.SIGKILL, run.output
    assert [record["iteration"] for record in read_metrics(run.folder)] == [0, 1, 2, 3]
    assert run.kept == [3 if method == "rebase" else 2]
    played = {t.success for record in (run.folder / "trajectories").glob("*") for t in read_jsonl(record)}
    assert played == {True, False}
    if method == "rloo":
        command = ["train", str(run.folder.with_suffix(".yaml")), "--resume"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert "6 of 6" in result.output
    else:
        train(run.config, resume=True)
    same(run.folder, unbroken(method))


def test_the_buffer_of_a_killed_run_comes_back(ended: dict[str, Ended], tmp_path: Path) -> None:
    folder = shutil.copytree(ended["oprl"].folder, tmp_path / "run")
    for later in checkpoints(folder / "checkpoints")[1:]:
        shutil.rmtree(later)
    trainer = Trainer(ended["oprl"].config.model_copy(update={"run_dir": str(folder)}), resume=True)
    at = trainer.iteration
    assert trainer.buffer.iterations() == [at - 2, at - 1]
    for iteration in trainer.buffer.iterations():
        assert trainer.buffer.of(iteration) == read_jsonl(folder / f"trajectories/iteration-{iteration:06d}.jsonl")
    trainer.close()


def test_a_kill_between_the_last_byte_and_the_rename_costs_one_checkpoint(
    ended: dict[str, Ended], unbroken: Any
) -> None:
    run = ended["writing"]
    assert run.status == -signal.SIGKILL, run.output
    (torn,) = [path for path in (run.folder / "checkpoints").iterdir() if path.name.startswith(".")]
    assert (torn / "state.pt").exists()
    assert run.kept == [2]
    train(run.config, resume=True)
    assert not torn.exists()
    same(run.folder, unbroken("rloo"))


def test_one_interrupt_finishes_the_iteration_saves_and_exits_0(ended: dict[str, Ended], unbroken: Any) -> None:
    run = ended["interrupted"]
    assert run.status == 0, run.output
    assert "stopping after this iteration" in run.output
    assert "3 of 6" in run.output
    assert "--resume" in run.output
    assert run.kept == [2, 3]
    assert (run.folder / "model" / "model.safetensors").exists()
    train(run.config, resume=True)
    same(run.folder, unbroken("rloo"))


def test_sigterm_while_evaluating_saves_too(ended: dict[str, Ended], unbroken: Any) -> None:
    run = ended["terminated"]
    assert run.status == 0, run.output
    assert run.kept == [2, 3]
    assert "eval" in read_metrics(run.folder)[-1]
    train(run.config, resume=True)
    same(run.folder, unbroken("oprl"))


def test_a_second_signal_exits_at_once_with_130(ended: dict[str, Ended]) -> None:
    run = ended["at once"]
    assert run.status == 130, run.output
    assert run.kept == [2]
    assert [record["iteration"] for record in read_metrics(run.folder)] == [0, 1, 2]


def test_a_signal_during_the_first_evaluation_trains_nothing(
    warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path / "run", warm, iterations=1, eval={"every": 1, "episodes": 2})
    real = Trainer.evaluate

    def interrupted(trainer: Trainer) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(trainer)

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    result = train(config)
    assert (result["iteration"], result["interrupted"]) == (0, True)
    assert not (tmp_path / "run" / "checkpoints").exists()
    monkeypatch.setattr(Trainer, "evaluate", real)
    result = train(config, resume=True)
    assert (result["iteration"], result["interrupted"]) == (1, False)
    assert [record["iteration"] for record in read_metrics(tmp_path / "run")] == [0, 1]


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    def handlers() -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def enter() -> None:
        with StopRequest() as stop:
            found.append((handlers(), stop.requested))

    before, found = handlers(), []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(before, False)]


def test_signals_are_handled_as_before_once_a_run_has_ended(warm: Path, tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train(run_config(tmp_path / "run", warm, iterations=1))
    assert {number: signal.getsignal(number) for number in before} == before


# --- what cannot be resumed ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> RunConfig:
    """A run of 3 iterations with checkpoints after the second and third."""
    config = run_config(tmp_path_factory.mktemp("finished") / "run", warm, credit__method="oprl")
    train(config)
    return config


@pytest.fixture
def copied(finished: RunConfig, tmp_path: Path) -> RunConfig:
    shutil.copytree(finished.run_dir, tmp_path / "run")
    return finished.model_copy(update={"run_dir": str(tmp_path / "run")})


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the resolved settings, which name the folder itself."""
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / "config.yaml"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("file", ["state.pt", "policy/model.safetensors", "prm/config.json", "buffer/buffer.json"])
def test_a_broken_checkpoint_is_named_and_the_one_before_can_be_used(copied: RunConfig, file: str) -> None:
    folder = Path(copied.run_dir)
    second, third = checkpoints(folder / "checkpoints")
    broken = third / file
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    before = content(folder)
    with pytest.raises(DataError, match=rf"{third.name} cannot be read.*remove it to resume from the one before"):
        Trainer(copied, resume=True)
    assert content(folder) == before
    weights = (folder / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(third)
    assert train(copied, resume=True)["iteration"] == 3
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
    assert [path.name for path in checkpoints(folder / "checkpoints")] == [second.name, third.name]


def test_another_configuration_is_refused_and_nothing_changes(copied: RunConfig) -> None:
    before = content(Path(copied.run_dir))
    other = copied.model_copy(deep=True)
    other.prm.beta = 0.1
    with pytest.raises(
        UserError,
        match=r"another configuration \(prm\.beta=0\.05 then, 0\.1 now\); resume with the one in .*config\.yaml",
    ):
        Trainer(other, resume=True)
    assert content(Path(copied.run_dir)) == before


def test_a_checkpoint_older_than_a_setting_is_resumed_with_its_default_only(copied: RunConfig) -> None:
    path = checkpoints(Path(copied.run_dir) / "checkpoints")[-1] / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["config"]["rollout"]["max_episode_tokens"]
    torch.save(state, path)
    other = copied.model_copy(deep=True)
    other.rollout.max_episode_tokens = 9
    with pytest.raises(UserError, match=r"rollout\.max_episode_tokens=None then, 9 now"):
        Trainer(other, resume=True)
    assert train(copied, resume=True)["iteration"] == 3


def test_a_finished_run_resumes_to_nothing(copied: RunConfig) -> None:
    before = content(Path(copied.run_dir))
    played: list[Any] = []
    assert train(copied, resume=True, on_episode=played.append)["iteration"] == 3
    assert not played
    assert content(Path(copied.run_dir)) == before


def test_a_new_run_does_not_start_over_an_old_one(copied: RunConfig) -> None:
    before = content(Path(copied.run_dir))
    with pytest.raises(UserError, match=r"already holds a run; resume it, remove it, or choose another run_dir"):
        Trainer(copied)
    assert content(Path(copied.run_dir)) == before


def test_resuming_before_the_first_checkpoint_starts_afresh(copied: RunConfig) -> None:
    folder = Path(copied.run_dir)
    expected = [timeless(record) for record in read_metrics(folder)]
    shutil.rmtree(folder / "checkpoints")
    train(copied, resume=True)
    assert [timeless(record) for record in read_metrics(folder)] == expected


# --- the files themselves ---


@pytest.fixture(scope="module")
def parts(warm: Path) -> tuple[Any, Any]:
    return load_model(warm), load_tokenizer(warm)


def write(folder: Path, iteration: int, parts: tuple[Any, Any], keep: int = 2) -> Path:
    return write_checkpoint(folder, iteration, {"policy": parts}, {"iteration": iteration}, TrajectoryBuffer(1), keep)


def test_the_newest_are_kept_in_the_order_of_their_numbers(tmp_path: Path, parts: tuple[Any, Any]) -> None:
    for iteration in (5, 999_998, 999_999, 1_000_000):
        write(tmp_path, iteration, parts)
    newest = [checkpoint_path(tmp_path, 999_999), checkpoint_path(tmp_path, 1_000_000)]
    assert checkpoints(tmp_path) == newest
    assert sorted(tmp_path.iterdir()) == sorted(newest)
    assert read_state(newest[-1]) == {"iteration": 1_000_000}
    assert json.loads((newest[-1] / "state.json").read_text()) == {"iteration": 1_000_000}


def test_a_full_disk_leaves_the_checkpoints_as_they_were(
    tmp_path: Path, parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, parts)
    before = content(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agentrl.train.checkpoint._sync", full)
    with pytest.raises(UserError, match=r"cannot write checkpoint .*000002.*No space left.*earlier .* untouched"):
        write(tmp_path, 2, parts, keep=1)
    assert content(tmp_path) == before


def test_a_directory_without_a_state_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoint_path(tmp_path, 1).mkdir()
    assert checkpoints(tmp_path) == []
    assert checkpoints(tmp_path / "nowhere") == []
