"""Does the solver solve real levels? Boxoban levels loaded, and a sample of them solved under a time limit each.

Every solution is replayed by the rules of the game. Prints, for each file, how many levels it holds, how many of the
sample were solved and how many ran into the limit, and the processor seconds of a level: median, 99th percentile, most.

    python benchmarks/boxoban.py
    python benchmarks/boxoban.py --sample 1000 --limit-s 1 --json boxoban.json
"""

from __future__ import annotations

import argparse
import platform
import random
from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import Any

from common import show, table, write_json

from agentrl.errors import DataError
from environments.sokoban.board import apply_move
from environments.sokoban.levels import load_levels
from environments.sokoban.solver import SearchLimitError, solve

LEVELS = Path(__file__).resolve().parents[2] / "shared" / "data" / "boxoban"
UNBOUNDED = 10**9
"""Boards: the clock is the limit here."""


def attempt(board: str, limit_s: float) -> tuple[str, float, int]:
    """Returns what became of a level (solved, timed out, unsolvable), its processor seconds and its moves."""
    start = process_time()
    try:
        moves = solve(board, limit=UNBOUNDED, limit_s=limit_s)
    except SearchLimitError:
        return "timed out", process_time() - start, 0
    took = process_time() - start
    if moves is None:
        return "unsolvable", took, 0
    for name in moves:
        board = apply_move(board, name)
    if "$" in board:
        raise AssertionError(f"the moves do not solve the level; they lead to\n{board}")
    return "solved", took, len(moves)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Solves the samples and prints the table; returns every figure."""
    paths = sorted(options.levels.glob("*.txt")) if options.levels.is_dir() else [options.levels]
    if not paths:
        raise DataError(f"{options.levels}: no level files (*.txt) in it; --levels names a file or folder of Boxoban's")
    settings = {"sample": options.sample, "limit_s": options.limit_s, "seed": options.seed}
    around = {"python": platform.python_version(), "machine": platform.machine()}
    show("boxoban", settings, around)
    files, rows = [], []
    for path in paths:
        levels = load_levels(str(path))
        drawn = random.Random(options.seed).sample(levels, min(options.sample, len(levels)))
        tried = [attempt(board, options.limit_s) for board in drawn]
        ends = [end for end, _, _ in tried]
        seconds = sorted(took for _, took, _ in tried)
        found: dict[str, Any] = {"file": path.name, "levels": len(levels), "sample": len(drawn)}
        found |= {end.replace(" ", "_"): ends.count(end) for end in ("solved", "timed out", "unsolvable")}
        found["seconds_median"], found["seconds_most"] = seconds[len(seconds) // 2], seconds[-1]
        found["seconds_p99"] = seconds[min(len(seconds) - 1, len(seconds) * 99 // 100)]
        files.append(found)
        times = [f"{found[f'seconds_{name}']:.3f}" for name in ("median", "p99", "most")]
        counts = [str(found[name]) for name in ("levels", "sample", "solved", "timed_out", "unsolvable")]
        rows.append([path.name, *counts, *times])
    table(["file", "levels", "sample", "solved", "timed out", "unsolvable", "s median", "s 99 %", "s most"], rows)
    return {"settings": settings, "surroundings": around, "files": files}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=Path, default=LEVELS, metavar="PATH", help="file or folder of level files")
    parser.add_argument("--sample", type=int, default=200, metavar="N", help="levels of each file to solve")
    parser.add_argument("--limit-s", type=float, default=10.0, metavar="S", help="processor seconds a level may take")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    result = run(options)
    write_json(options.json, result)
    return result


if __name__ == "__main__":
    main()
