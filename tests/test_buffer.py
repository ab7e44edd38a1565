"""The trajectory buffer and its files: exact, atomic, and patient with broken lines."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.buffer import TrajectoryBuffer, read_jsonl, write_jsonl
from agentrl.errors import DataError, UserError
from agentrl.files import atomic_write, check_writable
from agentrl.types import ImagePart, StopReason, TextPart, Trajectory, Turn


def episode(name: str = "a", iteration: int = 0, **fields: Any) -> Trajectory:
    turn = Turn(observation="o", action="up", prompt_ids=[1, 2], action_ids=[3], action_logprobs=[-0.1], reward=0.1)
    return Trajectory(id=name, group_id="g", env="E", seed=1, iteration=iteration, **{"turns": [turn], **fields})


ids = st.lists(st.integers(0, 2**31), max_size=4)
text = st.text(st.characters(), max_size=12)  # surrogate halves, U+2028 and control characters included
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
infos = st.dictionaries(text, json_values, max_size=3)
turns = st.builds(
    Turn.model_construct,
    observation=text | st.builds(lambda t: [TextPart(text=t), ImagePart(path="p.png")], st.text(max_size=5)),
    action=text,
    prompt_ids=ids,
    action_ids=ids,
    action_logprobs=st.lists(st.floats(), max_size=4),
    new_row=st.booleans(),
    reward=st.floats(),
    policy_version=st.none() | st.integers(0, 99),
    timings=st.dictionaries(st.sampled_from(["policy", "environment"]), st.floats(0, 9)),
    info=infos,
)
trajectories = st.builds(
    Trajectory.model_construct,
    id=text,
    group_id=text,
    env=text,
    task=infos,
    seed=st.integers(-(2**63), 2**63),
    instructions=text,
    turns=st.lists(turns, max_size=3),
    final_observation=st.none() | text,
    outcome=st.floats(),
    success=st.booleans(),
    stop_reason=st.sampled_from(StopReason),
    error=st.none() | text,
    metadata=infos,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(trajectories, max_size=3))
def test_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, written: list[Trajectory]) -> None:
    path = tmp_path_factory.mktemp("round") / "t.jsonl"
    write_jsonl(path, written)
    # repr tells -0.0 from 0.0, 1 from 1.0 and True, and finds NaN equal to NaN.
    assert list(map(repr, read_jsonl(path))) == list(map(repr, written))


def test_lines_end_at_new_lines_only(tmp_path: Path) -> None:
    odd = episode(turns=[Turn(observation="a\u2028b\u0085c\x1e", action="x\r\ny")])
    write_jsonl(tmp_path / "t.jsonl", [odd, odd])
    assert read_jsonl(tmp_path / "t.jsonl") == [odd, odd]
    assert (tmp_path / "t.jsonl").read_bytes().count(b"\n") == 2


def damaged(folder: Path, damage: Any) -> Path:
    """Writes four trajectories, the third line put through `damage`."""
    path = folder / "t.jsonl"
    write_jsonl(path, [episode(name) for name in "abcd"])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = damage(lines[2])
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda line: line[:40] + b"\n", "broken JSON"),
        (lambda line: b"\xff" + line, "broken JSON"),
        (lambda line: b"[1, 2]\n", "not a trajectory: the line"),
        (lambda line: line.replace(b'"seed":1', b'"seed":"x"'), "not a trajectory: seed"),
        (lambda line: line.replace(b'"turns"', b'"turnips"').replace(b'"id"', b'"ie"'), "not a trajectory: id"),
        (lambda line: line.replace(b"terminated", b"exploded"), "not a trajectory"),
    ],
)
def test_a_broken_line_costs_that_line_only(tmp_path: Path, damage: Any, reason: str) -> None:
    path = damaged(tmp_path, damage)
    with pytest.raises(DataError, match=rf"t\.jsonl line 3: {reason}"):
        read_jsonl(path)
    skipped: list[DataError] = []
    assert [t.id for t in read_jsonl(path, on_error="skip", on_skip=skipped.append)] == ["a", "b", "d"]
    assert len(skipped) == 1
    assert "line 3" in str(skipped[0])
    with pytest.warns(UserWarning, match="skipped .* line 3"):
        assert len(read_jsonl(path, on_error="skip")) == 3


def test_a_truncated_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_jsonl(path, [episode("a"), episode("b")])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="line 2: cut off before its end"):
        read_jsonl(path)
    assert [t.id for t in read_jsonl(path, on_error="skip", on_skip=lambda error: None)] == ["a"]


def test_missing_file_and_empty_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no trajectory file"):
        read_jsonl(tmp_path / "none.jsonl")
    path = tmp_path / "t.jsonl"
    write_jsonl(path, [episode("a")])
    path.write_bytes(b"\n" + path.read_bytes() + b"  \n")
    assert [t.id for t in read_jsonl(path)] == ["a"]


def test_what_json_cannot_hold_names_the_trajectory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="trajectory 'bad' cannot be written"):
        write_jsonl(tmp_path / "t.jsonl", [episode(), episode("bad", metadata={"x": object()})])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    write_jsonl(path, [episode("old")])

    def broken() -> Iterator[Trajectory]:
        yield episode("new")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_jsonl(path, broken())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*t\.jsonl: No space left on device"):
        write_jsonl(path, [episode("new")])
    assert [t.id for t in read_jsonl(path)] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "f") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_places_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write to"):
        check_writable(tmp_path / "file" / "folder")
    with pytest.raises(UserError, match="MiB are needed"):
        check_writable(tmp_path, need_bytes=2**62)
    assert check_writable(tmp_path / "new" / "folder", need_bytes=1).is_dir()
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def filled(keep: int, iterations: range) -> TrajectoryBuffer:
    buffer = TrajectoryBuffer(keep)
    for iteration in iterations:
        buffer.append([episode(f"{iteration}.{i}", iteration) for i in range(2)], iteration)
    return buffer


def test_buffer_keeps_the_last_iterations() -> None:
    buffer = filled(3, range(5))
    assert buffer.iterations() == [2, 3, 4]
    assert [t.id for t in buffer.latest(2)] == ["3.0", "3.1", "4.0", "4.1"]
    assert len(buffer.latest(99)) == len(buffer) == 6
    assert buffer.latest(0) == []
    assert [t.id for t in buffer.of(2)] == ["2.0", "2.1"]
    assert buffer.of(0) == []


def test_buffer_takes_one_iteration_in_parts_but_never_an_older_one() -> None:
    buffer = filled(2, range(3))
    buffer.append([episode("late")], 2)
    assert [t.id for t in buffer.latest(1)] == ["2.0", "2.1", "late"]
    with pytest.raises(UserError, match="iteration 1 cannot follow iteration 2"):
        buffer.append([episode()], 1)
    with pytest.raises(UserError, match="at least 1"):
        TrajectoryBuffer(0)


def test_an_iteration_without_trajectories_counts_as_one() -> None:
    buffer = filled(2, range(2))
    buffer.append([], 2)
    assert buffer.iterations() == [1, 2]
    assert buffer.latest(1) == []


def test_buffer_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    buffer = filled(2, range(3))
    buffer.save(tmp_path)
    buffer.append([], 3)
    buffer.save(tmp_path)
    loaded = TrajectoryBuffer.load(tmp_path)
    assert loaded.keep_iterations == 2
    assert loaded.iterations() == [2, 3]
    assert loaded.latest(2) == buffer.latest(2)
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == ["iteration_000002.jsonl", "iteration_000003.jsonl"]
    assert TrajectoryBuffer.load(tmp_path, keep_iterations=1).iterations() == [3]


def test_a_folder_without_a_buffer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no trajectory buffer"):
        TrajectoryBuffer.load(tmp_path)
    (tmp_path / "buffer.json").write_text("{}")
    with pytest.raises(DataError, match="not the index"):
        TrajectoryBuffer.load(tmp_path)
