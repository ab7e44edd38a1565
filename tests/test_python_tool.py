"""PythonTool: its sandbox's limits, problems, tools, splits and agents."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest

from agentrl import envs
from agentrl.errors import EnvironmentFailure, UnknownNameError, UserError
from agentrl.policy import Policy, PolicyRequest, load_policy
from environments.python_tool import sandbox
from environments.python_tool.env import PythonToolEnv, in_split
from environments.python_tool.problems import KINDS, Problem, read_problem
from environments.python_tool.sandbox import run_python

PATIENT = 60.0
"""Seconds for programs that should end by themselves: never reached, however busy the machine."""


def output(code: str, **limits: int) -> str:
    ran = run_python(code, timeout_s=PATIENT, **limits)
    assert ran.end == "done"
    return ran.output


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("print(1)\nprint('é漢')", "1\né漢\n"),
        ("a = 2\na ** 10", "1024\n"),
        ("None", ""),
        ("", ""),
        ("import math, fractions, statistics, random, datetime, decimal\nmath.comb(5, 2)", "10\n"),
        ("def f(n):\n    return n * f(n - 1) if n else 1\nf(20)", "2432902008176640000\n"),
        ("1/0", "Traceback:\n  line 1, in <module>\nZeroDivisionError: division by zero\n"),
        (
            "def f():\n    return x\n\nf()",
            "Traceback:\n  line 4, in <module>\n  line 2, in f\nNameError: name 'x' is not defined\n",
        ),
        ("x =", '  File "<code>", line 1\n    x =\n       ^\nSyntaxError: invalid syntax\n'),
        ("import sys\nsys.stderr.write('w')\nsys.exit(3)", "w"),
        ("'\ud800'", "?\n"),
        ("{'b', 'a', 'c'} == {'a', 'b', 'c'}", "True\n"),
        ("input()", "Traceback:\n  line 1, in <module>\nEOFError: EOF when reading a line\n"),
    ],
)
def test_what_a_program_prints_comes_back(code, printed):
    assert output(code) == printed


def test_sets_of_text_are_ordered_alike_in_every_run():
    code = "print({chr(97 + i) * 3 for i in range(20)})"
    assert output(code) == output(code)


def test_time_is_limited():
    started = time.monotonic()
    ran = run_python("print('begun', flush=True)\nwhile True: pass", timeout_s=1.5)
    assert (ran.end, ran.output) == ("timeout", "begun\n")
    assert time.monotonic() - started < 10
    assert run_python("import sys, os\nos.close(1); os.close(2)\nwhile True: pass", timeout_s=1.0).end == "timeout"


def test_memory_is_limited():
    assert output("x = [0] * 10**9") == "MemoryError: the code needs more memory than it may use\n"
    assert output("len(bytearray(150 << 20))", memory_mb=400) == f"{150 << 20}\n"
    assert "MemoryError" in output("len(bytearray(150 << 20))", memory_mb=128)


def test_output_is_limited():
    ran = run_python("print('ab' * 3000)", timeout_s=PATIENT, max_output=100)
    assert (ran.output, ran.cut, ran.end) == ("ab" * 50, True, "done")
    flood = run_python("while True: print('x' * 10000)", timeout_s=PATIENT, max_output=100)
    assert (flood.output, flood.cut, flood.end) == ("x" * 100, True, "output")


def test_a_crash_is_told_apart():
    assert run_python("import os\nos.abort()", timeout_s=PATIENT).end == "killed"


@pytest.mark.parametrize(
    "code",
    [
        "import socket\nsocket.socket()",
        "import socket\nsocket.getaddrinfo('localhost', 80)",
        "import _socket\n_socket.socket()",
        "import os\nos.system('true')",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.fork()",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nos.kill(os.getppid(), 0)",
        "open('/etc/passwd').read()",
        "open('/tmp/agentrl-should-not-exist', 'w')",
        "import os\nos.open('/tmp/agentrl-should-not-exist', os.O_CREAT | os.O_WRONLY)",
        "import os\nos.remove('/tmp/agentrl-should-not-exist')",
        "import os\nos.mkdir('/tmp/agentrl-should-not-exist')",
        "import os\nos.listdir('/etc')",
        "import os\nopen(os.path.dirname(os.__file__) + '/os.py', 'a')",
        "import os\nopen(os.path.dirname(os.__file__) + '/../../../../../../../etc/passwd')",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
        "import ctypes\nctypes.CDLL(None)",
    ],
)
def test_network_files_and_processes_are_refused(code):
    assert "PermissionError: " in output(code)


def test_programs_see_an_empty_environment(monkeypatch):
    monkeypatch.setenv("A_SECRET", "x")
    assert output("import os\n'A_SECRET' in os.environ") == "False\n"


@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")
def test_the_network_namespace_is_its_own_where_the_kernel_allows_it():
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this kernel makes no network namespaces for us")
    assert output("import os\nos.readlink('/proc/self/ns/net')").strip() != os.readlink("/proc/self/ns/net")


def test_nothing_outlives_a_program(monkeypatch):
    """Without the hook a program can leave a child behind; the group is killed with it, and the pipe does not hang."""
    leaves_child = "import os, time\npid = os.fork()\nif pid:\n    print(pid)\nelse:\n    time.sleep(600)\n"
    monkeypatch.setattr(sandbox, "_RUNNER", leaves_child)
    child = int(run_python("", timeout_s=2.0).output)  # the child holds the output open
    deadline = time.monotonic() + 30
    while _running(child) and time.monotonic() < deadline:
        pass
    assert not _running(child)


def _running(pid: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(listed.strip()) and not listed.strip().startswith("Z")


def test_an_interpreter_that_does_not_start_is_no_fault_of_the_agent(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "executable", "/nowhere/python")
    with pytest.raises(EnvironmentFailure, match="no Python process could be started"):
        run_python("1")


@pytest.mark.parametrize("name", KINDS)
def test_the_program_of_every_kind_prints_its_answer(name):
    rng, kind = np.random.default_rng(7), KINDS[name]
    problems = [kind.draw(rng) for _ in range(20)]
    code = "\n".join(
        "\n".join([*(f"{key} = {value}" for key, value in problem.values.items()), problem.kind.program])
        for problem in problems
    )
    printed = output(code).split()
    for problem, text in zip(problems, printed, strict=True):
        assert read_problem(f"Problem: {problem.text}\n") == problem
        assert isinstance(problem.answer, int) or problem.kind.decimal
        assert abs(Fraction(text) - problem.answer) <= (Fraction(1, 10_000) if problem.kind.decimal else 0)


@pytest.mark.parametrize(
    ("name", "values", "answer"),
    [
        ("crates", {"a": 12, "b": 13}, 156),
        ("tickets", {"a": 20, "b": 8, "c": 20, "d": 61, "e": 100}, 1280),
        ("discount", {"a": 200, "b": 10, "c": 20}, 216),
        ("interest", {"a": 1000, "b": 10, "c": 3}, 1331),
        ("journey", {"a": 60, "b": 60, "c": 60, "d": 30}, 40),
        ("mixture", {"a": 1, "b": 10, "c": 3, "d": 50}, 40),
        ("work", {"a": 6, "b": 6, "c": 3}, Fraction(3, 2)),
        ("multiples", {"a": 10, "b": 3, "c": 5}, 33),
        ("digits", {"a": 2, "b": 15}, 26),
        ("primes", {"a": 2, "b": 30}, 10),
        ("lamps", {"a": 4, "b": 6, "c": 10}, 60),
        ("sequence", {"a": 1, "b": 2, "c": 3, "d": 100, "n": 4}, 29),
    ],
)
def test_answers_by_hand(name, values, answer):
    assert Problem(KINDS[name], values).answer == answer


def test_integers_must_be_exact_and_decimals_near():
    exact, near = Problem(KINDS["crates"], {"a": 12, "b": 13}), Problem(KINDS["work"], {"a": 6, "b": 6, "c": 3})
    assert [exact.accepts(value, 0.01) for value in (156, 156.0, 156.001, 155, -156)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert [near.accepts(value, 0.01) for value in (1.5, 1.509, 1.511, 2)] == [True, True, False, False]
    assert not exact.accepts(10**300, 0.01)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.decimal])
def test_an_answer_rounded_to_two_decimals_is_right(kind):
    rng = np.random.default_rng(1)
    env = PythonToolEnv()
    for _ in range(300):
        problem = KINDS[kind].draw(rng)
        assert problem.accepts(round(float(problem.answer), 2), env.tolerance)


def test_tools_python_and_answer():
    env = PythonToolEnv(timeout_s=PATIENT, max_output=5)
    text = Problem(KINDS["crates"], {"a": 12, "b": 13}).text
    assert env.reset(seed=0, options={"problem": text})[0] == f"Problem: {text}"
    assert env.step("python(print(12 * 13))")[0] == f"Problem: {text}\nOutput:\n156"
    assert env.step('python(code="x = 1")')[0].endswith("\nOutput:\n[nothing was printed]")
    assert env.step('python(code="x")')[0].endswith("\nOutput:\nTrace\n[output cut after 5 characters]")
    assert env.step("python(code='import os; os.abort()')")[0].endswith(
        "\n[the program was killed: it crashed or broke a limit]"
    )
    observation, reward, terminated, _, info = env.step("Action: answer[about 156]")
    assert "'value' must be an integer or a number, got 'about 156'" in observation
    assert (reward, terminated, info["valid_action"]) == (0, False, False)
    observation, reward, terminated, _, info = env.step("answer[156]")
    assert (observation, reward, terminated, info["success"]) == (f"Problem: {text}\nCorrect.", 1.0, True, True)
    env.reset(seed=0, options={"problem": text})
    assert env.step("answer(157)")[1:3] == (0.0, True)


def test_a_program_that_hangs_is_said_to():
    env = PythonToolEnv(timeout_s=0.5)
    env.reset(seed=0)
    assert env.step("python[while True: pass]")[0].endswith("\nOutput:\n[stopped: the program took longer than 0.5 s]")


def test_state_keys_are_equal_exactly_when_problem_and_output_are():
    env = PythonToolEnv(timeout_s=PATIENT)
    _, start = env.reset(seed=3)
    keys = [env.step(f"python[print({text})]")[4]["state_key"] for text in ("1", "2", "3 - 2")]
    assert keys[0] == keys[2]
    assert len({start["state_key"], *keys}) == 3
    assert env.step("nonsense")[4]["state_key"] == keys[2]


def test_train_and_test_share_no_problem():
    train, test = PythonToolEnv(split="train"), PythonToolEnv(split="test")
    asked = [{env.reset(seed=seed)[0] for seed in range(300)} for env in (train, test)]
    assert not asked[0] & asked[1]
    drawn = [KINDS["crates"].draw(np.random.default_rng(seed)).text for seed in range(500)]
    assert 0.06 < sum(in_split(text, "test") for text in drawn) / 500 < 0.14
    assert all(in_split(text, "train") != in_split(text, "test") for text in drawn)


def test_kinds_can_be_chosen():
    env = PythonToolEnv(kinds=["work", "lamps"])
    assert {env.reset(seed=seed)[1]["kind"] for seed in range(30)} == {"work", "lamps"}
    everything = PythonToolEnv()
    assert {everything.reset(seed=seed)[1]["kind"] for seed in range(200)} == set(KINDS)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"split": "dev"}, "split='dev'"),
        ({"tolerance": -1}, "tolerance=-1"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"memory_mb": 8}, "memory_mb=8: at least 64"),
        ({"max_output": 0}, "max_output=0"),
    ],
)
def test_bad_settings_are_refused(kwargs, says):
    with pytest.raises(UserError, match=says):
        PythonToolEnv(**kwargs)
    with pytest.raises(UnknownNameError, match="no kind of problem 'lamp'; did you mean 'lamps'"):
        PythonToolEnv(kinds=["lamp"])
    with pytest.raises(UserError, match="is of no known kind"):
        PythonToolEnv().reset(options={"problem": "What is love?"})


def played(policy: Policy, seed: int, **kwargs: object) -> bool:
    env = envs.make("PythonTool-v0", timeout_s=PATIENT, **kwargs)
    observation, info = env.reset(seed=seed)
    done, turn = False, 0
    while not done:
        request = PolicyRequest("e", turn, observation, [], info, seed=1000 * seed + turn)
        [action] = asyncio.run(policy.act([request]))
        observation, _, terminated, truncated, info = env.step(action.text)
        assert info["valid_action"], action.text
        done, turn = terminated or truncated, turn + 1
    return bool(info["success"])


def test_the_expert_never_errs_and_the_others_mostly_do():
    expert, naive, blind = (load_policy(f"python-tool-{role}") for role in ("expert", "naive", "random"))
    assert all(played(expert, 0, kinds=[kind]) for kind in KINDS)
    assert played(naive, 0, kinds=["crates"])
    assert not any(played(naive, 0, kinds=[kind]) for kind in ("tickets", "interest", "primes", "sequence"))
    assert not any(played(blind, seed, kinds=["sequence"]) for seed in range(5))


def test_an_episode_goes_on_after_pickling():
    env = PythonToolEnv()
    env.reset(seed=4)
    other = pickle.loads(pickle.dumps(env))
    text = "python[print(1)]"
    assert other.step(text) == env.step(text)
    assert other.reset()[0] == env.reset()[0]


def test_its_agents_are_registered_by_role():
    found = {role: agent.policy for role, agent in envs.registry.scripted_agents("PythonTool-v0").items()}
    assert found == {"random": "python-tool-random", "naive": "python-tool-naive", "expert": "python-tool-expert"}
