"""The report: what it reads, what it counts, what it refuses to lose, and that data stays data."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from agentrl.buffer import write_jsonl
from agentrl.cli import app
from agentrl.config import RunConfig
from agentrl.errors import DataError, UserError
from agentrl.evaluate import EvalReport, evaluate
from agentrl.evaluate.result import result_of
from agentrl.images import image_part
from agentrl.report import health
from agentrl.report.data import curves, make_report
from agentrl.report.episodes import LEVELS, levels
from agentrl.report.live import LiveReport, make_server
from agentrl.report.page import payload, render, to_json
from agentrl.report.runs import find_runs
from agentrl.report.web import vendor
from agentrl.rollout import summarise
from agentrl.types import StopReason, TextPart, Trajectory, Turn

NASTY = '</script><script>alert(1)</script><!--<img src=x onerror="alert(2)">&amp;\u2028\u2029 ]]>'


def played(group: int, member: int, *, iteration: int = 0, turns: int = 3, **fields: Any) -> Trajectory:
    """An episode of ids and words; members below 2 succeed."""
    fields = {"outcome": float(member < 2), "success": member < 2, "env": "Toy-v0", "seed": group} | fields
    steps = [
        Turn(
            observation=f"you see {group}",
            action=f"go {member if n else 0}",
            action_ids=[5, 2],
            action_logprobs=[-0.5, -0.001],
            reward=0.25 * n,
            info={"valid_action": n != 1},
        )
        for n in range(turns)
    ]
    return Trajectory(
        id=f"{iteration:06d}-{group:04d}/{member}",
        group_id=f"{iteration:06d}-{group:04d}",
        turns=steps,
        final_observation="the end",
        iteration=iteration,
        **fields,
    )


def record(iteration: int, success: float = 0.5, step_reward: float = 0.0, **more: Any) -> dict[str, Any]:
    """A line of metrics."""
    return {
        "iteration": iteration,
        "success": success,
        "credit_step_reward_mean": step_reward,
        "episodes": 6,
        "episodes_failed": 2,
        "stop_reasons": {"terminated": 6, "environment_error": 2},
        "groups": {"groups": 2, "mixed": 1, "all_success": 1, "all_failure": 0},
        "elapsed": 2.0 * iteration,
        **more,
    }


def make_run(folder: Path, *, iterations: int = 3, stored: bool = True, **settings: Any) -> Path:
    """A run's folder as the trainer leaves it, of 2 groups of 4 an iteration."""
    config = RunConfig.model_validate({"name": "toy", "run_dir": "runs/toy", **settings}).model_dump(mode="json")
    (folder / "trajectories").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "plan.txt").write_text("rollout 2 x 4\n")
    (folder / "versions.json").write_text('{"agentrl": "0.1.0"}')
    lines = [record(0, eval={"success": {"value": 0.25, "low": 0.1, "high": 0.4, "episodes": 16}})]
    lines += [record(n + 1, pair_accuracy=0.75) for n in range(iterations)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for n in range(iterations):
        name = f"iteration-{n:06d}.jsonl"
        members = [played(g, m, iteration=n) for g in range(2) for m in range(4)]
        write_jsonl(folder / "trajectories" / name, members)
        if stored:
            (folder / "credit").mkdir(exist_ok=True)
            rows = [
                {"id": t.id, "episode": [1.0] * 3, "step": [0.5, -2.0, 0.0], "reward": [0.1, 0.2, 0.3]} for t in members
            ]
            (folder / "credit" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_evaluation(
    folder: Path, policy: str = "echo", *, per_task: int = 2, complete: bool = True, seed: int = 0
) -> Path:
    """The folder of an evaluation: 4 tasks, of which the first two are solved, in two environments."""
    envs = ["Toy-v0", "Other-v0"]
    results = []
    (folder / "trajectories").mkdir(parents=True)
    for place, env in enumerate(envs):
        members = [
            played(g, m, env=env, policy=policy, outcome=float(g < 2), success=g < 2)
            for g in range(4)
            for m in range(per_task)
        ]
        write_jsonl(folder / "trajectories" / f"{place}-{env}.jsonl", members)
        summaries = [summarise(t, t.seed, int(t.id.rpartition("/")[2])) for t in members]
        common: dict[str, Any] = {"policy": policy, "env_kwargs": {}, "per_task": per_task, "seed": seed}
        results.append(result_of(summaries, env=env, **common, seconds=1.0, temperature=None))
    settings = {
        "policy": {"name": policy, "options": {}},
        "environments": [{"id": env} for env in envs],
        "episodes": 4 * per_task,
        "per_task": per_task,
        "seed": seed,
        "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 16},
        "outcome": {"rule": "success", "success_above": None, "truncated": "scored"},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "versions.json").write_text('{"agentrl": "0.1.0"}')
    if complete:
        (folder / "result.json").write_text(EvalReport(policy=policy, results=results).model_dump_json())
    return folder


def make_cut(folder: Path, **options: Any) -> Path:
    """The folder of an evaluation that was stopped when its first environment was played: 8 of 16 episodes."""
    make_evaluation(folder, complete=False, **options)
    (folder / "trajectories" / "1-Other-v0.jsonl").unlink()
    return folder


def append(file: Path, line: str) -> None:
    """Adds a line to a file."""
    with file.open("a") as stream:
        stream.write(line + "\n")


BIG = 10**400
ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1e308,
    math.inf,
    math.nan,
    BIG,
    "",
    "x",
    "\ud800",
    [],
    {},
    [1],
    {"a": 1},
    [[[[]]]],
    {"": {}},
)


def damage(files: list[Path], random: Random) -> None:
    """Changes up to five values somewhere in JSON or YAML files: another value, none at all, another key."""
    for file in random.sample(sorted(file for file in files if file.is_file()), 3):
        if file.suffix == ".yaml":
            whole = yaml.safe_load(file.read_text())
            mutate(whole, random)
            file.write_text(yaml.safe_dump(whole))
        elif file.suffix in (".json", ".jsonl"):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            for _ in range(random.randint(1, 5)):
                mutate(lines, random)
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def mutate(value: Any, random: Random) -> None:
    """Changes one value inside of a list or a mapping."""
    while True:
        places = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not places:
            return
        place = random.choice(places)
        if not isinstance(value[place], dict | list) or random.random() < 0.2:
            break
        value = value[place]
    how = random.random()
    if how < 0.15:
        del value[place]
    elif how < 0.25 and isinstance(value, dict):
        value[random.choice(["x", "", "__proto__", "iteration", "id"])] = value.pop(place)
    else:
        value[place] = random.choice(ODD)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


class Elements(HTMLParser):
    """Collects what a browser would see: start tags, and texts of script elements."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts.setdefault(self.tags[-1][1].get("id") or "code", data)


def parsed(page: bytes) -> Elements:
    elements = Elements()
    elements.feed(page.decode())
    return elements


def notes_of(*paths: Path, **options: Any) -> str:
    summary = make_report(paths, **options).summary
    return " ".join([*summary["trajectories"]["notes"], *(note for r in summary["runs"] for note in r["notes"])])


def test_a_run_is_read_whole(run: Path) -> None:
    report = make_report([run])
    (one,), listed = report.summary["runs"], report.summary["trajectories"]
    assert one["notes"] == []
    assert listed["count"] == listed["found"] == 24
    assert one["curves"]["eval/success/value"] == [0.25, None, None, None]
    assert one["curves"]["stop_reasons/environment_error"] == [2, 2, 2, 2]
    assert one["config"]["rollout.group_size"] == 8
    assert one["versions"] == {"agentrl": "0.1.0"}
    assert set(listed["columns"]["outcome"]) == {0, 1}
    (chunk,) = report.chunks
    row = chunk["rows"][0]
    assert [chunk["strings"][s] for s in row["act"]] == ["go 0"] * 3
    assert (row["episode"], row["step"], row["bad"]) == ([1, 1, 1], [0.5, -2, 0], [1])
    assert row["lp"][0] == [-0.5, -0.001]


def test_strips_show_the_sign_and_size_of_credit(run: Path) -> None:
    listed = make_report([run]).summary["trajectories"]
    assert listed["scales"] == {"total": 1.5, "episode": 1, "step": 2, "reward": 0.3, "environment": 0.5}
    assert listed["columns"]["strip_step"][0] == "fae"
    assert listed["columns"]["strip_total"][0] == "ibh"
    assert levels([-9.0, -1e-9, 0.0, 1e-9, 9.0, math.nan], 1.0) == "adefie"
    assert levels([0.0, 1.0], 0.0) == "ee"
    assert len(LEVELS) == 9


def test_a_part_of_the_trajectories_is_whole_groups_of_every_iteration(run: Path) -> None:
    columns = make_report([run], trajectories=12).summary["trajectories"]["columns"]
    assert len(columns["id"]) == 12
    assert {i: columns["iteration"].count(i) for i in range(3)} == {0: 4, 1: 4, 2: 4}
    assert all(columns["group"].count(group) == 4 for group in columns["group"])
    assert make_report([run], trajectories=0).summary["trajectories"]["count"] == 24


def test_data_stays_data(tmp_path: Path) -> None:
    nasty = played(0, 0, error=NASTY, env=NASTY, policy=NASTY)
    nasty.turns[0].action = nasty.turns[0].observation = NASTY
    nasty.instructions = NASTY
    path = tmp_path / "<b>&.jsonl"
    write_jsonl(path, [nasty])
    elements = parsed(render(make_report([path])))
    assert [tag for tag, _ in elements.tags].count("script") == 3  # summary, one chunk, the code
    assert not [tag for tag, attributes in elements.tags if tag == "img" or "onerror" in attributes]
    chunk = json.loads(elements.scripts["chunk-0"])
    assert chunk["strings"].count(NASTY) == 1
    assert json.loads(elements.scripts["summary"])["trajectories"]["columns"]["env"] == [NASTY]
    assert not re.search("[<>&\u2028\u2029]", to_json({NASTY: [NASTY]}))


def test_the_code_never_parses_text_as_html() -> None:
    web = Path(vendor.__file__).parent
    for file in sorted((web / "js").glob("*.js")):
        text = file.read_text()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert word not in text, f"{file.name} uses {word}"


def test_the_page_needs_nothing_else(run: Path) -> None:
    page = render(make_report([run]))
    elements = parsed(page)
    policy = next(a["content"] for tag, a in elements.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "connect-src" not in policy
    sources = [a.get("src") or a.get("href") for _, a in elements.tags]
    assert [s for s in sources if s and not s.startswith(("data:", "#"))] == []
    assert "connect-src 'self'" in render(make_report([run]), live=True).decode()


def test_large_texts_are_compressed_and_read_back(tmp_path: Path) -> None:
    long = [played(g, 0) for g in range(150)]
    for number, t in enumerate(long):
        t.turns[0].observation = "\n".join(f"{number} {n}" for n in range(900))
    write_jsonl(tmp_path / "long.jsonl", long)
    report = make_report([tmp_path / "long.jsonl"])
    parts = payload(report)
    assert [parts[f"chunk-{n}"]["encoding"] for n in (0, 1)] == ["gzip", "gzip"]
    text = gzip.decompress(base64.b64decode(json.loads(parts["chunk-1"]["body"]))).decode()
    assert json.loads(text)["strings"] == report.chunks[1]["strings"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda run: (run / "trajectories" / "iteration-000001.jsonl").write_text(""),
            "iteration-000001.jsonl is empty",
        ),
        (
            lambda run: (run / "trajectories" / "iteration-000001.jsonl").write_text('{"id": 1}\n{"x'),
            "2 lines left out",
        ),
        (lambda run: (run / "metrics.jsonl").write_text('{"iteration": 0}\nnonsense\n{"itera'), "1 broken line"),
        (lambda run: (run / "metrics.jsonl").unlink(), "No metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "holds no iteration yet"),
        (lambda run: (run / "config.yaml").write_text("a: [1"), "config.yaml cannot be read"),
        (lambda run: (run / "config.yaml").unlink(), "No config.yaml"),
        (lambda run: (run / "versions.json").write_text("[]"), "Versions of packages are not recorded"),
        (lambda run: [f.unlink() for f in (run / "credit").iterdir()], "No credit is stored"),
        (lambda run: (run / "credit" / "iteration-000000.jsonl").write_text('{"id": 3\n'), "1 broken line left out"),
        (lambda run: [f.unlink() for f in (run / "trajectories").iterdir()], "No trajectories are stored"),
        (lambda run: (run / "trajectories" / "iteration-000001.jsonl").write_bytes(b"\xff\xfe\x00"), "1 line left out"),
        (
            lambda run: append(run / "trajectories" / "iteration-000001.jsonl", "[" * 100_000),
            "iteration-000001.jsonl: 1 line left out, the first because: line 9: ",
        ),
        (
            lambda run: append(run / "credit" / "iteration-000001.jsonl", "[" * 100_000),
            "credit of iteration-000001.jsonl: 1 broken line left out, the first is line 9",
        ),
        (lambda run: append(run / "credit" / "iteration-000001.jsonl", f'{{"id": "x", "step": [{BIG}]}}'), "line 9"),
        (
            lambda run: (run / "config.yaml").write_text("model: hello"),
            "config.yaml: model='hello' is no section; its settings are not known.",
        ),
        (lambda run: (run / "config.yaml").write_text("a: &a [*a]"), "config.yaml cannot be read: nested deeper"),
        (lambda run: (run / "config.yaml").write_text("seed: !!int ''"), "config.yaml cannot be read: "),
        (lambda run: (run / "config.yaml").write_text("[" * 5000), "config.yaml cannot be read: "),
        (
            lambda run: append(run / "metrics.jsonl", '{"iteration": Infinity}'),
            "1 broken line of metrics.jsonl left out, the first is line 5.",
        ),
        (lambda run: append(run / "metrics.jsonl", "[" * 100_000), "the first is line 5."),
        (
            lambda run: append(run / "metrics.jsonl", '{"iteration": 4, "episodes": "many"}'),
            "metrics.jsonl line 5: episodes='many' is no count and left out.",
        ),
        (
            lambda run: append(run / "metrics.jsonl", '{"iteration": 4, "episodes": 1e400, "stop_reasons": [1]}'),
            "metrics.jsonl line 5: episodes=inf is no count and left out (and 1 more).",
        ),
        (
            lambda run: append(run / "metrics.jsonl", '{"iteration": 4, "stop_reasons": {"deadline": null}}'),
            "metrics.jsonl line 5: stop_reasons.deadline=None is no count and left out.",
        ),
        (lambda run: (run / "versions.json").write_text("{"), "versions.json cannot be read: "),
    ],
)
def test_what_is_broken_is_said_and_the_rest_is_shown(run: Path, spoil: Callable[[Path], Any], said: str) -> None:
    spoil(run)
    assert said in notes_of(run)
    assert b"<main" in render(make_report([run]))


def test_names_and_keys_that_are_no_text_are_shown_as_such(run: Path) -> None:
    (run / "config.yaml").write_text("name: 2020-01-01\n1: 2\nenv: {3: [2020-01-02]}\nmodel: {path: 5}\n")
    summary = make_report([run]).summary
    assert (summary["title"], summary["runs"][0]["label"]) == ("2020-01-01", "2020-01-01")
    assert summary["runs"][0]["config"] == {"name": "2020-01-01", "1": 2, "env.3": ["2020-01-02"], "model.path": 5}
    render(make_report([run, make_run(run.parent / "other")]))


def test_a_line_that_nests_too_deep_costs_itself_alone(run: Path) -> None:
    append(run / "trajectories" / "iteration-000001.jsonl", "[" * 100_000)
    assert make_report([run]).summary["trajectories"]["count"] == 24


def test_values_far_apart_have_levels_and_an_alarm_too() -> None:
    assert levels([5e-324, 1e308, -1e308], 5e-324) == "iia"
    assert health.reward_alarm([record(n, 1e308, 1e308) for n in range(20)]) is None


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_in_the_files_the_report_renders(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    made = make_run(tmp_path / "run", iterations=2)
    evaluated = make_evaluation(tmp_path / "evaluation")
    damage([*made.rglob("*.*"), *evaluated.rglob("*.*")], random)
    page = parsed(render(make_report([tmp_path])))
    json.loads(page.scripts["summary"], parse_constant=pytest.fail)


def test_credit_that_does_not_fit_its_trajectory_is_not_shown(run: Path) -> None:
    file = run / "credit" / "iteration-000000.jsonl"
    first, *rest = file.read_text().splitlines()
    short = json.loads(first) | {"step": [0.5]}
    file.write_text("\n".join([json.dumps(short), *rest]))
    report = make_report([run])
    assert "step" not in report.chunks[0]["rows"][0]
    assert "step" in report.chunks[0]["rows"][1]
    assert report.summary["trajectories"]["columns"]["strip_step"][0] == "..."


def test_files_of_one_folder_keep_their_episodes_apart(tmp_path: Path) -> None:
    for name, won in (("a", True), ("b", False)):
        write_jsonl(tmp_path / f"{name}.jsonl", [played(0, 0, success=won), played(0, 1, success=won)])
    (tmp_path / "credit").mkdir()
    for name, reward in (("a", 1.0), ("b", 2.0)):
        rows = [
            {"id": f"000000-0000/{n}", **dict.fromkeys(("episode", "step", "reward"), [reward] * 3)} for n in (0, 1)
        ]
        (tmp_path / "credit" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = make_report([tmp_path]).summary
    assert summary["runs"][0]["files"] == ["a.jsonl", "b.jsonl"]
    assert summary["trajectories"]["columns"]["file"] == [0, 0, 1, 1]
    assert summary["trajectories"]["columns"]["success"] == [1, 1, 0, 0]
    assert summary["trajectories"]["calibration"] == [], "no success and failure are of one group"


def test_plain_trajectories_of_several_environments(tmp_path: Path) -> None:
    failed = played(3, 0, turns=0, stop_reason=StopReason.ENVIRONMENT_ERROR, error="it died", success=False)
    write_jsonl(tmp_path / "a.jsonl", [played(0, 0), played(1, 0, env="Other-v0"), failed])
    write_jsonl(tmp_path / "b.jsonl", [played(2, 3)])
    summary = make_report([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]).summary
    assert summary["trajectories"]["columns"]["env"] == ["Toy-v0", "Other-v0", "Toy-v0", "Toy-v0"]
    assert summary["trajectories"]["columns"]["scorable"] == [1, 1, 0, 1]
    assert summary["trajectories"]["errors"] == {"it died": 1}
    assert [r["label"] for r in summary["runs"]] == ["a.jsonl", "b.jsonl"]
    assert make_report([tmp_path]).summary["trajectories"]["count"] == 4


def test_numbers_and_texts_that_json_lacks(tmp_path: Path) -> None:
    odd = played(0, 0, outcome=math.inf)
    odd.turns[0].reward = math.nan
    odd.turns[0].action = "half \ud83d"
    odd.turns[0].action_logprobs = [-math.inf, -1.0]
    write_jsonl(tmp_path / "odd.jsonl", [odd])
    parts = payload(make_report([tmp_path / "odd.jsonl"]))
    chunk = json.loads(parts["chunk-0"]["body"], parse_constant=pytest.fail)
    assert chunk["rows"][0]["lp"][0] == [None, -1]
    assert chunk["rows"][0]["env"][0] is None
    assert "half ?" in chunk["strings"]
    json.loads(parts["summary"]["body"], parse_constant=pytest.fail)


def test_pictures_are_bounded_and_counted(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    pictures = [
        image_part(np.random.default_rng(n).integers(0, 255, (16, 16, 3), np.uint8), alt=f"noise {n}") for n in (1, 2)
    ]
    t = played(0, 0)
    for n in range(3):  # the second one twice
        t.turns[n].observation = [TextPart(text="look: "), pictures[min(n, 1)]]
    write_jsonl(tmp_path / "seen.jsonl", [t])
    size = (tmp_path / pictures[0].path).stat().st_size
    report = make_report([tmp_path / "seen.jsonl"], image_mb=1.5 * size / 1e6)
    assert [base64.b64decode(picture)[:4] for picture in report.images] == [b"\x89PNG"]
    assert report.summary["trajectories"]["images_left_out"] == 1
    seen = report.chunks[0]["rows"][0]["obs"]
    assert [part[1][0] for part in seen] == [0, -1, -1]
    (tmp_path / pictures[1].path).unlink()
    assert "cannot read picture" in notes_of(tmp_path / "seen.jsonl")


def test_seeds_of_one_setting_are_a_family(tmp_path: Path) -> None:
    for method in ("grpo", "rloo"):
        for seed in (0, 1):
            make_run(tmp_path / method / f"seed-{seed}", seed=seed, credit={"method": method}, iterations=1)
    runs = find_runs([tmp_path])
    assert [run.label for run in runs] == ["grpo/seed-0", "grpo/seed-1", "rloo/seed-0", "rloo/seed-1"]
    assert [run.family for run in runs] == ["grpo", "grpo", "rloo", "rloo"]


def test_evaluations_are_no_family_whatever_they_share(tmp_path: Path) -> None:
    make_evaluation(tmp_path / "whole")
    make_evaluation(tmp_path / "other", seed=1)
    make_cut(tmp_path / "cut")
    runs = find_runs([tmp_path])
    assert [run.family for run in runs] == [run.label for run in runs] == ["cut", "other", "whole"]
    cut, _, whole = make_report([tmp_path]).summary["runs"]
    assert cut["episodes"] == {"scored": 8, "successes": 4, "failed": 0, "asked": 16}
    assert whole["episodes"]["asked"] == 16
    assert find_runs([make_run(tmp_path / "run")])[0].asked is None
    for episodes, environments in ((math.inf, [1]), (8, 3), (None, [])):
        settings = json.dumps({"policy": {}, "episodes": episodes, "environments": environments})
        (tmp_path / "cut" / "settings.json").write_text(settings)
        assert find_runs([tmp_path / "cut"])[0].asked is None


def test_checkpoints_are_no_runs_of_their_own(run: Path) -> None:
    (run / "checkpoints" / "iteration-000001").mkdir(parents=True)
    (run / "checkpoints" / "iteration-000001" / "config.yaml").write_text("{}")
    assert [one.path for one in find_runs([run.parent])] == [run]


def test_nothing_to_report_on_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        make_report([tmp_path / "none"])
    with pytest.raises(DataError, match="holds no run"):
        make_report([tmp_path])
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="neither a run's folder nor a trajectory file"):
        make_report([tmp_path / "notes.txt"])


def test_the_alarm_rings_when_step_reward_rises_and_success_does_not() -> None:
    wobble = [0.01 * (-1) ** n for n in range(20)]
    rising = [record(n, 0.5 + wobble[n], 0.1 * (n >= 10) + wobble[n] / 10) for n in range(15)]
    alarm = health.reward_alarm(rising)
    assert alarm is not None
    assert alarm["ringing"]
    assert alarm["iterations"][-1] == 14
    assert alarm["reward_after"] > alarm["reward_before"] + 0.09


def test_the_alarm_is_silent_when_success_follows_or_nothing_moves() -> None:
    wobble = [0.01 * (-1) ** n for n in range(20)]
    both = [record(n, 0.5 + 0.02 * n + wobble[n], 0.01 * n + wobble[n] / 10) for n in range(20)]
    still = [record(n, 0.5 + wobble[n], 0.1 + wobble[n]) for n in range(20)]
    falling = [record(n, 0.5 - 0.01 * n, -0.1 * n) for n in range(20)]
    for metrics in (both, still, falling):
        alarm = health.reward_alarm(metrics)
        assert alarm is not None
        assert alarm["iterations"] == []
    assert health.reward_alarm(both[:9]) is None
    assert health.reward_alarm([{"iteration": n, "success": 1.0} for n in range(30)]) is None


def test_everything_dropped_is_counted_with_its_reason(run: Path) -> None:
    rows = {row["what"]: row for row in make_report([run]).summary["runs"][0]["dropped"]}
    failed = rows["Episodes ended by environment error"]
    assert (failed["count"], failed["of"], failed["iterations"]) == (8, 32, [0, 1, 2, 3])
    assert (rows["Groups of successes only"]["count"], rows["Groups of successes only"]["of"]) == (4, 8)
    assert rows["Episodes ended by deadline"]["count"] == 0
    assert all(row["why"] for row in rows.values())


def test_tokens_without_loss_and_failed_evaluations_are_dropped_too(run: Path) -> None:
    held = {"episodes": 16, "infrastructure_failures": 2, "success": {"value": 0.5, "low": 0.1, "high": 0.9}}
    append(run / "metrics.jsonl", json.dumps(record(4, action_tokens=500, tokens_rejected=25.0, eval=held)))
    rows = {row["what"]: row for row in make_report([run]).summary["runs"][0]["dropped"]}
    rejected, failed = rows["Action tokens without policy loss"], rows["Held-out episodes that failed"]
    assert [rejected[key] for key in ("count", "of", "unit", "iterations")] == [25, 500, "tokens", [4]]
    assert [failed[key] for key in ("count", "of", "iterations")] == [2, 16, [4]]


def test_without_counts_the_stored_trajectories_are_counted(tmp_path: Path) -> None:
    failed = played(1, 0, turns=0, stop_reason=StopReason.POLICY_ERROR, error="it died", success=False)
    write_jsonl(tmp_path / "a.jsonl", [played(0, 0), played(0, 3), failed])
    for path, whole in ((tmp_path / "a.jsonl", 3), (make_cut(tmp_path / "cut"), 8)):
        (one,) = make_report([path], trajectories=1).summary["runs"]
        rows = {row["what"]: (row["count"], row["of"]) for row in one["dropped"]}
        assert rows["Episodes ended by policy error"] == (whole == 3, whole)
        assert sum(one["stops"].values()) == whole
    (tmp_path / "empty.jsonl").write_text("")
    assert make_report([tmp_path / "empty.jsonl"]).summary["runs"][0]["dropped"] == []


def test_an_evaluation_is_shown_with_its_intervals_settings_and_versions(tmp_path: Path) -> None:
    (one,) = make_report([make_evaluation(tmp_path / "whole")]).summary["runs"]
    found = one["evaluation"][0]
    assert (found["env"], found["success"]["value"], found["success_interval"]) == ("Toy-v0", 0.5, "bootstrap")
    assert found["success"]["low"] < 0.5 < found["success"]["high"]
    assert set(found["pass_at_k"]) == set(found["pass_hat_k"]) == {"1", "2"}
    assert one["config"]["policy.name"] == "echo"
    assert one["config"]["sampling.temperature"] == 1.0
    assert one["versions"] == {"agentrl": "0.1.0"}
    assert one["notes"] == [
        "No credit is stored beside the trajectories: turns have no advantages and no step rewards."
    ]
    assert one["stops"] == {"terminated": 16}
    assert {row["what"]: row["of"] for row in one["dropped"]}["Episodes ended by deadline"] == 16
    assert "result.json cannot be read" in notes_of(spoiled(tmp_path / "broken", "result.json", '{"policy": 1}'))
    assert "settings.json cannot be read" in notes_of(spoiled(tmp_path / "odd", "settings.json", "[" * 100_000))
    cut = make_report([make_evaluation(tmp_path / "cut", complete=False)]).summary["runs"][0]
    assert (cut["evaluation"], cut["episodes"]) == ([], {"scored": 16, "successes": 8, "failed": 0, "asked": 16})
    assert "the evaluation is not complete" in " ".join(cut["notes"])


def spoiled(folder: Path, name: str, text: str) -> Path:
    (make_evaluation(folder) / name).write_text(text)
    return folder


def test_every_evaluation_and_run_below_a_folder_is_found(tmp_path: Path) -> None:
    for policy in ("random", "solver"):
        make_evaluation(tmp_path / "board" / policy / "lock", policy)
    (tmp_path / "board" / "leaderboard.json").write_text("{}")
    (tmp_path / "board" / ".vscode").mkdir()
    (tmp_path / "board" / ".vscode" / "settings.json").write_text("{}")
    summary = make_report([tmp_path / "board"]).summary
    assert [one["label"] for one in summary["runs"]] == ["random/lock", "solver/lock"]
    assert summary["title"] == "2 evaluations"
    make_run(tmp_path / "board" / "run")
    begun = tmp_path / "board" / "begun"
    begun.mkdir()
    (begun / "settings.json").write_text((tmp_path / "board" / "random" / "lock" / "settings.json").read_text())
    summary = make_report([tmp_path / "board"]).summary
    assert summary["title"] == "1 run, 3 evaluations"
    found = [one["label"] for one in summary["runs"]]
    assert found == ["begun", "random/lock", "run", "solver/lock"]
    done = CliRunner().invoke(app, ["report", str(tmp_path / "board")])
    assert done.exit_code == 0, done.output


def test_eval_writes_what_it_is_made_with(tmp_path: Path) -> None:
    evaluate(lambda _: "left", "Lock-v0", episodes=4, per_task=2, out=tmp_path / "eval")
    (one,) = make_report([tmp_path / "eval"]).summary["runs"]
    assert {"agentrl", "python", "gymnasium", "system"} <= one["versions"].keys()
    assert one["evaluation"][0]["episodes"] == 4
    assert one["config"]["per_task"] == 2


def test_calibration_of_pairs() -> None:
    sure = [(math.log(3), 0.0)] * 3 + [(0.0, math.log(3))]  # 75 % sure, and right three times in four
    (bin,) = health.calibration(sure, bins=1)
    assert bin["confidence"] == pytest.approx(0.75)
    assert bin["right"] == 0.75
    assert bin["pairs"] == 4
    assert health.calibration([]) == []


def test_curves_are_columns_of_one_length() -> None:
    found = curves([{"iteration": 0, "a": {"b": 1.0}}, {"iteration": 1, "flag": True, "note": "x", "c": 0.1234567}])
    assert found == {"iteration": [0, 1], "a/b": [1.0, None], "c": [None, 0.123457]}


def test_the_command_writes_one_file(run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "r.html")])
    assert done.exit_code == 0, done.output
    assert "24 of 24" in done.output
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert CliRunner().invoke(app, ["report", str(run)]).exit_code == 0
    assert (run / "report.html").is_file()
    failed = CliRunner().invoke(app, ["report", str(tmp_path / "none")])
    assert failed.exit_code == 2
    assert "Traceback" not in failed.output


def test_the_command_spares_what_it_reads(run: Path, tmp_path: Path) -> None:
    file = run / "trajectories" / "iteration-000000.jsonl"
    (tmp_path / "same.jsonl").symlink_to(file)
    before = {one: one.read_bytes() for one in run.rglob("*.*") if one.is_file()}
    for given, out in (
        (run, file),
        (run.parent, run / "notes.txt"),
        (file, tmp_path / "same.jsonl"),
        (run / "metrics.jsonl", run / "config.yaml"),
        (run / "metrics.jsonl", run / "metrics.jsonl"),
    ):
        done = CliRunner().invoke(app, ["report", str(given), "--out", str(out)])
        assert done.exit_code == 2, done.output
        assert "which is read" in " ".join(done.output.split())
    assert {one: one.read_bytes() for one in run.rglob("*.*") if one.is_file()} == before
    for given, out in ((run, run / "trajectories" / "x.html"), (file, file.with_name("x.txt"))):
        assert CliRunner().invoke(app, ["report", str(given), "--out", str(out)]).exit_code == 0


@pytest.fixture
def served(run: Path) -> Iterator[str]:
    server = make_server(LiveReport([run]), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(url: str, **headers: str) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return answer.read()


def test_view_follows_a_run(run: Path, served: str) -> None:
    assert b'data-live="true"' in ask(served)
    before = json.loads(ask(f"{served}/stamp"))["stamp"]
    assert json.loads(ask(f"{served}/stamp"))["stamp"] == before
    write_jsonl(run / "trajectories" / "iteration-000003.jsonl", [played(0, m, iteration=3) for m in range(4)])
    news = json.loads(ask(f"{served}/data"))
    assert news["stamp"] == json.loads(ask(f"{served}/stamp"))["stamp"] != before
    assert json.loads(news["parts"]["summary"]["body"])["trajectories"]["count"] == 28


def test_view_answers_this_machine_alone(served: str) -> None:
    for url, headers, code in ((served, {"Host": "evil.example:80"}, 403), (f"{served}/etc/passwd", {}, 404)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(url, **headers)
        assert refused.value.code == code
        refused.value.close()
    with pytest.raises(UserError, match="port"):
        make_server(LiveReport([]), int(served.rsplit(":", 1)[1]))


def test_the_charting_library_is_the_pinned_one() -> None:
    script = (vendor.FOLDER / "uPlot.iife.min.js").read_text()
    assert f"(v{vendor.VERSION})" in script[:100]
    assert "MIT License" in (vendor.FOLDER / "uPlot.LICENSE").read_text()
    with pytest.raises(ValueError, match="sha256"):
        vendor.unpack(b"something else")


def test_a_training_run_stores_its_credit_and_a_resume_replaces_it(
    tmp_path: Path, warm: Path, trainer_of: Callable[..., Any]
) -> None:
    from toys import run_config

    settings = run_config(tmp_path / "run", warm, iterations=2, credit={"method": "oprl"})
    trainer = trainer_of(settings)
    trainer.iterate()
    last, file = trainer.last, tmp_path / "run" / "credit" / "iteration-000000.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["id"] for row in rows] == [t.id for t in last.batch.trajectories]
    assert [len(row["step"]) for row in rows] == [len(t.turns) for t in last.batch.trajectories]
    flat = {key: np.concatenate([row[key] for row in rows]) for key in ("episode", "step", "reward")}
    np.testing.assert_allclose(flat["episode"], last.advantage.episode, rtol=1e-5)
    np.testing.assert_allclose(flat["step"], last.advantage.step, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(flat["reward"].sum(), last.signals.token_reward.sum(), rtol=1e-3, atol=1e-6)

    file.write_text("of a run that was killed")
    trainer_of(settings, resume=True).iterate()
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    report = make_report([tmp_path / "run"])
    assert {"agentrl", "torch", "python"} <= report.summary["runs"][0]["versions"].keys()
    assert "." not in "".join(report.summary["trajectories"]["columns"]["strip_step"])


def test_a_run_that_keeps_no_trajectories_keeps_no_credit(
    tmp_path: Path, warm: Path, trainer_of: Callable[..., Any]
) -> None:
    from toys import run_config

    trainer_of(run_config(tmp_path, warm, buffer={"write_trajectories": False})).iterate()
    assert not (tmp_path / "credit").exists()


def test_calibration_error_and_correlation_against_plain_numpy() -> None:
    import torch
    from helpers import episodes

    from agentrl.batch import build_batch
    from agentrl.prm.health import calibration_error, group_correlation

    assert calibration_error(torch.full((4,), math.log(3.0)) * torch.tensor([1, 1, 1, -1])) == pytest.approx(
        0.0, abs=1e-6
    )
    assert calibration_error(torch.tensor([50.0, -50.0])) == pytest.approx(0.5)
    assert calibration_error(torch.zeros(3)) == 0.0

    index = build_batch(episodes(3)).index
    random = np.random.default_rng(0)
    scores, outcome = random.normal(size=index.N), random.normal(size=index.N)
    owner = index.group_of_traj.numpy()
    a, b = (x - np.array([x[owner == g].mean() for g in owner]) for x in (scores, outcome))
    found = group_correlation(index, torch.tensor(scores), torch.tensor(outcome))
    assert found == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert group_correlation(index, torch.zeros(index.N), torch.tensor(outcome)) == 0.0
