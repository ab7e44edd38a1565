"""Random and scripted policies, and the Sokoban agents."""

from __future__ import annotations

import asyncio
import collections
import subprocess
import sys
from dataclasses import replace

import pytest

from agentrl import collect, envs
from agentrl.config import RolloutConfig
from agentrl.errors import InfrastructureError, PolicyFailure, UnknownNameError, UserError
from agentrl.policy import Policy, PolicyRequest, load_policy
from agentrl.types import StopReason, TextPart
from environments.sokoban import agents
from environments.sokoban.board import MOVES, apply_move, read_board
from environments.sokoban.solver import distance, solve
from policies.scripted import random_policy, scripted_policy

LOST = "######\n#$  .#\n#    #\n#@   #\n#    #\n######"
REQUEST = PolicyRequest(
    episode="e", turn=0, observation="a board", messages=[], info={"admissible_actions": list(MOVES)}
)


def act(policy: Policy, *requests: PolicyRequest) -> list[str]:
    return [action.text for action in asyncio.run(policy.act(requests))]


def drawn(policy: Policy, observation: str, number: int = 400) -> collections.Counter[str]:
    """Counts the answers to one observation over `number` seeds."""
    requests = [replace(REQUEST, observation=observation, seed=seed) for seed in range(number)]
    return collections.Counter(act(policy, *requests))


def play(policy: Policy, seed: int, max_turns: int = 60, **kwargs: object) -> tuple[bool, int, str]:
    """Plays an episode. Returns success, turns and the first board."""
    env = envs.make("Sokoban-v0", max_turns=max_turns, **kwargs)
    observation, info = env.reset(seed=seed)
    first, turn, done = observation, 0, False
    while not done:
        request = PolicyRequest("e", turn, observation, [], info, seed=1000 * seed + turn)
        observation, _, terminated, truncated, info = env.step(act(policy, request)[0])
        done, turn = terminated or truncated, turn + 1
    return info["success"], turn, first


def pushes_of(board: str, moves: list[str]) -> int:
    """Counts the moves that push a box."""
    pushes = 0
    for name in moves:
        after = apply_move(board, name)
        pushes += read_board(after)[2] != read_board(board)[2]
        board = after
    return pushes


def on_observation(observation):
    return f"saw {observation}"


async def on_request(request):
    await asyncio.sleep(0)
    return f"turn {request.turn}"


def annotated(asked: PolicyRequest) -> str:
    return f"seed {asked.seed}"


def silent(observation):
    return None


def failing(observation):
    raise KeyError(observation)


def undeclared(observation):
    return on_request(observation)


def picky(request):
    if int(request.episode.split("/")[-2]) % 4 == 0:
        raise ValueError("not this board")
    return "up"


async def slowly_picky(request):
    await asyncio.sleep(0)
    return picky(request)


NOT_CALLABLE = 3


def test_random_is_uniform_over_admissible_actions_and_a_function_of_the_seed():
    counts = drawn(load_policy("random"), "")
    assert set(counts) == set(MOVES)
    assert min(counts.values()) > 60, counts
    assert act(random_policy(), REQUEST) == act(random_policy(), REQUEST)


@pytest.mark.parametrize(
    ("info", "says"), [({}, "does not list any"), ({"admissible_actions": []}, "listed no action")]
)
def test_random_says_what_it_lacks(info, says):
    with pytest.raises(UserError, match=f"admissible_actions.*{says}"):
        act(random_policy(), replace(REQUEST, info=info))


@pytest.mark.parametrize(
    ("function", "answer"),
    [("on_observation", "saw a board"), ("on_request", "turn 0"), ("annotated", "seed 0"), ("REQUEST.__class__", None)],
)
def test_scripted_takes_plain_and_async_functions_of_observation_or_request(function, answer):
    policy = load_policy("scripted", function=f"{__name__}:{function}")
    if answer is None:
        with pytest.raises(PolicyFailure):
            act(policy, REQUEST)
    else:
        assert act(policy, REQUEST, REQUEST) == [answer, answer]
        assert policy.name == function


def test_scripted_takes_the_function_itself():
    assert act(scripted_policy(lambda observation: "up", name="upwards"), REQUEST) == ["up"]
    assert scripted_policy(on_observation, name="other").name == "other"


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("os", "'os' is not of the form 'module:function'"),
        (":x", "module:function"),
        ("no_such_module:f", "no_such_module.*PYTHONPATH"),
        (f"{__name__}:on_observatoin", "has no 'on_observatoin'; it has: .*on_observation"),
        (f"{__name__}:NOT_CALLABLE", "is int, not something to call"),
        (f"{__name__}:NOT_CALLABLE.real.x", "has no 'NOT_CALLABLE.real.x'"),
        (3, "function=3: policy is a Policy or a function observation -> action, not int"),
        (lambda: "up", "takes no argument"),
    ],
)
def test_scripted_refuses_what_it_cannot_call(function, says):
    with pytest.raises(UserError, match=says):
        scripted_policy(function)


def test_a_function_is_a_policy_by_its_module_and_name_from_the_current_folder_too(tmp_path, monkeypatch):
    (tmp_path / "here_agents.py").write_text("def up(observation):\n    return 'up'\n")
    (tmp_path / "half_agents.py").write_text("import here_agents_2\n")
    (tmp_path / "bad_agents.py").write_text("def up(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [one for one in sys.path if one not in ("", str(tmp_path))])
    for name, says in (
        ("here_agents:down", "function='here_agents:down': 'here_agents' has no 'down'; it has: up"),
        ("gone_agents:up", "no module 'gone_agents', neither here .* nor on PYTHONPATH$"),
        ("here_agents.py:up", "no module 'here_agents.py'.* without .py"),
        ("half_agents:up", "'half_agents' cannot be imported: ModuleNotFoundError: No module named 'here_agents_2'"),
        ("bad_agents:up", "'bad_agents' cannot be imported: SyntaxError"),
    ):
        with pytest.raises(UserError, match=says):
            load_policy(name)
    policy = load_policy("here_agents:up")
    assert (act(policy, REQUEST), policy.name) == (["up"], "up")
    assert load_policy("here_agents:up", name="upwards").name == "upwards"


def test_a_scripted_function_that_fails_is_a_policy_failure_with_its_name():
    with pytest.raises(PolicyFailure, match="KeyError: 'a board'"):
        act(scripted_policy(failing), REQUEST)
    for function, says in (
        ("failing", "policy 'failing', turn 0 of episode .*: KeyError: "),
        ("silent", r"policy 'silent', turn 0 of episode .*: answered None \(NoneType\); an action is text"),
        ("undeclared", r"answered <coroutine .*\(coroutine\).*declared async"),
    ):
        for executor in ("inline", "thread"):
            rollout = RolloutConfig(executor=executor, retries=0)
            with pytest.raises(InfrastructureError, match=says):
                collect(load_policy(f"{__name__}:{function}"), "Lock-v0", episodes=2, rollout=rollout)


@pytest.mark.parametrize("executor", ["inline", "thread"])
@pytest.mark.parametrize("function", ["picky", "slowly_picky"])
def test_a_function_that_fails_in_one_episode_fails_no_other(function, executor):
    rollout = RolloutConfig(executor=executor, retries=1)
    policy = load_policy(f"{__name__}:{function}")
    played = collect(policy, "Sokoban-v0", episodes=32, rollout=rollout)
    assert sorted(one.seed for one in played.failed) == [*range(0, 32, 4)]
    assert len(played.trajectories) == 24
    assert {one.stop_reason for one in played.failed} == {StopReason.POLICY_ERROR}


def test_an_unknown_policy_gets_the_nearest_name():
    with pytest.raises(UnknownNameError, match="did you mean 'random'"):
        load_policy("randm")


def test_the_solver_solves_every_one_box_level_in_the_fewest_moves():
    for seed in range(60):
        success, turns, first = play(agents.solver_policy(), seed)
        assert success
        assert turns == distance(first), f"seed {seed}"


@pytest.mark.parametrize("kwargs", [{"boxes": 2}, {"size": 7, "boxes": 3}])
def test_the_solver_solves_levels_with_several_boxes_in_the_fewest_pushes(kwargs):
    policy = agents.solver_policy()
    for seed in range(10):
        board = envs.make("Sokoban-v0", **kwargs).reset(seed=seed)[0]
        fewest, pushes, turn = pushes_of(board, solve(board)), 0, 0
        while "$" in board and turn < 200:
            [move] = act(policy, replace(REQUEST, observation=board, seed=turn))
            pushes += pushes_of(board, [move])
            board, turn = apply_move(board, move), turn + 1
        assert "$" not in board, f"seed {seed}"
        assert pushes == fewest, f"seed {seed}"


def test_skill_orders_the_agents():
    rates = [
        sum(play(agents.noisy_solver_policy(skill), seed, max_turns=15, max_solution=8)[0] for seed in range(120))
        for skill in (0.0, 0.5, 1.0)
    ]
    assert rates[0] + 20 < rates[1] < rates[2] - 10, rates
    assert rates[2] == 120


def test_optimal_moves_are_all_found_and_drawn_uniformly():
    board = "######\n#@   #\n#    #\n#  $.#\n#    #\n######"
    best = [name for name in MOVES if distance(apply_move(board, name)) == distance(board) - 1]
    assert len(best) == 2, "walking down and right first are equally good"
    assert sorted(agents.best_moves(board)) == sorted(best)
    counts = drawn(agents.solver_policy(), board)
    assert set(counts) == set(best)
    assert min(counts.values()) > 150, counts


def test_half_skill_mixes_good_and_random_moves():
    board = "######\n#    #\n#@$ .#\n#    #\n#    #\n######"
    counts = drawn(agents.noisy_solver_policy(0.5), board, 800)
    assert agents.best_moves(board) == ["right"]
    assert 0.55 < counts["right"] / 800 < 0.70, "1/2 + 1/2 * 1/4"
    assert set(counts) == set(MOVES)


@pytest.mark.parametrize("board", [LOST, LOST.replace("#@   #", "#@  .#").replace("#    #\n######", "#$   #\n######")])
def test_a_lost_board_is_played_at_random(board):
    assert agents.best_moves(board) == []
    assert set(drawn(agents.solver_policy(), board, 100)) == set(MOVES)


def test_agents_read_boards_under_an_error_line_and_in_text_parts():
    board = "######\n#    #\n#@$ .#\n#    #\n#    #\n######"
    env = envs.make("Sokoban-v0")
    env.reset(options={"board": board})
    observation = env.step("jump")[0]
    assert observation != board
    for shown in (observation, [TextPart(text=board)]):
        assert act(agents.solver_policy(), replace(REQUEST, observation=shown)) == ["right"]


def test_agents_are_functions_of_the_request_seed():
    board = envs.make("Sokoban-v0", size=7, boxes=3).reset(seed=1)[0]
    boards = [board, *(apply_move(board, name) for name in MOVES), LOST]
    for policy in (agents.noisy_solver_policy(0.5), agents.random_policy()):
        requests = [replace(REQUEST, observation=boards[seed % 6], seed=seed) for seed in range(60)]
        assert act(policy, *requests) == act(policy, *reversed(requests))[::-1]


def test_several_moves_per_turn_are_one_plan():
    success, turns, first = play(agents.solver_policy(moves_per_turn=3), 4, actions_per_turn=3)
    assert success
    assert turns == -(-distance(first) // 3)


@pytest.mark.parametrize("options", [{"skill": 1.5}, {"skill": -0.1}, {"moves_per_turn": 0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        agents.noisy_solver_policy(**options)


def test_scripted_policies_need_no_torch(tmp_path):
    code = "import sys, policies.scripted, environments.sokoban.agents; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
