"""``agentrl benchmark``: what a suite means, runs that die, stop and go on, and the numbers of the table."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from toys import timeless
from typer.testing import CliRunner, Result

from agentrl.benchmark.run import State, changed_settings, locked, state_of
from agentrl.benchmark.suite import Suite, check_runs, load_suite, plan_runs, select
from agentrl.benchmark.table import cost_cells, markdown, notes, paired, run_figures, success_cells, summarise
from agentrl.cli import app
from agentrl.config.load import assign
from agentrl.errors import ConfigError, UserError
from agentrl.report.curves import plot_methods
from agentrl.train.metrics import read_metrics

TESTS = Path(__file__).parent
CONFIG: dict[str, Any] = {
    "iterations": 9,
    "env": {"id": "mortal:Mortal-v0"},
    "rollout": {"groups": 2, "group_size": 4, "max_new_tokens": 3},
    "prm": {"lr": 1e-3, "beta": 0.1},
    "credit": {"method": "oprl", "options": {"alpha": 0.5}},
    "policy_update": {"lr": 1e-3},
    "eval": {"every": 1, "episodes": 8},
}
SUITE: dict[str, Any] = {
    "name": "small",
    "out": "out",
    "seeds": [0, 1],
    "baseline": "plain",
    "settings": {"iterations": 3, "checkpoint.every": 1},
    "environments": {
        "echo": {"config": "run.yaml", "base": {"lessons": [{"policy": "random", "episodes": 800, "lr": 0.01}]}}
    },
    "methods": {"plain": {"credit": {"method": "rloo"}}},
}


def write(folder: Path, suite: dict[str, Any], config: dict[str, Any] = CONFIG) -> str:
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    return str(folder / "suite.yaml")


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Suite]:
    """Loads SUITE, changed by dotted keys, in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def load(**changes: Any) -> Suite:
        data = copy.deepcopy(SUITE)
        for key, value in changes.items():
            assign(data, key.replace("__", "."), value)
        return load_suite(write(tmp_path, data))

    return load


# The file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seedz": [0]}, r"no key 'seedz'; did you mean 'seeds'\? \(seedz in .*suite.yaml line \d+\)"),
        ({"environments__echo__confg": "x"}, r"no key 'confg'; did you mean 'config'\? \(environments.echo.confg"),
        ({"environments__echo__base__lessns": []}, r"did you mean 'lessons'"),
        ({"environments__echo__base__lessons": [{"polcy": "random"}]}, r"did you mean 'policy'"),
        ({"environments__echo__base__lessons": []}, r"environments.echo.base.lessons"),
        ({"environments": {}}, r"environments"),
        ({"methods": {"../x": {}}}, r"'../x' names a folder"),
        ({"methods": {"base": {}}}, r"'base' names a folder"),
        ({"baseline": "plian"}, r"no method 'plian'; did you mean 'plain'\?"),
        ({"level": 2}, r"level=2 in .*suite.yaml line \d+: should be less than or equal to 1"),
        ({"seeds": [1, 1]}, r"a seed stands twice"),
        ({"seeds": []}, r"seeds=\[\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_broken_suite_names_key_and_line(suite: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        suite(**changes)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"prm": {"bta": 1}}, r"unknown key 'prm.bta' in .*suite.yaml line \d+; did you mean 'prm.beta'"),
        ({"prm.beta": -1}, r"prm.beta=-1 in .*suite.yaml line \d+: should be greater than 0"),
        ({"eval": {"every": 0}}, r"eval.every=0: the table is made of held-out evaluations"),
        ({"seed": 3}, r"methods.odd.seed: the benchmark sets name, run_dir, seed of its runs itself"),
        ({"model": {"path": "m"}}, r"'base' makes the model that model.path names"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_that_cannot_work_names_environment_and_method(suite: Any, method: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=r"environment 'echo', method 'odd': " + message):
        plan_runs(suite(methods__odd=method))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods__odd": {"credit": {"method": "opral"}}}, r"environment 'echo', method 'odd': .*did you mean 'oprl'"),
        ({"methods__odd": {"env.kwargs": {"tuns": 1}}}, r"environment 'echo', method 'odd': .*'tuns'"),
        ({"methods__odd": {"rollout.group_size": 1}}, r"environment 'echo', method 'odd': .*a group of one"),
        ({"environments__echo__base__lessons": [{"policy": "randm", "episodes": 1}]}, r"'echo', base: .*'random'"),
        ({"environments__echo__base": None}, r"environment 'echo', method 'plain': .*model"),
    ],
    ids=["method", "env", "group", "teacher", "model"],
)
def test_names_are_checked_before_anything_runs(suite: Any, changes: dict[str, Any], message: str) -> None:
    loaded = suite(**changes)
    with pytest.raises(ConfigError, match=message):
        check_runs(loaded, plan_runs(loaded))


def test_settings_come_in_layers_and_credit_is_replaced_as_a_whole(suite: Any) -> None:
    loaded = suite(
        settings={"iterations": 3, "prm": {"lr": 0.5}, "env.kwargs.at": 5},
        environments__echo__settings={"prm": {"grad_clip": 7}, "iterations": 4},
        methods={
            "as-is": None,
            "other": {"credit": {"method": "rloo"}, "prm": {"lr": 0.25}, "env": {"kwargs": {"fate": "dies"}}},
            "dotted": {"credit.options.alpha": 0.75, "prm.lr": 0.125},
        },
        baseline="other",
    )
    config = {run.method: run.config for run in plan_runs(loaded) if run.seed == 1}
    assert [config[m].iterations for m in config] == [4, 4, 4]
    assert [config[m].prm.lr for m in config] == [0.5, 0.25, 0.125]
    assert {(c.prm.beta, c.prm.grad_clip) for c in config.values()} == {(0.1, 7)}
    assert config["other"].env.kwargs == {"at": 5, "fate": "dies"}
    credit = {m: (c.credit.method, c.credit.options) for m, c in config.items()}
    assert credit == {"as-is": ("oprl", {"alpha": 0.5}), "other": ("rloo", {}), "dotted": ("oprl", {"alpha": 0.75})}
    own = config["dotted"]
    assert (own.seed, own.run_dir, own.model.path) == (1, "out/echo/dotted/seed-1", "out/echo/base")
    assert (own.model.threads, own.log.progress, own.checkpoint.every) == (1, False, 10)


def test_all_methods_get_one_seed_before_any_gets_two(suite: Any) -> None:
    runs = plan_runs(suite(methods__other={}, environments__second={"config": "run.yaml", "settings": {}}))
    assert [str(run) for run in runs[:5]] == [
        "echo/plain seed 0",
        "echo/other seed 0",
        "second/plain seed 0",
        "second/other seed 0",
        "echo/plain seed 1",
    ]
    assert {str(run) for run in select(runs, ["second/*", "echo/other"])} == {str(r) for r in runs} - {
        "echo/plain seed 0",
        "echo/plain seed 1",
    }
    assert select(runs, []) == runs
    with pytest.raises(UserError, match=r"--only echo/plan: no such ENVIRONMENT/METHOD.*echo/plain"):
        select(runs, ["echo/plan"])


def test_the_shipped_suite_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TESTS.parent)
    shipped = load_suite("benchmarks/suite.yaml")
    runs = plan_runs(shipped)
    check_runs(shipped, runs)
    assert len(shipped.seeds) >= 3
    assert {"oprl", "ground_truth", "gigpo", "prime", "spro", "prpo", "rloo", "grpo"} == {
        run.config.credit.method for run in runs
    }
    settings = {run.method: run.config.model_dump_json(exclude={"name", "run_dir", "seed"}) for run in runs[:12]}
    assert len(set(settings.values())) == len(shipped.methods), "two methods are one"


# The runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a suite whose methods are one: undisturbed, killed once, and told to stop once."""
    folder = tmp_path_factory.mktemp("benchmark")
    rloo = SUITE["methods"]["plain"]
    methods = {"plain": rloo}
    for fate in ("dies", "stops"):
        methods[fate] = {**rloo, "env.kwargs": {"fate": fate, "marker": str(folder / fate)}}
    write(folder, {**SUITE, "methods": methods, "seeds": [0]})
    return folder


def call(place: Path, *arguments: str) -> Result:
    """Runs the command in `place`, where its processes can import the tests' environments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("COLUMNS", "200")
        result = CliRunner().invoke(app, ["benchmark", "suite.yaml", "--jobs", "2", *arguments])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result


def states(place: Path) -> dict[str, State]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return {run.method: state_of(run) for run in plan_runs(load_suite("suite.yaml"))}


class Story(NamedTuple):
    """Three calls of the same command, and what lay in the folders after each."""

    results: list[Result]
    states: list[dict[str, State]]
    tables: list[str]


@pytest.fixture(scope="module")
def story(place: Path) -> Story:
    """In the first call a run is killed; the second, which goes on with it, is told to stop; the third ends well."""
    told = Story([], [], [])
    for only in (["plain", "dies"], ["dies", "stops"], ["*"]):
        told.results.append(call(place, *(f"--only=echo/{name}" for name in only)))
        told.states.append(states(place))
        told.tables.append((place / "out" / "benchmark.md").read_text())
    return told


def test_a_run_that_fails_is_reported_and_the_others_finish(story: Story) -> None:
    first = story.results[0]
    assert first.exit_code == 1, first.output
    assert "echo/dies seed 0 failed, exit code -9:" in first.stderr
    assert "Plan of run 'echo/dies'" in first.stderr, "the end of its log is shown"
    assert story.states[0] == {"plain": State.COMPLETE, "dies": State.BEGUN, "stops": State.MISSING}
    assert "| plain | 1 |" in story.tables[0]
    assert "Missing in echo: dies (seed 0); stops (seed 0)." in story.tables[0]


def test_a_signal_lets_every_run_save_and_the_same_command_goes_on(story: Story) -> None:
    _, stopped, last = story.results
    assert stopped.exit_code == 130, stopped.output
    assert "the same command goes on" in stopped.stderr
    assert story.states[1]["stops"] == State.BEGUN
    assert last.exit_code == 0, last.output
    assert set(story.states[2].values()) == {State.COMPLETE}
    assert "Missing" not in story.tables[2]


def test_runs_that_were_broken_off_end_with_the_numbers_of_one_that_was_not(story: Story, place: Path) -> None:
    plain, *others = (place / "out" / "echo" / method / "seed-0" for method in ("plain", "dies", "stops"))
    undisturbed = timeless(read_metrics(plain))
    assert [record["iteration"] for record in undisturbed] == [0, 1, 2, 3]
    assert {record["success"] for record in undisturbed[1:]} != {0.0}
    assert (plain / "log.txt").read_text().count("Plan of run") == 1, "what is complete is not run again"
    for folder in others:
        found = timeless(read_metrics(folder))
        for record in (*found, *undisturbed):
            record.get("eval", {}).pop("env_kwargs", None)
        assert found == undisturbed
        assert (folder / "log.txt").read_text().count("Plan of run") >= 2


def test_the_report_holds_every_figure_and_the_curves(story: Story, place: Path) -> None:
    summary = json.loads((place / "out" / "benchmark.json").read_text())
    rows = {row["method"]: row for row in summary["environments"]["echo"]["methods"]}
    assert list(rows) == ["plain", "dies", "stops"]
    assert rows["dies"]["difference"]["final"] == {"value": 0, "low": None, "high": None}
    assert rows["plain"]["seconds_ratio"] == 1
    assert sum(rows["stops"]["seconds"].values()) == pytest.approx(rows["stops"]["seconds_per_iteration"][0])
    assert "echo: success" in story.results[2].output
    for x in ("iteration", "elapsed"):
        assert (place / "out" / f"echo_{x}.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_what_was_begun_with_other_settings_is_not_taken_for_done(story: Story, place: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        said = ""

        def state(**changes: Any) -> State:
            suite = load_suite("suite.yaml")
            for key, value in changes.items():
                setattr(suite, key, value)
            nonlocal said
            run = plan_runs(suite)[0]
            said = changed_settings(run)
            return state_of(run)

        settings = SUITE["settings"]
        assert state() == State.COMPLETE
        assert state(settings={**settings, "log": {"tensorboard": True}}) == State.COMPLETE
        assert state(settings={**settings, "prm.beta": 0.2}) == State.CHANGED
        assert said == "prm.beta was 0.1 and is 0.2"
        environment = load_suite("suite.yaml").environments["echo"]
        environment.base.seed = 1  # type: ignore[union-attr]
        assert state(environments={"echo": environment}) == State.CHANGED
        assert said.startswith("its base model")
        # A run from before a setting existed had its default.
        stamp = place / "out" / "echo" / "plain" / "seed-0" / "benchmark.json"
        text = stamp.read_text()
        stamp.write_text(json.dumps({**json.loads(text), "config_sha256": "of an older schema"}))
        assert state() == State.COMPLETE
        stamp.write_text(text)


def test_the_dry_run_lists_everything_and_runs_nothing(suite: Any, tmp_path: Path) -> None:
    suite()
    result = CliRunner().invoke(app, ["benchmark", "suite.yaml", "--dry-run", "--seeds", "4,5"])
    assert result.exit_code == 0, result.output
    assert "2 of 2 runs to do" in result.output
    assert "48 training episodes" in " ".join(result.output.split()), "2 runs x 3 iterations x 8 episodes"
    assert "4, 5" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope.yaml"], "no configuration file 'nope.yaml'"),
        (["suite.yaml", "--seeds", "1,x"], "--seeds 1,x: give numbers"),
        (["suite.yaml", "--seeds", "1,1"], "a seed stands twice"),
        (["suite.yaml", "--only", "echo/plan"], "echo/plain"),
        (["suite.yaml", "--out", "mine"], "'mine' holds something that is no benchmark"),
        (["suite.yaml", "--out", "mine/thesis.tex"], "'mine/thesis.tex' holds something that is no benchmark"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line(suite: Any, tmp_path: Path, arguments: list[str], message: str) -> None:
    suite()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("my own work")
    result = CliRunner().invoke(app, ["benchmark", *arguments])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "my own work"


def test_one_benchmark_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "out"):  # noqa: SIM117
        with pytest.raises(UserError, match="is at work in"), locked(tmp_path / "out"):
            pass
    with locked(tmp_path / "out"):
        pass


# The table


def metrics(values: list[float], seconds: float = 2.0, every: int = 5) -> list[dict[str, Any]]:
    """A run that is evaluated every `every` iterations; an evaluation takes 10 s, an iteration `seconds`."""
    records: list[dict[str, Any]] = [{"iteration": 0, "eval": {"success": {"value": values[0]}}}]
    for i in range(1, every * (len(values) - 1) + 1):
        record = {
            "iteration": i,
            "elapsed": seconds * i + 10 * (1 + (i - 1) // every),
            "seconds": {"generation": seconds / 2, "prm": seconds / 4, "other": seconds / 4},
        }
        if i % every == 0:
            record["eval"] = {"success": {"value": values[i // every]}}
        records.append(record)
    return records


def test_the_figures_of_a_run() -> None:
    figures = run_figures(metrics([0.1, 0.2, 0.8, 0.7, 0.9, 0.6]), 0.75)
    assert figures["start"] == 0.1
    assert figures["final"] == 0.6, "the evaluations after 80 % of the run: here the last alone"
    assert figures["area"] == pytest.approx(3.3 / 6)
    assert figures["best"] == 0.9
    assert figures["iterations_to_level"] == 10
    assert figures["seconds_to_level"] == 10 * 2 + 2 * 10
    assert figures["seconds_per_iteration"] == pytest.approx(2)
    assert figures["seconds"] == {"generation": 1, "environment": 0, "prm": 0.5, "policy": 0, "other": 0.5}
    assert run_figures(metrics([0.1, 0.2]), 0.75)["iterations_to_level"] is None
    assert run_figures(metrics([0.0] * 9 + [0.4, 0.6]), 0.75)["final"] == pytest.approx(0.5)


def test_differences_are_paired_by_seed() -> None:
    ours = {0: {"final": 0.5}, 1: {"final": 0.7}, 2: {"final": 0.9}, 7: {"final": 0.0}}
    theirs = {0: {"final": 0.4}, 1: {"final": 0.5}, 2: {"final": 0.9}}
    found = paired(ours, theirs, "final")
    assert found is not None
    assert found.value == pytest.approx((0.1 + 0.2 + 0.0) / 3)
    # 1/27 of the resamples of three are one seed three times: more than the 2.5 % in each tail.
    assert (found.low, found.high) == (pytest.approx(0.0), pytest.approx(0.2))
    assert paired(ours, theirs, "final") == found, "the bootstrap is seeded"
    assert paired({0: {"final": 1.0}}, theirs, "final").low is None  # type: ignore[union-attr]
    assert paired({9: {"final": 1.0}}, theirs, "final") is None


def test_the_table_of_a_benchmark(suite: Any) -> None:
    loaded = suite(seeds=[0, 1, 2], level=0.5, methods__odd={}, methods__none={})
    results = {
        ("echo", "plain", 0): metrics([0.0, 0.2, 0.4]),
        ("echo", "plain", 1): metrics([0.0, 0.4, 0.6]),
        ("echo", "odd", 0): metrics([0.0, 0.5, 0.7], seconds=3.0),
        ("echo", "odd", 1): metrics([0.0, 0.3, 0.9], seconds=3.0),
        ("echo", "odd", 2): metrics([0.0, 0.0, 0.0], seconds=30.0),
    }
    summary = summarise(loaded, results, plan_runs(loaded))
    assert json.loads(json.dumps(summary)) == summary
    head, plain, odd = success_cells(summary, "echo")
    assert plain == ["plain", "2", "50.0% (14.1%)", "40.0%, 60.0%", "-", "26.7% (9.4%)", "-"]
    assert odd[:4] == ["odd", "3", "53.3% (47.3%)", "70.0%, 90.0%, 0.0%"]
    assert odd[4] == "+30.0 [+30.0, +30.0]"
    assert head[4] == "over plain [range]"
    head, plain, odd = cost_cells(summary, "echo")
    assert plain == ["plain", "-, 10", "-, 40", "2.00", "1.00x", "1.00", "0.00", "0.50", "0.00", "0.50"]
    # Seed 2, which the baseline lacks, is in its seconds but not in the ratio.
    assert odd == ["odd", "5, 10, -", "25, 50, -", "12.00", "1.50x", "6.00", "0.00", "3.00", "0.00", "3.00"]
    assert head[-5:] == ["generation", "environment", "prm", "policy", "other"]
    said = " ".join(notes(summary))
    assert "With 2 seeds it is the smallest and the largest difference" in said
    assert "probability 50%" in said
    assert "Missing in echo: plain (seed 2); none (seed 0, 1, 2)." in said
    text = markdown(summary)
    assert "| odd | 3 | 53.3% (47.3%) |" in text
    assert all(line.count("|") in (8, 11) for line in text.splitlines() if line.startswith("|"))


@pytest.mark.parametrize("count", [1, 4, 11])
def test_any_number_of_methods_is_drawn(count: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves = {f"m{i}": [[(0.0, 0.1), (5.0, i / 12)]] * (1 + i % 2) for i in range(count)}
    plot_methods(curves, tmp_path / "x.png", "title", "iteration", "m0")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_moved_benchmark_is_still_complete_and_a_changed_run_is_kept(suite: Any, tmp_path: Path) -> None:
    """A run's model lies in the benchmark's own folder, and so does its path; hours of work must survive a `mv`."""
    from agentrl.benchmark.run import _sha256, _stamp

    loaded = suite()
    run = plan_runs(loaded)[0]
    moved = dataclasses.replace(run, base="0" * 64)
    model = run.config.model.model_copy(update={"path": "/else/base"})
    elsewhere = dataclasses.replace(moved, config=run.config.model_copy(update={"model": model}))
    assert _sha256(moved, moved.config) == _sha256(elsewhere, elsewhere.config)
    assert _stamp(moved, complete=True) == _stamp(elsewhere, complete=True)
    given = dataclasses.replace(elsewhere, base=None)
    assert _sha256(given, given.config) != _sha256(run, run.config), "a model of the user's own is told by its path"
