"""Failures of infrastructure: a type, retried up to a limit, never a reward. Hangs, crashes, deadlines, cancelling."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from toys import register

from agentrl.config.schema import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.envs import TextEnv
from agentrl.errors import InfrastructureError, PolicyFailure, UserError
from agentrl.policy import FunctionPolicy, Policy, PolicyAction
from agentrl.rollout import Collector, Task
from agentrl.types import StopReason

FOREVER = threading.Event()
"""Never set while tests run: what waits for it hangs."""


@pytest.fixture(autouse=True, scope="module")
def _let_go_at_the_end():
    yield
    FOREVER.set()


class Faulty(TextEnv):
    """Four turns; `options` (or `at_make`) say what goes wrong, and where."""

    attempts: dict[int, int] = {}
    """Task seed -> resets so far (in this process)."""

    def __init__(self, at_make=""):
        super().__init__()
        self.trouble(at_make)

    def trouble(self, kind):
        if kind == "raise":
            raise ValueError("the dragon is asleep")
        if kind == "hang":
            FOREVER.wait()
        if kind == "sleep":  # hangs where no event can reach: in a worker process
            time.sleep(3600)
        if kind == "exit":
            sys.exit(3)
        if kind == "die":
            os._exit(3)
        if kind == "user":
            raise UserError("there is no level 99")

    def begin(self, options):
        self.turn, self.options = 0, options
        seed = options.get("seed", 0)
        self.first = self.attempts.get(seed, 0) == 0
        self.attempts[seed] = self.attempts.get(seed, 0) + 1
        self.maybe("reset")
        return "go", {}

    def maybe(self, where):
        if self.options.get("where") == where and (self.first or not self.options.get("once")):
            self.trouble(self.options["what"])

    def parse_action(self, text):
        return text

    def play(self, action):
        self.turn += 1
        if self.turn == 2:
            self.maybe("step")
        info = {"success": True, "pid": os.getpid(), "odd": threading.Lock() if self.options.get("odd") else 0}
        if self.options.get("child") and self.turn == 1:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
            info["child"] = child.pid
        return f"turn {self.turn}", 1.0, self.turn == 4, info


class FastFaulty(Faulty):
    fast = True


class OldGym(Faulty):
    """Speaks the API of before Gymnasium."""

    fast = True

    def step(self, action):
        return super().step(action)[:4]


class BadReward(Faulty):
    fast = True

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, float("nan"), terminated, truncated, info


class Endless(TextEnv):
    fast = True

    def begin(self, options):
        return "go", {}

    def parse_action(self, text):
        return text

    def play(self, action):
        return "on", 0.0, False, {}


for _env in (Faulty, FastFaulty, OldGym, BadReward, Endless):
    register(f"Faults{_env.__name__}-v0", _env)

UP = FunctionPolicy(lambda request: "up", name="up")


def trouble(what, where, seed=1, **more):
    return Task(seed, f"{what}-{where}-{seed}", options={"what": what, "where": where, "seed": seed, **more})


def fine(count=3, start=100, **options):
    return [Task(start + i, f"fine-{i}", options={"seed": start + i, **options}) for i in range(count)]


def play(tasks, env="FaultsFastFaulty-v0", policy=UP, *, env_kwargs=None, on_episode=None, **rollout):
    Faulty.attempts.clear()
    config = EnvConfig(id=env, kwargs=env_kwargs or {})
    with Collector(policy, config, RolloutConfig(**rollout), OutcomeConfig(), on_episode=on_episode) as collector:
        return collector.collect(tasks)


def gone(pid):
    """Whether the process has ended (a zombie has)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def wait_until_gone(*pids, limit_s=20.0):
    end = time.monotonic() + limit_s
    while not all(map(gone, pids)):
        assert time.monotonic() < end, f"still alive: {[pid for pid in pids if not gone(pid)]}"
        time.sleep(0.01)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")


# The environment raises


@pytest.mark.parametrize("executor", ["inline", "thread"])
@pytest.mark.parametrize("where", ["reset", "step"])
@pytest.mark.parametrize(("what", "text"), [("raise", "ValueError: the dragon is asleep"), ("exit", "SystemExit: 3")])
def test_an_environment_that_raises_is_a_stop_reason_and_no_reward(executor, where, what, text):
    bad = trouble(what, where)
    collected = play([bad, *fine()], executor=executor, retries=1)
    (failed,) = collected.failed
    assert failed.stop_reason is StopReason.ENVIRONMENT_ERROR
    assert text in failed.error
    assert f"'FaultsFastFaulty-v0', {where} of episode {bad.group_id}/0 (seed 1" in failed.error
    assert (failed.outcome, failed.success, failed.scorable) == (0.0, False, False)
    assert len(failed.turns) == (1 if where == "step" else 0)
    assert [one.id for one in collected.trajectories] == ["fine-0/0", "fine-1/0", "fine-2/0"]
    assert all(one.success for one in collected.trajectories)
    assert collected.retried == 1
    assert collected.counts == {"terminated": 3, "environment_error": 1}
    assert Faulty.attempts[1] == 2


def test_a_fault_that_passes_is_retried_with_the_same_seeds_and_leaves_no_trace():
    seeds = {}

    def agent(request):
        seeds.setdefault(request.episode, []).append(request.seed)
        return "up"

    collected = play([trouble("raise", "step", once=True), *fine()], policy=FunctionPolicy(agent))
    assert (collected.failed, collected.retried) == ([], 1)
    assert collected.counts == {"terminated": 4}
    assert seeds["0/raise-step-1/0#0"] == seeds["0/raise-step-1/0#1"][:2]
    assert [turn.action for turn in collected.trajectories[0].turns] == ["up"] * 4
    assert collected.trajectories[0].error is None


def test_a_failed_environment_is_not_used_again():
    config = EnvConfig(id="FaultsFastFaulty-v0")
    Faulty.attempts.clear()
    with Collector(UP, config, RolloutConfig(concurrency=1, retries=0), OutcomeConfig()) as collector:
        collector.collect(fine())
        assert collector.pool.made == 1
        collector.collect([*fine(), trouble("raise", "step")])
        assert collector.pool.made == 1
        collector.collect(fine())
        assert collector.pool.made == 2


def test_retries_are_counted_up_to_the_limit():
    for retries in (0, 1, 3):
        collected = play([trouble("raise", "reset"), *fine(1)], retries=retries)
        assert (collected.retried, len(collected.failed)) == (retries, 1)
        assert Faulty.attempts[1] == retries + 1


def test_when_everything_fails_alike_it_is_said_aloud():
    with pytest.raises(InfrastructureError, match=r"every one of 2 episodes .*'environment_error'.*dragon") as caught:
        play([trouble("raise", "reset"), trouble("raise", "step", seed=2)])
    assert "ValueError" in repr(caught.value.__cause__.__cause__)
    with pytest.raises(InfrastructureError, match=r"make of episode fine-0/0.*dragon"):
        play(fine(), env_kwargs={"at_make": "raise"})
    collected = play([trouble("raise", "reset"), trouble("hang", "step")], executor="thread", step_deadline_s=0.2)
    assert collected.counts == {"environment_error": 1, "deadline": 1}
    assert collected.trajectories == []


@pytest.mark.parametrize("executor", ["inline", "thread"])
def test_what_the_user_must_mend_in_a_task_is_not_retried(executor):
    with pytest.raises(UserError, match="no level 99"):
        play([trouble("user", "reset"), *fine()], executor=executor)
    assert Faulty.attempts[1] == 1


@pytest.mark.parametrize(
    ("env", "text"), [("FaultsOldGym-v0", "wanted (observation, reward"), ("FaultsBadReward-v0", "reward nan")]
)
def test_a_broken_answer_is_an_environment_error(env, text):
    with pytest.raises(InfrastructureError) as caught:
        play(fine(), env, retries=0)
    assert text in str(caught.value)


# The environment hangs


@pytest.mark.parametrize("where", ["reset", "step"])
def test_a_hanging_thread_is_left_behind_and_the_pool_does_not_starve(where):
    collected = play(
        [trouble("hang", where), *fine(6)], executor="thread", workers=1, concurrency=2, step_deadline_s=0.5, retries=1
    )
    (failed,) = collected.failed
    assert failed.stop_reason is StopReason.DEADLINE
    assert f"{where} of episode hang-{where}-1/0" in failed.error
    assert "no answer within 0.5 s" in failed.error
    assert collected.retried == 1
    assert len(collected.trajectories) == 6


def test_a_hang_that_passes_is_retried():
    collected = play([trouble("hang", "step", once=True), *fine(2)], executor="thread", step_deadline_s=0.5)
    assert (collected.counts, collected.retried) == ({"terminated": 3}, 1)


def test_an_inline_environment_that_was_too_slow_is_told():
    with pytest.raises(InfrastructureError, match="no answer within 1e-09 s"):
        play(fine(), executor="inline", step_deadline_s=1e-9)


class StuckAtTheEnd(Faulty):
    def close(self):
        FOREVER.wait()


register("FaultsStuckAtTheEnd-v0", StuckAtTheEnd)


def test_an_environment_that_does_not_close_holds_up_nobody(caplog):
    config = EnvConfig(id="FaultsStuckAtTheEnd-v0")
    collector = Collector(UP, config, RolloutConfig(), OutcomeConfig())
    assert collector.collect(fine(2)).counts == {"terminated": 2}
    collector.pool.close(patience_s=0.05)
    assert "did not close within 0.05 s" in caplog.text


# Worker processes


@needs_proc
def test_worker_processes_play_and_are_gone_afterwards():
    collected = play(fine(4, odd=True), executor="process", workers=2)
    assert collected.counts == {"terminated": 4}
    pids = {turn.info["pid"] for one in collected.trajectories for turn in one.turns}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert "lock" in collected.trajectories[0].turns[0].info["odd"]
    assert all(map(gone, pids))


@needs_proc
def test_a_hanging_process_is_killed_with_its_children_and_replaced():
    seen = []
    collected = play(
        [trouble("sleep", "step", child=True), *fine(1)],
        executor="process",
        workers=1,
        step_deadline_s=2.0,
        retries=0,
        on_episode=seen.append,
    )
    (failed,) = collected.failed
    assert failed.stop_reason is StopReason.DEADLINE
    assert "no answer within 2 s" in failed.error
    assert len(collected.trajectories) == 1
    info = failed.turns[0].info
    assert collected.trajectories[0].turns[0].info["pid"] != info["pid"]
    wait_until_gone(info["pid"], info["child"])


@needs_proc
def test_faults_in_a_process_come_back_typed():
    tasks = [trouble("die", "step"), trouble("raise", "step", seed=2), *fine(2)]
    collected = play(tasks, executor="process", workers=1, retries=0)
    died, raised = collected.failed
    assert {died.stop_reason, raised.stop_reason} == {StopReason.ENVIRONMENT_ERROR}
    assert "died (exit code 3)" in died.error
    assert "ValueError: the dragon is asleep (" in raised.error
    assert "test_rollout_faults.py" in raised.error
    assert len(collected.trajectories) == 2
    with pytest.raises(UserError, match="no level 99"):
        play([trouble("user", "reset")], executor="process", workers=1)


def test_what_cannot_be_sent_to_a_process_is_said():
    class Local(Faulty):
        pass

    register("FaultsLocal-v0", Local)
    with pytest.raises(UserError, match=r"'FaultsLocal-v0' cannot be sent .* rollout.executor=thread"):
        play(fine(), "FaultsLocal-v0", executor="process")


PARENT = """
import signal, sys
sys.path.insert(0, {folder!r})
from test_rollout_faults import *
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    def shout(request):
        print(request.info.get("pid", 0), flush=True)
        return "up"
    try:
        play([trouble("sleep", "step")], policy=FunctionPolicy(shout), executor={executor!r}, workers=1)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def hanging_parent(tmp_path, executor):
    """Starts a script whose environment hangs in turn 1. Returns it and the process the environment runs in."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(folder=str(Path(__file__).parent), executor=executor))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    return parent, next(int(line) for line in parent.stdout if int(line))


@needs_proc
def test_no_worker_outlives_a_killed_parent(tmp_path):
    parent, worker = hanging_parent(tmp_path, "process")
    assert not gone(worker)
    parent.kill()
    parent.communicate()
    wait_until_gone(worker)


@needs_proc
@pytest.mark.parametrize("executor", ["thread", "process"])
def test_ctrl_c_ends_a_hanging_collection(tmp_path, executor):
    parent, worker = hanging_parent(tmp_path, executor)
    parent.send_signal(signal.SIGINT)
    output, _ = parent.communicate(timeout=30)
    assert output == "interrupted\n"
    assert parent.returncode == 0
    wait_until_gone(worker)


# The policy fails


class Failing(Policy):
    """Fails in its first `times` calls, in the way of `kind`."""

    name = "failing"

    def __init__(self, kind, times=10**9, batched=True):
        self.kind, self.times, self.batched = kind, times, batched
        self.calls, self.released = 0, []

    async def act(self, requests):
        self.calls += 1
        if self.calls <= self.times:
            if self.kind == "raise":
                raise KeyError("gold")
            if self.kind == "typed":
                raise TypedFailure(7, "engine died")
            if self.kind == "hang":
                await asyncio.get_running_loop().create_future()
            if self.kind == "stubborn":
                try:
                    await asyncio.get_running_loop().create_future()
                except asyncio.CancelledError:
                    return [PolicyAction("too late") for _ in requests]
            if self.kind == "cancel":
                raise asyncio.CancelledError
            if self.kind == "few":
                return []
            if self.kind == "none":
                return [PolicyAction(None) for _ in requests]
            if self.kind == "strings":
                return ["up" for _ in requests]
            if self.kind == "user":
                raise UserError("set OPENAI_API_KEY")
        return [PolicyAction("up") for _ in requests]

    def release(self, episode):
        self.released.append(episode)


class TypedFailure(PolicyFailure):
    def __init__(self, code, text):
        super().__init__(f"{text} ({code})")


POLICY_FAULTS = [
    ("raise", StopReason.POLICY_ERROR, "KeyError: 'gold'"),
    ("typed", StopReason.POLICY_ERROR, "engine died (7)"),
    ("few", StopReason.POLICY_ERROR, "requests with 0 actions"),
    ("none", StopReason.POLICY_ERROR, "answered None (NoneType); an action is text"),
    ("strings", StopReason.POLICY_ERROR, "answered 'up' (str)"),
    ("cancel", StopReason.CANCELLED, "cancelled its call"),
    ("hang", StopReason.DEADLINE, "no answer within 0.05 s"),
    ("stubborn", StopReason.DEADLINE, "no answer within 0.05 s"),
]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("kind", "reason", "text"), POLICY_FAULTS)
def test_a_policy_that_fails_is_retried_and_then_said_aloud(kind, reason, text, batched):
    deadline = 0.05 if reason is StopReason.DEADLINE else 600
    if kind == "few" and not batched:
        text = "answered 1 requests with 0 actions"
    policy = Failing(kind, batched=batched)
    with pytest.raises(InfrastructureError) as caught:
        play(fine(), policy=policy, policy_deadline_s=deadline)
    assert "policy 'failing', turn 0 of episode fine-0/0" in str(caught.value)
    assert text in str(caught.value)
    assert repr(reason.value) in str(caught.value)
    assert policy.calls == (3 if batched else 9)
    assert sorted(policy.released) == sorted(f"0/fine-{i}/0#{attempt}" for i in range(3) for attempt in range(3))

    once = Failing(kind, times=1, batched=batched)
    collected = play(fine(), policy=once, policy_deadline_s=deadline if kind == "cancel" else max(deadline, 0.5))
    assert collected.counts == {"terminated": 3}
    assert collected.retried == (3 if batched else 1)


def test_a_policy_failure_does_not_cost_the_environment():
    config = EnvConfig(id="FaultsFastFaulty-v0")
    with Collector(Failing("raise", times=1), config, RolloutConfig(), OutcomeConfig()) as collector:
        assert collector.collect(fine()).retried == 3
        assert collector.pool.made == 3


def test_what_the_user_must_mend_in_a_policy_goes_through():
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        play(fine(), policy=Failing("user"))


def test_a_policy_that_fails_to_release_does_not_stop_the_run(caplog):
    class Clumsy(Failing):
        def release(self, episode):
            raise RuntimeError("no such episode")

    with caplog.at_level(logging.WARNING, "agentrl.rollout"):
        assert play(fine(), policy=Clumsy("", times=0)).counts == {"terminated": 3}
    assert "failed to release episode 0/fine-0/0#0" in caplog.text


# Deadlines of episodes, cancellation


def test_an_episode_has_a_deadline():
    with pytest.raises(
        InfrastructureError, match=r"'deadline'.*episode fine-0/0 did not end within 0.1 s; after \d+ t"
    ):
        play(fine(), "FaultsEndless-v0", episode_deadline_s=0.1, retries=0)


@pytest.mark.parametrize("batched", [True, False])
def test_the_episode_deadline_reaches_into_a_policy_call(batched):
    with pytest.raises(InfrastructureError, match=r"after 0 turns it was waiting for the policy"):
        play(fine(), policy=Failing("hang", batched=batched), episode_deadline_s=0.1, retries=0)


def test_the_episode_deadline_reaches_into_an_environment_call():
    with pytest.raises(InfrastructureError, match=r"after 1 turns it was environment step for"):
        play([trouble("hang", "step")], executor="thread", episode_deadline_s=0.5, retries=0)
    with pytest.raises(InfrastructureError, match=r"it was environment make"):
        play(fine(1), env_kwargs={"at_make": "hang"}, executor="thread", episode_deadline_s=0.5, retries=0)
    with pytest.raises(InfrastructureError, match=r"'FaultsFaulty-v0' could not be made within 0.3 s"):
        play(fine(1), "FaultsFaulty-v0", env_kwargs={"at_make": "hang"}, executor="auto", episode_deadline_s=0.3)


def test_a_cancelled_collection_ends_everything_and_says_so():
    seen = []
    policy = Failing("hang")

    async def main():
        config = EnvConfig(id="FaultsFaulty-v0")
        with Collector(policy, config, RolloutConfig(), OutcomeConfig(), on_episode=seen.append) as collector:
            Faulty.attempts.clear()
            task = asyncio.ensure_future(collector.collect_async([*fine(2), trouble("hang", "reset")]))
            while policy.calls == 0 or not Faulty.attempts.get(1):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            policy.times = 0
            assert (await collector.collect_async(fine(2))).counts == {"terminated": 2}

    asyncio.run(main())
    cancelled = [one for one in seen if one.stop_reason is StopReason.CANCELLED]
    assert sorted(one.group_id for one in cancelled) == ["fine-0", "fine-1", "hang-reset-1"]
    assert all((one.outcome, one.success) == (0.0, False) and one.error for one in cancelled)
    assert len(policy.released) == 5


def test_an_error_of_the_caller_ends_everything():
    def on_episode(trajectory):
        raise ZeroDivisionError

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        play(fine(4), on_episode=on_episode, executor="thread")
    assert threading.active_count() == before


def test_failures_are_logged_once_in_full_and_then_briefly(caplog):
    with caplog.at_level(logging.INFO, "agentrl.rollout"):
        play([trouble("raise", "step"), trouble("raise", "step", seed=2), *fine(1)])
    full = [record for record in caplog.records if record.levelno == logging.WARNING]
    brief = [record for record in caplog.records if record.levelno == logging.INFO]
    assert (len(full), len(brief)) == (1, 3)
    assert "dragon" in caplog.text
    assert "ValueError" in repr(full[0].exc_info)
