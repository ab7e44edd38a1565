"""The training loop end to end: reproducible, loud when something is wrong, calm when it is only infrastructure."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import perturbed
from toys import SOKOBAN, Echo, parrot, register, run_config, timeless

from agentrl.batch import build_batch, score
from agentrl.buffer import read_jsonl
from agentrl.config import load_config
from agentrl.errors import (
    AgentRLError,
    ConfigError,
    DeadlineExceeded,
    InfrastructureError,
    ModelError,
    NonFiniteError,
    UserError,
)
from agentrl.models.load import load_model
from agentrl.policy import _REGISTERED, register_policy
from agentrl.train.checkpoint import checkpoints
from agentrl.train.metrics import read_metrics
from agentrl.train.trainer import Trainer, train
from agentrl.types import StopReason
from policies.transformers import TransformersPolicy


def never(trajectory: Any) -> None:
    pytest.fail("an episode was played")


@pytest.fixture
def policies() -> Iterator[None]:
    before = dict(_REGISTERED)
    yield
    _REGISTERED.clear()
    _REGISTERED.update(before)


# --- the same numbers ---


@pytest.mark.parametrize("method", ["grpo", "rloo", "oprl"])
def test_the_seed_decides_every_number(method: str, tmp_path: Path, warm: Path) -> None:
    runs = {}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        config = run_config(tmp_path / name, warm, iterations=2, seed=seed, credit__method=method)
        train(config)
        weights = (tmp_path / name / "model" / "model.safetensors").read_bytes()
        runs[name] = [timeless(record) for record in read_metrics(tmp_path / name)], weights
    assert runs["one"] == runs["again"]
    assert runs["one"][0] != runs["other"][0]
    assert runs["one"][1] != runs["other"][1]


RUN: dict[str, Any] = {
    "env": SOKOBAN | {"kwargs": {**SOKOBAN["kwargs"], "reward": "shaped"}},
    "credit__method": "oprl",
    "eval": {"every": 2, "episodes": 6},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> Path:
    """Folder of a finished run with evaluations."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(run_config(folder, warm, **RUN))
    return folder


def test_a_run_leaves_what_it_promises(run: Path, warm: Path) -> None:
    records = read_metrics(run)
    assert [record["iteration"] for record in records] == [0, 1, 2, 3]
    assert [bool(record.get("eval")) for record in records] == [True, False, True, True]
    assert records[0]["eval"]["success"]["episodes"] == 6
    assert load_config(run / "config.yaml") == run_config(run, warm, **RUN)
    assert "2 groups x 4 = 8 episodes" in (run / "plan.txt").read_text()
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["iteration-000002", "iteration-000003"]
    assert not list(run.rglob(".*"))
    seconds = records[1]["seconds"]
    assert set(seconds) == {"generation", "environment", "prm", "policy", "other"}
    assert 0 < sum(seconds.values()) <= records[1]["elapsed"]
    assert records[1]["elapsed"] < records[2]["elapsed"] < records[3]["elapsed"]
    assert 100 < records[1]["peak_memory_mb"] <= records[3]["peak_memory_mb"] < 10_000


def test_every_iteration_plays_new_tasks_in_whole_groups(run: Path) -> None:
    seeds = set()
    for number in range(3):
        played = read_jsonl(run / "trajectories" / f"iteration-{number:06d}.jsonl")
        assert [t.id for t in played] == [f"{number:06d}-{g:04d}/{member}" for g in range(2) for member in range(4)]
        assert {t.iteration for t in played} == {number}
        assert {turn.policy_version for t in played for turn in t.turns} == {number}
        mine = {t.group_id: t.seed for t in played}
        assert all(mine[t.group_id] == t.seed for t in played)
        assert not seeds & set(mine.values())
        seeds |= set(mine.values())


def test_a_pool_of_tasks_is_dealt_evenly(tmp_path: Path, warm: Path, trainer_of: Callable[..., Trainer]) -> None:
    trainer = trainer_of(run_config(tmp_path / "run", warm, rollout__tasks=5, rollout__groups=2))
    dealt = []
    for iteration in range(5):
        dealt += [task.seed for task in trainer.dealer.deal(2, iteration)]
    assert len(set(dealt)) == 5
    assert sorted(dealt[:5]) == sorted(dealt[5:])
    assert dealt[:5] != dealt[5:]


def test_the_last_checkpoint_holds_the_weights_that_were_saved(run: Path) -> None:
    last = checkpoints(run / "checkpoints")[-1]
    saved = (run / "model" / "model.safetensors").read_bytes()
    assert (last / "policy" / "model.safetensors").read_bytes() == saved
    assert (last / "prm" / "model.safetensors").read_bytes() != saved


# --- weights in the engine ---


class Engine(TransformersPolicy):
    """An engine with weights of its own, as a server has; `deaf` to what the trainer sends from some version on."""

    deaf_from: float = math.inf

    def __init__(self, *, model: Any, tokenizer: Any) -> None:
        super().__init__(copy.deepcopy(model), tokenizer=tokenizer)

    def load_weights(self, weights: Any, version: int) -> None:
        super().load_weights({} if version >= self.deaf_from else weights, version)


@pytest.fixture
def engine(policies: None, monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    register_policy("engine", Engine)
    monkeypatch.setattr(Engine, "deaf_from", math.inf)
    return Engine


@pytest.mark.parametrize("name", ["human", "random"])
def test_a_policy_that_takes_no_model_is_no_engine(
    name: str, tmp_path: Path, warm: Path, trainer_of: Callable[..., Trainer]
) -> None:
    with pytest.raises(UserError, match=f"model.engine='{name}' .*cannot be trained"):
        trainer_of(run_config(tmp_path, warm, model__engine=name))


def test_an_engine_with_weights_of_its_own_trains_alike(engine: Any, tmp_path: Path, warm: Path) -> None:
    for name in ("transformers", "engine"):
        train(run_config(tmp_path / name, warm, model__engine=name))
    mine, theirs = (
        [timeless(record) for record in read_metrics(tmp_path / name)] for name in ("engine", "transformers")
    )
    assert mine == theirs


def test_weights_that_do_not_arrive_are_noticed_at_once(
    engine: Any, tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "deaf_from", 2)
    with pytest.raises(AgentRLError, match=r"weight sync failed: the engine's weights are \w+, the trainer's \w+"):
        train(run_config(tmp_path / "run", warm, model__engine="engine"))
    assert [record["iteration"] for record in read_metrics(tmp_path / "run")] == [1]


def test_weights_changed_behind_the_trainers_back_stop_the_run(
    engine: Any, tmp_path: Path, warm: Path, trainer_of: Callable[..., Trainer]
) -> None:
    trainer = trainer_of(run_config(tmp_path / "run", warm, model__engine="engine"))
    assert trainer.iterate()["logprob_mismatch"] < 1e-4
    trainer.policy.model.load_state_dict(perturbed(trainer.policy.model, 0.3).state_dict())
    with pytest.raises(AgentRLError, match=r"differ from the trainer's by .* nats \(limit 0.05\)"):
        trainer.iterate()


@pytest.mark.parametrize("rank", [0, 4])
def test_where_the_models_beside_the_policy_do_not_fit_the_way_out_is_said(
    tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    def full(_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("agentrl.train.judge.twin", full)
    config = run_config(tmp_path / "run", warm, credit={"method": "oprl"}, lora={"rank": rank})
    words = r"models beside the policy: CUDA out of memory.*smaller model.*agentrl explain"
    with pytest.raises(ModelError, match=words) as caught:
        Trainer(config)
    assert ("lora.rank=16" in str(caught.value)) == (not rank)


def test_episodes_that_use_up_their_tokens_are_counted_and_trained_on(
    tmp_path: Path, warm: Path, trainer_of: Callable[..., Trainer]
) -> None:
    rollout = {"groups": 2, "group_size": 4, "history": "window(0)", "max_new_tokens": 3, "max_episode_tokens": 4}
    trainer = trainer_of(run_config(tmp_path / "run", warm, rollout=rollout))
    metrics = trainer.iterate()
    assert metrics["stop_reasons"]["token_limit"] > 0
    assert metrics["truncated"] == metrics["stop_reasons"]["token_limit"] / metrics["episodes"]
    assert trainer.last is not None
    assert max(t.action_tokens for t in trainer.last.batch.trajectories) == 4
    assert metrics["logprob_mismatch"] < 1e-4


def test_an_engine_without_weights_cannot_be_trained(policies: None, tmp_path: Path, warm: Path) -> None:
    register_policy("weightless", lambda **_: parrot(1.0))
    with pytest.raises(UserError, match=r"model.engine='weightless' has no weights and cannot be trained"):
        Trainer(run_config(tmp_path / "run", warm, model__engine="weightless"))


# --- NaN ---


@pytest.fixture
def stopped(tmp_path: Path, warm: Path) -> tuple[Trainer, dict[str, bytes]]:
    """A run after one saved iteration, and what its folder holds."""
    trainer = Trainer(run_config(tmp_path / "run", warm, credit__method="oprl", prm={"lr": 1e-3}))
    trainer.run_dir.joinpath("notes.txt").write_text("mine")
    trainer._log(trainer.iterate())
    trainer.save()
    return trainer, {str(path): path.read_bytes() for path in trainer.run_dir.rglob("*") if path.is_file()}


def spoil(model: Any) -> None:
    """Makes every log-prob of `model` NaN."""
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)


@pytest.mark.parametrize("where", ["prm", "policy", "outcome", "gradient"])
def test_nan_stops_the_run_keeps_the_evidence_and_overwrites_nothing(
    where: str, stopped: tuple[Trainer, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, before = stopped
    if where == "prm":
        assert trainer.judge.prm is not None
        spoil(trainer.judge.prm.model)
    elif where == "policy":
        real = trainer.judge.judge
        monkeypatch.setattr(trainer.judge, "judge", lambda *given: (real(*given), spoil(trainer.model))[0])
    elif where == "outcome":
        monkeypatch.setattr("agentrl.rollout.collector.score", lambda *_: (math.nan, False))
    else:
        next(trainer.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(NonFiniteError) as caught:
        trainer.iterate()
    folder = trainer.run_dir
    evidence = folder / "failed" / "iteration-000001.jsonl"
    good = folder / "checkpoints" / "iteration-000001"
    assert f"its trajectories are in {evidence}; last good checkpoint: {good}" in str(caught.value)
    assert str(caught.value).startswith("iteration 1: ")
    assert [t.id for t in read_jsonl(evidence)] == [f"000001-{g:04d}/{member}" for g in range(2) for member in range(4)]
    assert {path: Path(path).read_bytes() for path in before} == before
    trainer.close()


def test_nan_weights_are_named_while_sampling(stopped: tuple[Trainer, dict[str, bytes]]) -> None:
    trainer, _ = stopped
    spoil(trainer.model)
    with pytest.raises(NonFiniteError, match=r"iteration 1: .*NaN.*last good checkpoint: .*iteration-000001"):
        trainer.iterate()
    trainer.close()


def test_nan_before_the_first_checkpoint(tmp_path: Path, warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentrl.rollout.collector.score", lambda *_: (math.nan, False))
    with pytest.raises(NonFiniteError, match=r"iteration 0: .*last good checkpoint: none yet"):
        train(run_config(tmp_path / "run", warm))
    assert not (tmp_path / "run" / "model").exists()
    assert (tmp_path / "run" / "failed" / "iteration-000000.jsonl").exists()


# --- infrastructure failures, and groups that teach nothing ---


class Fated(Echo):
    """Word episodes that fail, or reward, by `fate`: reset number -> what happens at the first action."""

    fate: Callable[[int], str] = staticmethod(lambda reset: "play")
    resets = 0

    def begin(self, options: dict[str, Any]) -> Any:
        self.mine = type(self).resets
        type(self).resets += 1
        return super().begin(options)

    def next(self, right: bool) -> Any:
        fate = type(self).fate(self.mine)
        if fate == "fail":
            raise ConnectionError("the game server is gone")
        if fate == "silence":
            raise DeadlineExceeded("no word from the game server")
        observation, reward, done, info = super().next(right)
        return observation, reward, done, info | ({"success": fate == "win"} if fate != "play" else {})


register("Fated-v0", Fated)
FATED: dict[str, Any] = {"env": {"id": "Fated-v0"}, "rollout__history": "full", "rollout__retries": 0}


@pytest.fixture
def fate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], str]], None]:
    monkeypatch.setattr(Fated, "resets", 0)
    return lambda decide: monkeypatch.setattr(Fated, "fate", staticmethod(decide))


@pytest.mark.parametrize("method", ["rloo", "oprl"])
def test_failed_episodes_are_counted_and_in_no_mean(
    method: str, fate: Any, tmp_path: Path, hesitant: Path, trainer_of: Callable[..., Trainer]
) -> None:
    # Members of the first group: won, failed, lost, failed; of the second: all failed but the last, which is won.
    plan = ["win", "fail", "lose", "fail", "fail", "fail", "fail", "win"]
    fate(lambda reset: plan[reset % 8])
    trainer = trainer_of(run_config(tmp_path / "run", hesitant, **FATED, credit__method=method))
    for _ in range(2):
        metrics = trainer.iterate()
        assert metrics["success"] == metrics["outcome"] == pytest.approx(2 / 3)
        assert (metrics["episodes"], metrics["episodes_failed"], metrics["episodes_retried"]) == (3, 5, 0)
        assert metrics["stop_reasons"] == {"terminated": 3, "environment_error": 5}
        groups = metrics["groups"]
        assert (groups["groups"], groups["mixed"], groups["singleton"], groups["unscorable"]) == (2, 1, 1, 5)
        assert trainer.last is not None
        batch, episode = trainer.last.batch, trainer.last.advantage.episode
        assert [t.id[-1] for t in batch.trajectories] == ["0", "2", "3"]
        first, second, alone = (episode[batch.index.traj_of_turn == n] for n in range(3))
        assert (first > 0).all()
        assert (second < 0).all()
        assert (alone == 0).all()
    stored = read_jsonl(tmp_path / "run" / "trajectories" / "iteration-000000.jsonl")
    assert [t.stop_reason for t in stored] == [StopReason.TERMINATED] * 3 + [StopReason.ENVIRONMENT_ERROR] * 5
    assert all("the game server is gone" in (t.error or "") and t.outcome == 0 for t in stored[3:])


def test_retries_are_counted_and_hide_a_passing_fault(
    fate: Any, tmp_path: Path, hesitant: Path, trainer_of: Callable[..., Trainer]
) -> None:
    fate(lambda reset: "fail" if reset < 3 else "play")
    trainer = trainer_of(run_config(tmp_path / "run", hesitant, **FATED | {"rollout__retries": 1}))
    metrics = trainer.iterate()
    assert (metrics["episodes"], metrics["episodes_failed"], metrics["episodes_retried"]) == (8, 0, 3)


@pytest.mark.parametrize("method", ["grpo", "rloo", "oprl"])
def test_groups_that_all_won_or_all_lost_are_counted_and_move_nothing(
    method: str, fate: Any, tmp_path: Path, hesitant: Path, trainer_of: Callable[..., Trainer]
) -> None:
    fate(lambda reset: "win" if reset % 8 < 4 else "lose")
    trainer = trainer_of(run_config(tmp_path / "run", hesitant, **FATED, credit__method=method))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for _ in range(2):
        metrics = trainer.iterate()
        assert (metrics["groups"]["all_success"], metrics["groups"]["all_failure"]) == (1, 1)
        assert metrics["success"] == 0.5
        assert metrics["advantage_std"] == 0
        assert metrics.get("prm_steps", 0) == metrics.get("pairs", 0) == 0
    assert trainer.last is not None
    assert not trainer.last.advantage.token.any()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_an_iteration_without_pairs_trains_on_replayed_ones(
    fate: Any, tmp_path: Path, hesitant: Path, trainer_of: Callable[..., Trainer]
) -> None:
    fate(lambda reset: "win" if reset % 2 and reset < 8 else "lose")
    config = run_config(
        tmp_path / "run",
        hesitant,
        **FATED,
        credit__method="oprl",
        buffer__keep_iterations=2,
        prm={"lr": 1e-3, "replay_iterations": 2},
    )
    trainer = trainer_of(config)
    steps = [trainer.iterate() for _ in range(3)]
    assert [step["pairs"] for step in steps] == [8, 8, 0]
    assert [step["prm_steps"] for step in steps] == [1, 1, 0]
    assert ["pair_accuracy" in step for step in steps] == [True, False, False]


@pytest.mark.parametrize("fates", [("fail", "fail"), ("fail", "silence")], ids=["one reason", "two reasons"])
def test_an_iteration_that_failed_altogether_is_loud(
    fates: tuple[str, str], fate: Any, tmp_path: Path, hesitant: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fate(lambda reset: "play" if reset < 8 else fates[reset % 2])
    with pytest.raises(InfrastructureError, match=r"iteration 1: .*the game server is gone.*iteration-000001"):
        train(run_config(tmp_path / "run", hesitant, **FATED))
    assert [record["iteration"] for record in read_metrics(tmp_path / "run")] == [1]


# --- refused before any work ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"credit__method": "opral"}, r"no credit method 'opral'; did you mean 'oprl'"),
        ({"credit": {"method": "oprl", "options": {"alfa": 1}}}, r"alfa.*alpha"),
        ({"env": SOKOBAN | {"id": "Sokobn-v0"}}, r"no environment 'Sokobn-v0'; did you mean 'Sokoban-v0'"),
        ({"env": SOKOBAN | {"kwargs": {"siz": 6}}}, r"'siz'"),
        ({"env": SOKOBAN | {"eval_kwargs": {"splt": "test"}}}, r"'splt'"),
        ({"model__engine": "transformer"}, r"no policy 'transformer'; did you mean 'transformers'"),
        ({"model__path": ""}, r"model.path is empty"),
        ({"model__path": "nowhere"}, r"no model directory 'nowhere'"),
        ({"prm": {"init": "nowhere"}}, r"no model directory 'nowhere'"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_what_cannot_work_is_refused_and_leaves_no_trace(
    settings: dict[str, Any], message: str, tmp_path: Path, warm: Path
) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(run_config(tmp_path / "runs" / "x", warm, **settings), on_episode=never)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout__top_k": 5}, "rollout.top_k=5 while training"),
        ({"prm": {"replay_iterations": 3}}, "raise the latter"),
        ({"prm": {"holdout": 0.5}}, "set prm.updates > 1"),
        ({"buffer": {"keep_iterations": 2}, "prm": {"centred": True, "replay_iterations": 2}}, "prm.reference=frozen"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_impossible_combinations_are_refused(settings: dict[str, Any], message: str, warm: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_config(Path("x"), warm, **settings)
    assert message in str(caught.value)


def test_an_unwritable_run_dir_is_refused_before_any_episode(tmp_path: Path, warm: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in ("file", "file/run"):
        with pytest.raises(UserError, match=r"cannot write to .*file"):
            Trainer(run_config(tmp_path / folder, warm), on_episode=never)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("place", ["model", "checkpoints/iteration-000003/policy"])
def test_a_run_never_overwrites_the_model_it_starts_from(place: str, run: Path, tmp_path: Path) -> None:
    start = shutil.copytree(run, tmp_path / "run") / place
    with pytest.raises(UserError, match=r"would overwrite .*, which it starts from; choose another run_dir"):
        Trainer(run_config(tmp_path / "run", start), resume=True, on_episode=never)


class Disk:
    """A disk with `free` bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 0
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=10**12, used=0, free=self.free))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize(
    ("settings", "copies"),
    [
        # Weights and two moments each time: of the policy, of the PRM; and a rebased reference.
        ({"checkpoint__keep": 1}, 2 * 3 + 2),
        ({"checkpoint__keep": 3}, 4 * 3 + 2),
        ({"checkpoint__keep": 1, "credit__method": "oprl"}, 2 * (3 + 3) + 2),
        ({"checkpoint__keep": 1, "credit__method": "oprl", "prm": {"reference": "frozen"}}, 2 * (3 + 3) + 2),
        ({"checkpoint__keep": 1, "credit__method": "oprl", "prm": {"reference": "rebase"}}, 2 * (3 + 3 + 1) + 2),
    ],
    ids=lambda value: str(value),
)
def test_a_disk_too_small_for_the_checkpoints_is_refused_before_any_episode(
    settings: dict[str, Any], copies: int, disk: Disk, tmp_path: Path, warm: Path
) -> None:
    need = copies * 4 * sum(p.numel() for p in load_model(warm).parameters())
    config = run_config(tmp_path / "run", warm, **settings)
    disk.free = need - 1
    with pytest.raises(UserError, match=rf"{need / 2**20:,.0f} MiB are needed; free some space or choose another"):
        Trainer(config, on_episode=never)
    disk.free = need
    Trainer(config, on_episode=never).close()


def test_the_estimate_is_what_a_run_then_takes(disk: Disk, tmp_path: Path, warm: Path, run: Path) -> None:
    weights = 4 * sum(p.numel() for p in load_model(warm).parameters())
    kept = [run / "model", *checkpoints(run / "checkpoints")]
    big = ("model.safetensors", "state.pt")
    taken = sum(path.stat().st_size for folder in kept for path in folder.rglob("*") if path.name in big)
    assert taken == pytest.approx(weights * (1 + 2 * (3 + 3)), rel=0.1)
    # Two checkpoints lie there already: a resumed run needs room for one more, and for one more model.
    copied = shutil.copytree(run, tmp_path / "run")
    config = load_config(run / "config.yaml").model_copy(update={"run_dir": str(copied)})
    disk.free = weights * (3 + 3 + 2) - 1
    with pytest.raises(UserError, match="MiB are needed"):
        Trainer(config, resume=True)
    disk.free += 1
    Trainer(config, resume=True).close()


# --- callbacks, evaluation, progress ---


def test_callbacks_see_every_episode_and_every_iteration(tmp_path: Path, warm: Path) -> None:
    episodes: list[str] = []
    records: list[dict[str, Any]] = []
    config = run_config(tmp_path / "run", warm, iterations=2, eval={"every": 2, "episodes": 3})
    last = train(config, on_episode=lambda t: episodes.append(t.id), on_iteration=records.append)
    assert len(episodes) == 2 * 8
    assert [record["iteration"] for record in records] == [0, 1, 2]
    assert last["iteration"] == 2
    assert last["interrupted"] is False
    assert Path(last["checkpoint"]) == tmp_path / "run" / "checkpoints"
    assert last["eval"]["episodes"] == 3


def test_progress_is_shown_on_standard_error(
    tmp_path: Path, warm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = run_config(tmp_path / "run", warm, iterations=2, credit__method="oprl", log__progress=True)
    config.eval.every, config.eval.episodes = 2, 4
    train(config)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "2/2" in shown.err
    assert "held-out" in shown.err


def test_evaluation_uses_held_out_settings_and_changes_nothing(
    tmp_path: Path, warm: Path, trainer_of: Callable[..., Trainer]
) -> None:
    env = SOKOBAN | {"eval_kwargs": {"max_solution": 4}}
    trainer = trainer_of(run_config(tmp_path / "run", warm, env=env, eval={"episodes": 8, "seed": 77}))
    state = torch.get_rng_state()
    first, again = trainer.evaluate(), trainer.evaluate()
    greedy = trainer.evaluate(temperature=0.0)
    assert first.model_dump(exclude={"seconds", "episode_seconds"}) == again.model_dump(
        exclude={"seconds", "episode_seconds"}
    )
    assert first.env_kwargs["max_solution"] == 4
    assert (first.seed, first.episodes, first.temperature, greedy.temperature) == (77, 8, 1.0, 0.0)
    assert torch.equal(state, torch.get_rng_state())


# --- offline, from the files of a run ---


def test_stored_trajectories_give_the_same_batch(run: Path) -> None:
    stored = read_jsonl(run / "trajectories" / "iteration-000001.jsonl")
    batch = build_batch(stored)
    assert read_metrics(run)[2]["action_tokens"] == batch.index.K
    assert batch.tokens == read_metrics(run)[2]["tokens"]
    # Iteration 1 was played by the weights that version 1 names: those before its update. They are gone; the next
    # iteration's are in the checkpoint.
    stored = read_jsonl(run / "trajectories" / "iteration-000002.jsonl")
    player = load_model(run / "checkpoints" / "iteration-000002" / "policy")
    batch = build_batch(stored)
    found = score(player, batch, budget=10**6).logprob
    assert float((found - batch.behaviour).abs().max()) < 1e-4


SNIPPETS = Path(__file__).resolve().parents[1] / "docs" / "offline.md"


def snippet(number: int) -> str:
    """The code of a fenced block of docs/offline.md."""
    blocks = SNIPPETS.read_text().split("```python\n")[1:]
    return blocks[number].partition("```")[0]


@pytest.fixture
def documented(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where ``runs/demo/train`` is a finished run, as the documentation has it."""
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    shutil.copytree(run, tmp_path / "runs" / "demo" / "train")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "demo" / "train"


def test_documented_scoring_under_another_rule(documented: Path) -> None:
    names: dict[str, Any] = {}
    exec(snippet(0), names)
    episodes = names["episodes"]
    assert len(episodes) == 3 * 8
    assert {episode.success for episode in episodes} == {True, False}
    for episode in episodes:
        paid = sum(sum(turn.info["reward_parts"].values()) for turn in episode.turns)
        assert episode.outcome == pytest.approx(paid)
        assert episode.outcome not in (0.0, 1.0)  # what it was under the rule of the run
        assert episode.success == (paid > 0.5)


def test_documented_training_of_a_prm_and_a_policy(documented: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(snippet(0), names)
    exec(snippet(1), names)
    assert len(names["pairs"].winner) > 0
    assert names["metrics"]["prm_moved"] > 0
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("loss")]
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)
    assert losses[-1] < 0.9 * losses[0]
    batch = names["batch"]
    assert names["reward"].shape == (batch.index.K,)
    assert (documented.parent / "prm" / "model.safetensors").exists()
    exec(snippet(2), names)
    assert names["advantage"].step.any()
    assert names["metrics"]["policy_grad_norm"] > 0
    trained, start = names["student"].state_dict(), load_model(documented / "model").state_dict()
    assert not all(torch.equal(tensor, start[name]) for name, tensor in trained.items())
