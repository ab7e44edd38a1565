"""Trajectories as a page holds them: columns for the list of all, and chunks with the text of a hundred each.

The list is read at once; a chunk only when one of its trajectories is opened or searched. Texts, which repeat from turn
to turn, stand once per chunk; prompts' ids, which no reader wants, are left out.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from agentrl.buffer.jsonl import read_jsonl
from agentrl.errors import DataError
from agentrl.images import png_bytes
from agentrl.report.runs import Run
from agentrl.types import Content, ImagePart, Trajectory, group_trajectories

CHUNK = 100
"""Trajectories of a chunk."""

MODES = ("total", "episode", "step", "reward", "environment")
"""What a turn's colour can show: the advantage, its two terms, the step reward, the environment's reward."""

LEVELS = "abcdefghi"
"""A turn in the list: from most negative (a) by none (e) to most positive (i); ``.`` where nothing is known."""

Credit = dict[str, list[float]]
"""Of one trajectory: `episode`, `step` and, where there is one, `reward`, per turn."""


@dataclass
class Shown:
    """The trajectories of a report."""

    columns: dict[str, list[Any]] = field(default_factory=dict)
    """One entry per trajectory: what the list shows, sorts and filters by."""
    scales: dict[str, float] = field(default_factory=dict)
    """Per mode, the size at which a colour is full: the 98th percentile."""
    chunks: list[dict[str, Any]] = field(default_factory=list)
    vocabulary: dict[int, dict[int, str]] = field(default_factory=dict)
    """Per run: text of every token id that occurs."""
    images: list[str] = field(default_factory=list)
    """PNG files, base64."""
    found: int = 0
    """Trajectories in the files, shown or not."""
    images_left_out: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    """Messages of failed episodes, all files: how often each."""
    pairs: list[tuple[float, float]] = field(default_factory=list)
    """(score of the better, score of the worse) of pairs inside the groups shown, by the sum of step rewards."""
    notes: list[str] = field(default_factory=list)


class Loaded(NamedTuple):
    """A trajectory of a report. Ids say which one within its file alone: `collect` derives them from seeds."""

    run: int
    """Number of the run."""
    file: int
    """Place of its file among the run's."""
    trajectory: Trajectory
    credit: Credit | None


@dataclass
class FilePart:
    """What a report takes from one trajectory file."""

    found: int
    """Trajectories in it."""
    scored: int
    """Scorable ones."""
    successes: int
    stops: Counter[str]
    """How they ended."""
    chosen: list[tuple[Trajectory, Credit | None]]
    errors: list[str]
    """Messages of its failed episodes."""
    notes: list[str]


Cache = dict[tuple[Any, ...], FilePart]
"""Files that have not changed since they were read, for whoever makes reports again and again."""


def load(
    runs: Sequence[Run], limit: int, on_file: Callable[[int, int], None] | None = None, cache: Cache | None = None
) -> tuple[list[Loaded], Shown]:
    """Reads the trajectories that a report shows, and counts all.

    With more than `limit` in the files, whole groups are taken, the first ones of every file, so that outcomes are
    represented as they came; episodes that failed are taken too.

    Args:
        runs: what to read.
        limit: largest number of trajectories shown, over all runs; 0 = all.
        on_file: called with (files read, files) after each.
        cache: of earlier calls; gains the files that were read now.
    """
    shown, loaded = Shown(), list[Loaded]()
    files = [(number, run, place, file) for number, run in enumerate(runs) for place, file in enumerate(run.files)]
    for done, (number, run, place, file) in enumerate(files):
        room = math.ceil((limit - len(loaded)) / (len(files) - done)) if limit else None
        if cache is not None and room is not None:
            # A share that changed with every new file would be read anew from all files.
            room = max(1, limit >> (len(files) - 1).bit_length())
        part = _cached(run, file, room, cache)
        shown.found += part.found
        for message in part.errors:
            shown.errors[message] = shown.errors.get(message, 0) + 1
        run.notes += part.notes
        run.scored += part.scored
        run.successes += part.successes
        run.failed += part.found - part.scored
        run.stops += part.stops
        loaded += [Loaded(number, place, t, credit) for t, credit in part.chosen]
        if on_file is not None:
            on_file(done + 1, len(files))
    return loaded, shown


def read_part(file: Path, credit_file: Path, room: int | None) -> FilePart:
    """Reads a trajectory file and the credit beside it; what cannot be read becomes a note.

    Args:
        file: trajectories.
        credit_file: their credit; may be missing.
        room: trajectories to take; None = all.
    """
    notes: list[str] = []
    trajectories = read_tolerantly(file, notes)
    credit = read_credit(credit_file, notes)
    chosen = trajectories if room is None else _whole_groups(trajectories, room)
    return FilePart(
        found=len(trajectories),
        scored=sum(t.scorable for t in trajectories),
        successes=sum(t.scorable and t.success for t in trajectories),
        stops=Counter(t.stop_reason.value for t in trajectories),
        chosen=[(t, _fitting(credit.get(t.id), t)) for t in chosen],
        errors=[t.error for t in trajectories if t.error],
        notes=notes,
    )


def read_tolerantly(file: Path, notes: list[str]) -> list[Trajectory]:
    """Returns the trajectories of a file that can be read; the others become one of the `notes`."""
    lost: list[DataError] = []
    try:
        found = read_jsonl(file, on_error="skip", on_skip=lost.append)
    except DataError as error:
        notes.append(f"{error}.")
        return []
    if lost:
        lines = "1 line" if len(lost) == 1 else f"{len(lost)} lines"
        notes.append(f"{file.name}: {lines} left out, the first because: {_after_name(lost[0], file)}.")
    elif not found:
        notes.append(f"{file.name} is empty.")
    return found


def read_credit(file: Path, notes: list[str]) -> dict[str, Credit]:
    """Returns the credit of a file's trajectories by id; broken lines become one of the `notes`."""
    credit: dict[str, Credit] = {}
    broken: list[int] = []
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            credit[row["id"]] = {
                key: [float(x) for x in row[key]] for key in ("episode", "step", "reward") if key in row
            }
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            broken.append(number)
    if broken:
        lines_are = "1 broken line" if len(broken) == 1 else f"{len(broken)} broken lines"
        notes.append(f"credit of {file.name}: {lines_are} left out, the first is line {broken[0]}.")
    return credit


def encode(loaded: Sequence[Loaded], shown: Shown, runs: Sequence[Run], image_bytes: int) -> None:
    """Fills `shown` with the columns and chunks of `loaded`; pictures up to `image_bytes` bytes in all."""
    values = [modes_of(one.trajectory, one.credit) for one in loaded]
    shown.scales = {mode: _full(chain.from_iterable(v.get(mode, ()) for v in values)) for mode in MODES}
    rows = [_row(one, v, shown.scales) for one, v in zip(loaded, values, strict=True)]
    shown.columns = {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}
    pictures = _Pictures(shown, image_bytes)
    for start in range(0, len(loaded), CHUNK):
        shown.chunks.append(_chunk(loaded[start : start + CHUNK], pictures))
    shown.vocabulary = {number: _token_texts(run, number, loaded) for number, run in enumerate(runs)}
    shown.pairs = list(_pairs(loaded))


def modes_of(t: Trajectory, credit: Credit | None) -> dict[str, list[float]]:
    """Returns per-turn values of every mode that the trajectory has any of."""
    values = {"environment": [turn.reward for turn in t.turns]}
    if credit is not None:
        values |= {"episode": credit["episode"], "step": credit["step"]}
        values["total"] = [a + b for a, b in zip(credit["episode"], credit["step"], strict=True)]
        if "reward" in credit:
            values["reward"] = credit["reward"]
    return values


def levels(values: Sequence[float], full: float) -> str:
    """Returns a letter of `LEVELS` per value."""
    half = len(LEVELS) // 2
    shares = (max(-1.0, min(1.0, value / full)) * half if full and math.isfinite(value) else 0.0 for value in values)
    return "".join(LEVELS[half + (math.ceil(share) if share > 0 else math.floor(share))] for share in shares)


def _cached(run: Run, file: Path, room: int | None, cache: Cache | None) -> FilePart:
    credit_file = run.credit_file(file)
    if cache is None:
        return read_part(file, credit_file, room)
    key = (file, _state(file), _state(credit_file), room)
    if key not in cache:
        for old in [other for other in cache if other[0] == file]:
            del cache[old]
        cache[key] = read_part(file, credit_file, room)
    return cache[key]


def _state(file: Path) -> tuple[int, int] | None:
    """Changes with the file's content."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _fitting(credit: Credit | None, t: Trajectory) -> Credit | None:
    """`credit` where it has one entry per turn: a damaged or foreign file may not."""
    if credit is None or not {"episode", "step"} <= credit.keys():
        return None
    return credit if all(len(values) == len(t.turns) for values in credit.values()) else None


def _whole_groups(trajectories: Sequence[Trajectory], room: int) -> list[Trajectory]:
    chosen: list[Trajectory] = []
    for group in group_trajectories(trajectories):
        if len(chosen) + len(group.trajectories) <= room or not chosen:
            chosen += group.trajectories[: max(room, 1)]
        else:
            chosen += [t for t in group.trajectories if not t.scorable][: max(0, room - len(chosen))]
    return chosen


def _row(one: Loaded, values: dict[str, list[float]], scales: dict[str, float]) -> dict[str, Any]:
    t = one.trajectory
    return {
        "run": one.run,
        "file": one.file,
        "id": t.id,
        "group": t.group_id,
        "iteration": t.iteration,
        "env": t.env,
        "policy": t.policy,
        "seed": t.seed,
        "outcome": _short(t.outcome),
        "success": int(t.success),
        "scorable": int(t.scorable),
        "stop": t.stop_reason.value,
        "turns": len(t.turns),
        "tokens": t.action_tokens,
        "reward": _short(t.total_reward),
        "invalid": sum(turn.info.get("valid_action") is False for turn in t.turns),
        **{f"strip_{m}": levels(values[m], scales[m]) if m in values else "." * len(t.turns) for m in MODES},
    }


def _chunk(part: Sequence[Loaded], pictures: _Pictures) -> dict[str, Any]:
    """The texts of some trajectories: `strings`, and per trajectory columns over its turns that point there."""
    place: dict[str, int] = {}

    def text(value: str) -> int:
        return place.setdefault(value, len(place))

    def content(value: Content | None) -> Any:
        if value is None or isinstance(value, str):
            return None if value is None else text(value)
        return [
            [pictures.place(part), text(part.alt)] if isinstance(part, ImagePart) else text(part.text) for part in value
        ]

    rows = []
    for _, _, t, credit in part:
        row: dict[str, Any] = {
            "obs": [content(turn.observation) for turn in t.turns],
            "act": [text(turn.action) for turn in t.turns],
            "env": [_short(turn.reward) for turn in t.turns],
            "bad": [n for n, turn in enumerate(t.turns) if turn.info.get("valid_action") is False],
            "ids": [turn.action_ids for turn in t.turns],
            "lp": [[_short(p) for p in turn.action_logprobs] for turn in t.turns],
            "sec": [_short(sum(turn.timings.values())) for turn in t.turns],
            "end": content(t.final_observation),
        }
        for key in ("episode", "step", "reward"):
            if credit is not None and key in credit:
                row[key] = [_short(value) for value in credit[key]]
        if t.instructions:
            row["sys"] = text(t.instructions)
        if t.error:
            row["error"] = text(t.error)
        if t.task:
            row["task"] = text(json.dumps(t.task, ensure_ascii=False))
        rows.append(row)
    return {"strings": list(place), "rows": rows}


class _Pictures:
    """Puts PNG files into `Shown.images`, each once, until the bound is reached."""

    def __init__(self, shown: Shown, bound: int) -> None:
        self._shown, self._left = shown, bound
        self._places: dict[tuple[str, str], int] = {}

    def place(self, part: ImagePart) -> int:
        """The picture's number; -1 where it does not fit any more, -2 where its file cannot be read."""
        key = (str(part._source), part.path)
        if key not in self._places:
            self._places[key] = self._take(part)
        return self._places[key]

    def _take(self, part: ImagePart) -> int:
        try:
            png = png_bytes(part)
        except (DataError, ValueError) as error:  # ValueError: a name that no file can have
            self._shown.images_left_out += 1
            self._shown.notes.append(f"{error}.")
            return -2
        if len(png) > self._left or not png.startswith(b"\x89PNG"):
            self._shown.images_left_out += 1
            return -1
        self._left -= len(png)
        self._shown.images.append(base64.b64encode(png).decode())
        return len(self._shown.images) - 1


def _pairs(loaded: Sequence[Loaded]) -> Iterator[tuple[float, float]]:
    """(score of the better, score of the worse) of every success and failure of one group that have step rewards."""
    groups: dict[tuple[int, int, str], list[tuple[bool, float]]] = {}
    for run, file, t, credit in loaded:
        if t.scorable and credit is not None and "reward" in credit and math.isfinite(score := sum(credit["reward"])):
            groups.setdefault((run, file, t.group_id), []).append((t.success, score))
    for members in groups.values():
        lost = [score for success, score in members if not success]
        yield from ((score, other) for success, score in members if success for other in lost)


def _token_texts(run: Run, number: int, loaded: Sequence[Loaded]) -> dict[int, str]:
    """Text of every sampled id of a run; empty where the model's tokenizer is not there."""
    ids = {id for one in loaded if one.run == number for turn in one.trajectory.turns for id in turn.action_ids}
    file = run.tokenizer_file()
    if not ids or file is None:
        return {}
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        return {id: tokenizer.decode([id], skip_special_tokens=False) for id in sorted(ids)}
    except Exception as error:  # tokenizers raises a bare Exception for a broken file
        run.notes.append(f"The tokenizer cannot be read, tokens are shown by number: {error}.")
        return {}


def _full(values: Iterable[float]) -> float:
    """The 98th percentile of the sizes, and the largest where that is nothing; 0 where all are."""
    sizes = sorted(abs(value) for value in values if math.isfinite(value))
    if not sizes:
        return 0.0
    return sizes[math.ceil(0.98 * len(sizes)) - 1] or sizes[-1]


def _short(value: float) -> float | None:
    """Four significant digits: enough to read. None where it is no number."""
    if not math.isfinite(value):
        return None
    value = float(f"{value:.4g}")
    return int(value) if value.is_integer() else value


def _after_name(error: DataError, file: Path) -> str:
    return str(error).removeprefix(f"{file} ")
