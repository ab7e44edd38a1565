"""Sokoban: boards, moves, rewards, levels, splits and the solver, against brute force written anew here."""

from __future__ import annotations

import heapq
import importlib
import json
import math
import pathlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import assert_table_agrees

from agentrl import envs
from agentrl.errors import ActionError, DataError, UserError
from environments.sokoban.board import MOVES, apply_move, draw_board, read_board
from environments.sokoban.env import SokobanEnv
from environments.sokoban.levels import LevelSettings, canonical, generate, in_split, load_levels
from environments.sokoban.solver import SearchLimitError, distance, distance_table, move_values, solve

BOXOBAN = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "boxoban"
needs_boxoban = pytest.mark.skipif(not BOXOBAN.is_dir(), reason="no Boxoban files beside the checkout")
STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
BOARD = "######\n#    #\n#@$ .#\n#    #\n#    #\n######"


class Grid:
    """A second implementation of the rules, on (row, column) cells; walls are whatever is '#' or off the board."""

    def __init__(self, board: str) -> None:
        cells = {(r, c): char for r, row in enumerate(board.split("\n")) for c, char in enumerate(row)}
        self.free = {cell for cell, char in cells.items() if char != "#"}
        self.targets = {cell for cell, char in cells.items() if char in ".*+"}
        self.player = next(cell for cell, char in cells.items() if char in "@+")
        self.boxes = frozenset(cell for cell, char in cells.items() if char in "$*")

    def after(self, state, action):
        """Returns the state after `action`, and whether it pushed."""
        (row, column), boxes = state
        down, right = STEPS[action]
        cell, beyond = (row + down, column + right), (row + 2 * down, column + 2 * right)
        if cell not in self.free or (cell in boxes and (beyond not in self.free or beyond in boxes)):
            return state, 0
        if cell in boxes:
            return (cell, (boxes - {cell}) | {beyond}), 1
        return (cell, boxes), 0

    def fewest(self, of_pushes: bool = False, start=None) -> float:
        """Returns the fewest moves (or pushes) to the solution by Dijkstra's algorithm over all states."""
        start = start or (self.player, self.boxes)
        queue, known = [(0, 0, start)], {start: 0}
        while queue:
            cost, _, state = heapq.heappop(queue)
            if cost > known[state]:
                continue
            if state[1] == self.targets:
                return cost
            for action in MOVES:
                child, pushed = self.after(state, action)
                total = cost + (pushed if of_pushes else 1)
                if total < known.get(child, math.inf):
                    known[child] = total
                    heapq.heappush(queue, (total, len(known), child))
        return math.inf


def scattered(seed: int, boxes: int, side: int = 6, walls: int = 4) -> str:
    """Returns a board with everything in random places: often without a solution."""
    rng = random.Random(seed)
    cells = [["#"] * side] + [["#", *" " * (side - 2), "#"] for _ in range(side - 2)] + [["#"] * side]
    inner = [(r, c) for r in range(1, side - 1) for c in range(1, side - 1)]
    rng.shuffle(inner)
    for char in "#" * rng.randint(0, walls) + "@" + "$" * boxes + "." * boxes:
        row, column = inner.pop()
        cells[row][column] = char
    return "\n".join(map("".join, cells))


def images(board: str) -> list[str]:
    """Returns the eight rotations and mirror images of a board, through numpy."""
    grid = np.array([list(row) for row in board.split("\n")])
    turned = [np.rot90(side, quarter) for side in (grid, np.fliplr(grid)) for quarter in range(4)]
    return ["\n".join("".join(row) for row in image) for image in turned]


def replay(board: str, moves: list[str]) -> str:
    for name in moves:
        after = apply_move(board, name)
        assert after != board, "a solution has no idle move"
        board = after
    return board


def pushes(board: str, moves: list[str]) -> int:
    number = 0
    for name in moves:
        after = apply_move(board, name)
        number += read_board(after)[2] != read_board(board)[2]
        board = after
    return number


# Boards and moves


@given(st.integers(0, 10_000), st.integers(1, 3))
@settings(max_examples=100, deadline=None, database=None)
def test_boards_survive_reading_and_drawing(seed, boxes):
    board = scattered(seed, boxes)
    for action in [random.Random(seed + k).choice(MOVES) for k in range(30)]:
        assert draw_board(*read_board(board)) == board
        board = apply_move(board, action)


@given(st.integers(0, 10_000), st.integers(1, 3), st.lists(st.sampled_from(MOVES), max_size=60))
@settings(max_examples=100, deadline=None, database=None)
def test_moves_follow_the_rules(seed, boxes, actions):
    board = scattered(seed, boxes)
    grid = Grid(board)
    state = grid.player, grid.boxes
    for action in actions:
        board, state = apply_move(board, action), grid.after(state, action)[0]
        assert (Grid(board).player, Grid(board).boxes) == state


@pytest.mark.parametrize(
    ("before", "action", "after"),
    [
        ("#@ $.#", "right", "# @$.#"),
        ("#@$ .#", "right", "# @$.#"),
        ("# @$.#", "right", "#  @*#"),
        ("#@*  #", "right", "# +$ #"),
        ("#+$  #", "right", "#.@$ #"),
        ("#@$#.#", "right", "#@$#.#"),
        ("#@$*.#", "right", "#@$*.#"),
        ("#@$ .#", "left", "#@$ .#"),
        ("#@$ .#", "up", "#@$ .#"),
    ],
)
def test_moves_by_hand(before, action, after):
    wall = "######"
    assert apply_move(f"{wall}\n{before}\n{wall}", action) == f"{wall}\n{after}\n{wall}"


@pytest.mark.parametrize(
    ("board", "says"),
    [
        ("#####\n#@$.#\n####", "one width"),
        ("#####\n#@$x#\n#####", "'x' is no cell"),
        ("#####\n# $.#\n#####", "one player .* not 0"),
        ("#######\n#@@$. #\n#######", "one player .* not 2"),
        ("#####\n#@$ #\n#####", "1 boxes and 0 targets"),
        ("#####\n#@  #\n#####", "at least one"),
        ("######\n#@$.  \n######", "walls"),
        ("###### \n#@$.##.\n######$", "walls"),
        ("", "one player"),
    ],
)
def test_what_is_no_board_is_refused(board, says):
    with pytest.raises(DataError, match=says):
        read_board(board)


# The environment


def test_the_observation_is_the_board_and_nothing_else():
    env = envs.make("Sokoban-v0")
    board, info = env.reset(seed=0)
    assert set(board) <= set("# .$*@+\n")
    assert read_board(board)
    assert info["state_key"] == board
    for action in MOVES * 2:
        board, _, _, _, info = env.step(action)
        assert info["state_key"] == board == env.unwrapped._last
        assert info["admissible_actions"] == list(MOVES)


@pytest.mark.parametrize(
    ("board", "turns", "parts"),
    [
        ("#@$ .#", ["right"], {"boxes": 0, "moves": -0.1, "solved": 0}),
        ("#@$ .#", ["left"], {"boxes": 0, "moves": -0.1, "solved": 0}),
        ("#@$ .#", ["hop"], {"boxes": 0, "moves": -0.1, "solved": 0}),
        ("#@$ .#", ["right", "right"], {"boxes": 1, "moves": -0.1, "solved": 10}),
        ("#@*$.#", ["right"], {"boxes": 0, "moves": -0.1, "solved": 0}),
        ("#@* $.#", ["right"], {"boxes": -1, "moves": -0.1, "solved": 0}),
        ("#@$.*$ .#", ["right"], {"boxes": 1, "moves": -0.1, "solved": 0}),
        ("#@$..$ #", ["right, right"], {"boxes": 1, "moves": -0.2, "solved": 0}),
        ("#@$ .#", ["right right up"], {"boxes": 1, "moves": -0.2, "solved": 10}),
    ],
)
def test_reward_parts_by_hand(board, turns, parts):
    board = "#" * len(board) + f"\n{board}\n" + "#" * len(board)
    for reward in "sparse", "shaped":
        env = SokobanEnv(reward=reward, actions_per_turn=max(len(turn.split()) for turn in turns))
        env.reset(seed=0, options={"board": board})
        for turn in turns:
            _, received, terminated, _, info = env.step(turn)
        assert info["reward_parts"] == pytest.approx(parts)
        assert received == pytest.approx(sum(parts.values()) if reward == "shaped" else float(parts["solved"] > 0))
        assert terminated == info["success"] == (parts["solved"] > 0)


def test_solving_terminates_and_the_turn_limit_only_truncates():
    env = envs.make("Sokoban-v0", max_turns=2)
    env.reset(seed=0, options={"board": BOARD})
    assert env.step("right")[2:4] == (False, False)
    _, reward, terminated, truncated, info = env.step("right")
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, True, True)
    with pytest.raises(UserError, match="after the episode ended"):
        env.step("up")
    env.reset(seed=0, options={"board": BOARD})
    env.step("left")
    _, reward, terminated, truncated, info = env.step("left")
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, True, False)


@pytest.mark.parametrize(
    ("text", "moves"),
    [
        ("up", ["up"]),
        (" UP\n", ["up"]),
        ("Up, up,left", ["up", "up", "left"]),
        ("down right", ["down", "right"]),
        ("left\nleft", ["left", "left"]),
        ("Action: up", ["up"]),
        ("I push it. Action: up, down", ["up", "down"]),
        ("<answer>up</answer>", ["up"]),
        ("<think>down?</think><answer> left, up </answer> done", ["left", "up"]),
        ("<answer>right", ["right"]),
    ],
)
def test_actions_in_their_spellings(text, moves):
    assert SokobanEnv(actions_per_turn=3).parse_action(text) == moves


@pytest.mark.parametrize(
    "text", ["", "north", "upp", "up!", "I go up", "up;down", "<answer></answer>", "u p", "Action:"]
)
def test_what_is_no_action(text):
    with pytest.raises(ActionError, match="up, down, left or right"):
        SokobanEnv(actions_per_turn=3).parse_action(text)


@pytest.mark.parametrize(("limit", "text"), [(1, "up, up"), (3, "up up up up"), (1, "up " * 100_000)])
def test_more_moves_than_a_turn_holds(limit, text):
    with pytest.raises(ActionError, match=f"at most {limit} move"):
        SokobanEnv(actions_per_turn=limit).parse_action(text)


def test_moves_of_one_turn_are_played_in_order():
    env = SokobanEnv(actions_per_turn=4)
    env.reset(seed=0, options={"board": BOARD})
    assert env.step("down, right, up, up")[0] == "######\n# $  #\n# @ .#\n#    #\n#    #\n######"


def test_instructions_name_the_action_format():
    assert "one move" in SokobanEnv().instructions
    assert "1 to 3 moves" in SokobanEnv(actions_per_turn=3).instructions


# The generator and the splits


@pytest.mark.parametrize("bounds", [(1, 1), (2, 8), (5, None)])
def test_one_box_levels_keep_their_bounds_exactly(bounds):
    rng, low, high = np.random.default_rng(0), bounds[0], bounds[1] or 12
    lengths = set()
    for _ in range(60):
        board = generate(LevelSettings(min_solution=low, max_solution=bounds[1]), rng)
        fewest = Grid(board).fewest()
        assert low <= fewest <= high
        lengths.add(fewest)
    assert lengths >= set(range(low, min(high, 8) + 1))


@pytest.mark.parametrize("boxes", [2, 3])
def test_levels_with_several_boxes_are_solvable_within_the_bound(boxes):
    rng = np.random.default_rng(1)
    for _ in range(10):
        board = generate(LevelSettings(boxes=boxes, max_solution=14), rng)
        assert (board.count("$"), board.count("*")) == (boxes, 0)
        assert Grid(board).fewest() <= 14


@pytest.mark.parametrize(("size", "boxes"), [(6, 4), (8, 1), (10, 4)])
def test_sizes_and_boxes_are_as_asked(size, boxes):
    env = SokobanEnv(size=size, boxes=boxes, walls=[2, 3])
    board, _ = env.reset(seed=2)
    rows = board.split("\n")
    assert [len(row) for row in rows] == [size] * size
    assert board.count("$") == boxes
    assert 2 <= board.count("#") - 4 * (size - 1) <= 3


def test_levels_are_varied():
    rng = np.random.default_rng(0)
    boards = [generate(LevelSettings(), rng) for _ in range(300)]
    assert len(set(boards)) > 270
    assert len({board.translate(str.maketrans("$@", "  ")) for board in boards}) > 150
    assert len({board.count("#") for board in boards}) == 5, "0 to 4 interior walls"


@given(st.integers(0, 100_000), st.integers(1, 3))
@settings(max_examples=60, deadline=None, database=None)
def test_a_level_and_its_symmetric_images_are_in_one_split(seed, boxes):
    family = images(scattered(seed, boxes))
    assert len({canonical(board) for board in family}) == 1
    assert canonical(family[0]) in family
    for board in family:
        assert in_split(board, "all")
        assert in_split(board, "test") != in_split(board, "train")
        assert in_split(board, "test") == in_split(family[0], "test")


def test_training_and_test_levels_never_meet_even_turned_or_mirrored():
    drawn = {}
    for split, number in ("train", 1500), ("test", 300):
        env = SokobanEnv(split=split, max_solution=5, walls=(0, 1))
        drawn[split] = {env.reset(seed=seed)[0] for seed in range(number)}
    everything = {image for board in drawn["test"] for image in images(board)}
    assert len(drawn["test"]) > 100
    assert not everything & drawn["train"]


def test_the_split_is_the_same_on_every_machine():
    boards = [scattered(seed, 1) for seed in range(400)]
    tests = [seed for seed, board in enumerate(boards) if in_split(board, "test")]
    assert 20 < len(tests) < 60, "about one in ten"
    assert tests[:6] == [3, 4, 7, 8, 13, 32]


def test_test_levels_are_as_long_as_training_levels():
    means = []
    for split in "train", "test":
        rng = np.random.default_rng(3)
        settings_ = LevelSettings(split=split)
        means.append(np.mean([distance(generate(settings_, rng)) for _ in range(400)]))
    assert abs(means[0] - means[1]) < 0.8, means


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"size": 5}, "size=5"),
        ({"size": 11}, "size=11"),
        ({"boxes": 0}, "boxes=0"),
        ({"boxes": 5}, "boxes=5"),
        ({"min_solution": 9, "max_solution": 8}, "min_solution=9"),
        ({"min_solution": 0}, "min_solution=0"),
        ({"walls": (3, 2)}, "walls="),
        ({"walls": (0, 99)}, "walls="),
        ({"split": "tset"}, "split='tset'"),
        ({"min_solution": 500, "max_solution": 501, "walls": (13, 13)}, "no level with .*min_solution=500"),
        ({"actions_per_turn": 0}, "actions_per_turn=0"),
        ({"reward": "dense"}, "reward='dense'"),
    ],
)
def test_impossible_settings_are_refused_before_any_episode(kwargs, says):
    with pytest.raises(UserError, match=says):
        envs.make("Sokoban-v0", **kwargs)


# Level files


def test_levels_of_a_file_are_chosen_by_the_seed(tmp_path):
    rows = BOARD.split("\n")
    boards = ["\n".join([*rows[:2], row, *rows[3:]]) for row in ("#@$ .#", "# @$.#", "#@ $.#", "#. $@#")]
    (tmp_path / "a.txt").write_text("".join(f"; {n}\n{board}\n\n" for n, board in enumerate(boards[:3])))
    (tmp_path / "b.txt").write_text(f"; 0\n{boards[3]}")
    (tmp_path / "notes.md").write_text("no levels here")
    assert load_levels(str(tmp_path)) == tuple(boards)
    env = SokobanEnv(levels=tmp_path)
    starts = [env.reset(seed=seed)[0] for seed in range(60)]
    assert set(starts) == set(boards)
    assert starts == [env.reset(seed=seed)[0] for seed in range(60)]


def test_ragged_rows_of_a_file_are_filled_up(tmp_path):
    (tmp_path / "ragged.txt").write_text("; 0\n#####\n#@  #\n# $.###\n#     #\n#######\n")
    (board,) = load_levels(str(tmp_path / "ragged.txt"))
    assert board.split("\n")[0] == "#####  "
    assert replay(board, solve(board)).count("*") == 1


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("######\n", 1, "begins with '; N'"),
        ("; 0\n#####\n#@$.#\n#####\n; 1\n; 2\n#####\n#@$.#\n#####\n", 5, "no rows"),
        ("; 0\n#####\n#@$.#\n#####\n\n; 1\n#####\n# $.#\n#####\n", 6, "one player"),
        ("; 0\n#####\n#@$.#\n#####\n\n; 1\n#####\n#@$.#\n", 6, "closed walls|inside its walls"),
        ("; 0\n#####\n#@$?#\n#####\n", 1, "'[?]' is no cell"),
        ("", None, "no level"),
    ],
)
def test_broken_level_files_are_named_with_their_line(tmp_path, text, line, says):
    file = tmp_path / "levels.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=says) as error:
        SokobanEnv(levels=file)
    assert (f"{file}:{line}:" if line else str(file)) in str(error.value)


def test_missing_or_binary_level_files_are_said(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for file in tmp_path / "missing.txt", tmp_path / "binary.txt":
        with pytest.raises(DataError, match=f"{file.name}: cannot be read"):
            load_levels(str(file))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="0 file"):
        load_levels(str(tmp_path / "empty"))


@needs_boxoban
def test_real_boxoban_files_load_and_their_splits_are_disjoint():
    levels = load_levels(str(BOXOBAN))
    assert len(levels) == 2000
    assert all(board.count("$") + board.count("*") == 4 for board in levels)
    train, test = load_levels(str(BOXOBAN), "train"), load_levels(str(BOXOBAN), "test")
    assert len(train) + len(test) == 2000
    assert 140 < len(test) < 260
    assert not set(map(canonical, train)) & set(map(canonical, test))
    env = SokobanEnv(levels=BOXOBAN / "medium-valid-000.txt", split="test")
    assert env.reset(seed=0)[0] in test


# The solver


@pytest.mark.parametrize("boxes", [1, 2])
def test_solutions_have_the_fewest_pushes_and_unsolvable_boards_have_none(boxes):
    solved = 0
    for seed in range(200):
        board = scattered(seed, boxes)
        fewest = Grid(board).fewest(of_pushes=True)
        moves = solve(board)
        if moves is None:
            assert fewest == math.inf, f"seed {seed}:\n{board}"
        else:
            assert "$" not in replay(board, moves)
            assert pushes(board, moves) == fewest, f"seed {seed}:\n{board}"
            solved += 1
    assert 15 < solved < 185


def test_three_boxes_on_tight_boards():
    for seed in range(30):
        board = scattered(seed, 3, side=6, walls=5)
        moves = solve(board)
        fewest = Grid(board).fewest(of_pushes=True)
        assert (math.inf if moves is None else pushes(board, moves)) == fewest, f"seed {seed}:\n{board}"


@needs_boxoban
@pytest.mark.parametrize("name", ["unfiltered-test-000.txt", "medium-valid-000.txt"])
def test_real_levels_with_four_boxes_are_solved(name):
    for board in load_levels(str(BOXOBAN / name))[::10]:
        assert "$" not in replay(board, solve(board, limit=100_000))


@needs_boxoban
@pytest.mark.parametrize("name", ["unfiltered-test-000.txt", "medium-valid-000.txt"])
def test_the_benchmark_solves_every_level_of_a_sample_within_its_limit(name, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
    benchmark = importlib.import_module("boxoban")
    out = tmp_path / "boxoban.json"
    options = ["--levels", str(BOXOBAN / name), "--sample", "40", "--limit-s", "10", "--json", str(out)]
    result = benchmark.main(options)
    assert json.loads(out.read_text()) == result
    [found] = result["files"]
    counts = {key: found[key] for key in ("levels", "sample", "solved", "timed_out", "unsolvable")}
    assert counts == {"levels": 1000, "sample": 40, "solved": 40, "timed_out": 0, "unsolvable": 0}
    assert 0 < found["seconds_median"] <= found["seconds_p99"] <= found["seconds_most"] < 10
    assert name in capsys.readouterr().out


@needs_boxoban
def test_the_benchmark_counts_levels_that_run_into_the_limit(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
    benchmark = importlib.import_module("boxoban")
    board = load_levels(str(BOXOBAN / "medium-valid-000.txt"))[0]
    assert benchmark.attempt(board, 0.0)[0] == "timed out"
    assert benchmark.attempt("######\n#$@ .#\n######", 10.0)[0] == "unsolvable"
    assert benchmark.attempt(BOARD, 10.0)[::2] == ("solved", 2)


def test_the_search_stops_at_its_limit():
    board = generate(LevelSettings(size=10, boxes=4, min_solution=60), np.random.default_rng(0))
    with pytest.raises(SearchLimitError, match="limit=3 "):
        solve(board, limit=3)
    with pytest.raises(SearchLimitError, match=r"limit_s=0 seconds \(0 expanded"):
        solve(board, limit_s=0)
    assert solve(board)


def test_a_solved_board_needs_no_move():
    assert solve("#####\n#@* #\n#####") == []
    assert distance("#####\n#@* #\n#####") == 0


@pytest.mark.parametrize("seed", range(6))
def test_the_distance_table_is_exact_for_every_state(seed):
    board = scattered(seed, 1)
    grid, table = Grid(board), distance_table(board)
    stride = len(board.split("\n")[0]) + 1
    fewest = {}
    for player in grid.free:
        for box in grid.free - {player}:
            moves = grid.fewest(start=(player, frozenset([box])))
            if moves < math.inf:
                fewest[player[0] * stride + player[1], box[0] * stride + box[1]] = moves
    assert table == fewest


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None, database=None)
def test_move_values_are_the_distances_after_each_move(seed):
    board = scattered(seed, 1)
    values = move_values(board)
    assert values == {name: distance(apply_move(board, name)) for name in MOVES}
    if 0 < distance(board) < math.inf:
        assert min(values.values()) == distance(board) - 1
    assert distance(board) == Grid(board).fewest()


def test_exact_distances_need_one_box():
    for function in distance, distance_table, move_values:
        with pytest.raises(UserError, match="one box, not 2"):
            function(scattered(0, 2))


def test_brute_force_and_levels_agree_on_a_known_board():
    assert Grid(BOARD).fewest() == Grid(BOARD).fewest(of_pushes=True) == distance(BOARD) == 2
    assert solve(BOARD) == ["right", "right"]
    assert move_values(BOARD) == {"up": 3, "down": 3, "left": 2, "right": 1}, "left bumps into the wall"


# The table


@pytest.mark.parametrize("kwargs", [{"boxes": 1}, {"boxes": 2, "max_solution": 10}], ids=["one box", "two boxes"])
@pytest.mark.parametrize("observation", ["board", "cells"])
def test_the_table_agrees_with_play(kwargs, observation):
    assert assert_table_agrees(SokobanEnv(observation=observation, **kwargs), range(30)) > 300


@pytest.mark.parametrize("seed", range(6))
def test_the_table_holds_every_unsolved_state_that_can_be_reached(seed):
    board = scattered(seed, 2, side=6, walls=6)
    grid, env = Grid(board), SokobanEnv(boxes=2)
    env.reset(options={"board": board})
    start = grid.player, grid.boxes
    seen, queue = {start}, [start]
    for state in queue:
        following = {grid.after(state, action)[0] for action in MOVES} - seen
        following = {(player, boxes) for player, boxes in following if boxes != grid.targets}
        seen |= following
        queue += following
    assert {(Grid(key).player, Grid(key).boxes) for key in env.tabular().keys} == seen
    assert len(env.tabular().keys) == len(seen)


def test_values_of_the_table_are_the_distances():
    env = SokobanEnv(max_solution=8)
    for seed in range(20):
        env.reset(seed=seed)
        table = env.tabular()
        distances = np.full(len(table.keys), np.inf)
        for _ in range(60):
            distances = np.minimum(distances, (1 + np.where(table.solved, 0, distances[table.next_state])).min(1))
        assert distances.tolist() == [distance(key) for key in table.keys], f"seed {seed}"


def test_a_level_that_starts_solved_ends_with_the_first_move():
    env = SokobanEnv()
    env.reset(options={"board": "#####\n#@* #\n#####"})
    table = env.tabular()
    assert table.keys == [f"#####\n{row}\n#####" for row in ("#@* #", "# +$#", "#@.$#")]
    assert table.solved.tolist() == [[True, True, True, False], [False] * 4, [False] * 4]


def test_what_has_no_table_is_refused():
    env = SokobanEnv(actions_per_turn=2)
    env.reset(seed=0)
    with pytest.raises(UserError, match="actions_per_turn=2"):
        env.tabular()
    env = SokobanEnv(size=9, boxes=3)
    env.reset(seed=0)
    with pytest.raises(UserError, match="more than 20,000 states"):
        env.tabular()
