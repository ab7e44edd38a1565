"""The collector: no lock-step, canonical batches, groups, limits, scoring, what a trajectory holds."""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import register

import agentrl
from agentrl.config.schema import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.envs import TextEnv
from agentrl.errors import UnknownNameError, UserError
from agentrl.policy import FunctionPolicy, Policy, PolicyAction, PolicyRequest, Sampling
from agentrl.rollout import Collector, Task, collect, score
from agentrl.rollout.batcher import Batcher, Clock
from agentrl.rollout.seeds import action_seed, episode_seed, mix
from agentrl.rollout.values import jsonable, stored_info
from agentrl.types import StopReason, TextPart, Trajectory, Turn, group_trajectories


class Dice(TextEnv):
    """Shows numbers; the episode's length follows from the seed. Solved where the last action was 'up'."""

    fast = True
    instructions = "Say up."
    made = 0

    def __init__(self, split="train", length=None, extra=None):
        super().__init__()
        self.split, self.length, self.extra = split, length, extra or {}
        type(self).made += 1

    def begin(self, options):
        self.left = self.length or int(self.np_random.integers(1, 7))
        return f"{self.split} {options.get('level', 0)} {self.np_random.integers(1000)}", {"admissible_actions": ["up"]}

    def parse_action(self, text):
        return text

    def play(self, action):
        self.left -= 1
        info = {"success": action == "up", "admissible_actions": ["up"], "state_key": str(self.left), **self.extra}
        return f"left {self.left}", 0.5, self.left == 0, info


class SlowDice(Dice):
    fast = False


class Gate(TextEnv):
    """Slow environment whose steps wait until the gate of its seed is open."""

    gates: dict[int, threading.Event] = {}

    def begin(self, options):
        self.turn, self.gate = 0, options["gate"]
        return f"gate {self.gate}", {}

    def parse_action(self, text):
        return text

    def play(self, action):
        self.gates[self.gate].wait()
        self.turn += 1
        return f"turn {self.turn}", 0.0, self.turn == 3, {}


class Parts(Dice):
    def begin(self, options):
        super().begin(options)
        return [TextPart(text="look"), TextPart(text=" here")], {}


class Pixels(Dice):
    def begin(self, options):
        return np.zeros(3), {}


class Unseeded(Dice):
    """Ignores its seed."""

    def begin(self, options):
        self.left = 1
        return f"you see a {random.random()}", {}


class BothFlags(Dice):
    def step(self, action):
        observation, reward, _, _, info = super().step(action)
        return np.str_(observation), np.float32(reward), np.True_, np.True_, info


for _env in (Dice, SlowDice, Gate, Parts, Pixels, Unseeded, BothFlags):
    register(f"Rollout{_env.__name__}-v0", _env)
register("RolloutLimited-v0", Dice, max_turns=3, length=99)


class Recorder(Policy):
    """Answers 'up' and remembers the batches it was given, and what was released."""

    name = "recorder"

    def __init__(self, batched=True, thread=False):
        self.batched, self.thread = batched, thread
        self.batches, self.requests, self.released = [], [], []
        self.acting = self.most = 0

    async def act(self, requests):
        self.acting += 1
        self.most = max(self.most, self.acting)
        self.batches.append([(request.episode.split("#")[0], request.turn) for request in requests])
        self.requests += requests
        if self.thread:
            await asyncio.to_thread(sorted, range(100))
        self.acting -= 1
        return [PolicyAction("up") for _ in requests]

    def release(self, episode):
        self.released.append(episode)


def play(policy, tasks, env="RolloutDice-v0", *, kwargs=None, outcome=None, on_episode=None, call=None, **rollout):
    config = EnvConfig(id=env, kwargs=kwargs or {})
    with Collector(
        policy, config, RolloutConfig(**rollout), outcome or OutcomeConfig(), on_episode=on_episode
    ) as collector:
        return collector.collect(tasks, **(call or {}))


def groups(count, members=2, start=0):
    return [Task(start + i, f"g{i}", members) for i in range(count)]


def untimed(trajectories):
    return [
        trajectory.model_dump(exclude={"turns": {"__all__": {"timings"}}, "metadata": True})
        for trajectory in trajectories
    ]


# What a collection returns


def test_members_of_a_group_share_their_start_and_come_back_in_order():
    collected = play(Recorder(), groups(3, members=4))
    assert [trajectory.id for trajectory in collected.trajectories] == [f"g{g}/{m}" for g in range(3) for m in range(4)]
    for group in group_trajectories(collected.trajectories):
        assert len({trajectory.turns[0].observation for trajectory in group.trajectories}) == 1
        assert len({trajectory.seed for trajectory in group.trajectories}) == 1
    assert collected.counts == {"terminated": 12}
    assert (collected.failed, collected.retried) == ([], 0)


def test_a_trajectory_tells_the_whole_episode_and_survives_a_file():
    (trajectory,) = play(
        Recorder(), [Task(5, "a", options={"level": np.int64(3)})], kwargs={"split": "x"}, call={"iteration": 4}
    ).trajectories
    assert trajectory.env == "RolloutDice-v0"
    assert trajectory.task == {"kwargs": {"split": "x"}, "options": {"level": 3}}
    assert (trajectory.seed, trajectory.iteration, trajectory.policy) == (5, 4, "recorder")
    assert trajectory.instructions == "Say up."
    assert trajectory.turns[0].observation.startswith("x 3 ")
    observations = [turn.observation for turn in trajectory.turns] + [trajectory.final_observation]
    assert observations[1:] == [f"left {i}" for i in reversed(range(len(trajectory.turns)))]
    assert [turn.terminated for turn in trajectory.turns] == [False] * (len(trajectory.turns) - 1) + [True]
    assert trajectory.total_reward == 0.5 * len(trajectory.turns)
    assert trajectory.stop_reason is StopReason.TERMINATED
    for turn in trajectory.turns:
        assert set(turn.timings) == {"policy", "environment"}
        assert min(turn.timings.values()) >= 0
        assert (turn.prompt_ids, turn.action_ids, turn.policy_version) == ([], [], None)
        assert "admissible_actions" not in turn.info
    assert Trajectory.model_validate_json(trajectory.model_dump_json()) == trajectory


def test_environment_values_become_json():
    extra = {
        "array": np.arange(3),
        "scalar": np.float32(0.5),
        "flag": np.bool_(True),
        "tuple": (1, {"deep": np.int64(2)}),
        "set": {"b", "a"},
        "object": Exception,
        3: "key",
        "text": np.str_("t"),
        "reason": StopReason.DEADLINE,
    }
    (trajectory,) = play(Recorder(), groups(1, 1), kwargs={"length": 1, "extra": extra}).trajectories
    info = trajectory.turns[0].info
    assert {key: info[key] for key in info if key not in ("success", "valid_action", "state_key")} == {
        "array": [0, 1, 2],
        "scalar": 0.5,
        "flag": True,
        "tuple": [1, {"deep": 2}],
        "set": ["a", "b"],
        "object": repr(Exception),
        "3": "key",
        "text": "t",
        "reason": "deadline",
    }
    assert type(info["text"]) is str
    assert Trajectory.model_validate_json(trajectory.model_dump_json()) == trajectory


def test_an_info_that_contains_itself_is_cut_off():
    loop = {"name": "loop"}
    loop["self"] = loop
    assert isinstance(stored_info({"loop": loop})["loop"], dict)
    nested = jsonable(loop, depth=3)
    assert nested["self"]["self"]["self"] == repr(loop)


def test_seconds_are_accounted_for():
    collected = play(Recorder(), groups(8))
    seconds = collected.seconds
    assert set(seconds) == {"policy", "environment", "total"}
    assert 0 < seconds["policy"] + seconds["environment"] <= seconds["total"]
    stepping = sum(turn.timings["environment"] for one in collected.trajectories for turn in one.turns)
    assert seconds["environment"] >= stepping


def test_environment_time_under_the_policy_is_not_counted():
    clock = Clock()
    clock.inline(2.0, clock.started)
    clock.policy_call(+1)
    clock.inline(1.0, clock.started)
    clock.environment_call(+1)
    policy_from = clock._since
    clock.policy_call(-1)
    policy_until = clock._since
    clock.environment_call(-1)
    seconds = clock.seconds()
    assert seconds["environment"] == pytest.approx(2.0, abs=0.5)
    assert seconds["policy"] >= policy_until - policy_from


def test_every_episode_is_reported_and_released_once():
    policy, seen = Recorder(), []
    collected = play(policy, groups(4), on_episode=seen.append)
    assert {id(trajectory) for trajectory in seen} == {id(trajectory) for trajectory in collected.trajectories}
    assert all(trajectory.success and trajectory.outcome == 1.0 for trajectory in seen)
    assert sorted(policy.released) == sorted({request.episode for request in policy.requests})
    assert len(policy.released) == 8


def test_nothing_to_play():
    collected = play(Recorder(), [])
    assert (collected.trajectories, collected.failed, collected.counts) == ([], [], {})


# Batches


@pytest.mark.parametrize("concurrency", [1, 3, 256])
@pytest.mark.parametrize("thread", [False, True])
def test_batches_are_canonical_and_reproduce(concurrency, thread):
    runs = []
    for _ in range(2):
        policy = Recorder(thread=thread)
        collected = play(policy, groups(4, members=3), concurrency=concurrency)
        runs.append((policy.batches, [request.seed for request in policy.requests], untimed(collected.trajectories)))
        assert max(map(len, policy.batches)) == min(concurrency, 12)
        for batch in policy.batches:
            assert batch == sorted(batch)
        assert policy.most == 1
    assert runs[0] == runs[1]


def test_a_batch_departs_when_nobody_is_about_to_arrive_and_in_canonical_order():
    policy = Recorder()

    def request(episode):
        return PolicyRequest(episode=episode, turn=0, observation="", messages=())

    async def loop_goes_round():
        for _ in range(5):
            await asyncio.sleep(0)

    async def main():
        batcher = Batcher(policy, 60.0, Clock())
        for _ in range(4):
            batcher.arriving()
        answers = [batcher.submit((1, 0), request("c")), batcher.submit((0, 1), request("b"))]
        await loop_goes_round()
        assert policy.batches == []
        batcher.away()  # the third went into a slow environment call
        await loop_goes_round()
        assert policy.batches == []
        answers.append(batcher.submit((0, 0), request("a")))
        await asyncio.gather(*answers)
        assert policy.batches == [[("a", 0), ("b", 0), ("c", 0)]]
        answers = [batcher.submit((0, 0), request("a")), batcher.submit((0, 1), request("b"))]
        batcher.away()
        batcher.arriving()  # came back in the very moment in which the batch would have left
        await loop_goes_round()
        assert len(policy.batches) == 1
        batcher.away()  # the last one ended
        await asyncio.gather(*answers)
        assert policy.batches[1] == [("a", 0), ("b", 0)]

    asyncio.run(main())


def test_results_do_not_depend_on_the_executor():
    inline = untimed(play(Recorder(), groups(4)).trajectories)
    threads = untimed(play(Recorder(), groups(4), executor="thread", workers=3).trajectories)
    assert inline == threads


def test_a_finished_episode_costs_nothing_more():
    policy = Recorder()
    collected = play(policy, groups(6, members=1))
    lengths = [len(trajectory.turns) for trajectory in collected.trajectories]
    assert len(set(lengths)) > 1
    expected = [sum(length > turn for length in lengths) for turn in range(max(lengths))]
    assert list(map(len, policy.batches)) == expected


def test_a_free_place_is_taken_at_once():
    policy = Recorder()
    collected = play(policy, groups(10, members=1), concurrency=4)
    turns = sum(len(trajectory.turns) for trajectory in collected.trajectories)
    short = [batch for batch in policy.batches if len(batch) < 4]
    assert sum(map(len, policy.batches)) == turns
    last_start = max(i for i, batch in enumerate(policy.batches) if any(turn == 0 for _, turn in batch))
    assert all(len(batch) == 4 for batch in policy.batches[: last_start + 1])
    assert short == policy.batches[len(policy.batches) - len(short) :]


def test_a_slow_environment_holds_up_nobody():
    """Episode 0 hangs in its first step until all others have ended: in lock-step nobody would ever end."""
    Gate.gates = {0: threading.Event(), 1: threading.Event()}
    Gate.gates[1].set()
    ended = []

    def on_episode(trajectory):
        ended.append(trajectory.id)
        if len(ended) == 5:
            Gate.gates[0].set()

    policy = Recorder()
    tasks = [Task(0, "slow", options={"gate": 0}), Task(1, "quick", members=5, options={"gate": 1})]
    collected = play(policy, tasks, "RolloutGate-v0", on_episode=on_episode, workers=6)
    assert collected.counts == {"terminated": 6}
    assert ended[-1] == "slow/0"
    order = [entry for batch in policy.batches for entry in batch]
    assert order.index(("0/slow/0", 1)) > max(i for i, (episode, _) in enumerate(order) if "quick" in episode)


def test_environments_go_on_while_the_policy_is_busy():
    """Episode a's first step happens during a policy call of episode b, which waits for it."""
    stepped = threading.Event()

    class Tells(threading.Event):
        def wait(self, timeout=None):
            super().wait(timeout)
            stepped.set()
            return True

    Gate.gates = {0: Tells(), 1: threading.Event()}
    Gate.gates[1].set()

    class Waits(Recorder):
        async def act(self, requests):
            if [request.turn for request in requests] == [1]:
                Gate.gates[0].set()
                await asyncio.to_thread(stepped.wait)
            return await super().act(requests)

    tasks = [Task(0, "a", options={"gate": 0}), Task(1, "b", options={"gate": 1})]
    assert play(Waits(), tasks, "RolloutGate-v0").counts == {"terminated": 2}


def test_slow_environments_work_at_most_on_so_many_threads():
    running, most, lock = set(), [0], threading.Lock()

    class Counted(threading.Event):
        def wait(self, timeout=None):
            with lock:
                running.add(threading.get_ident())
                most[0] = max(most[0], len(running))
            with lock:
                running.discard(threading.get_ident())
            return True

    Gate.gates = {0: Counted()}
    collected = play(Recorder(), [Task(0, "g", 12, {"gate": 0})], "RolloutGate-v0", workers=2)
    assert collected.counts == {"terminated": 12}
    assert most[0] <= 2


def test_an_environment_stays_on_its_thread():
    threads = {}

    class Affine(Dice):
        fast = False

        def step(self, action):
            threads.setdefault(id(self), set()).add(threading.get_ident())
            return super().step(action)

        def begin(self, options):
            threads.setdefault(id(self), set()).add(threading.get_ident())
            return super().begin(options)

    register("RolloutAffine-v0", Affine)
    play(Recorder(), groups(4), "RolloutAffine-v0", workers=2)
    assert threads
    assert all(len(of_one) == 1 for of_one in threads.values())


def test_policies_without_batches_are_called_concurrently():
    """Each call waits until all six are under way."""

    class Together(Recorder):
        async def act(self, requests):
            assert len(requests) == 1
            self.inside = getattr(self, "inside", 0) + 1
            if self.inside >= 6:
                self.all_in.set()
            await self.all_in.wait()
            return await super().act(requests)

    policy = Together(batched=False)

    async def main():
        policy.all_in = asyncio.Event()
        config = EnvConfig(id="RolloutDice-v0", kwargs={"length": 2})
        with Collector(policy, config, RolloutConfig(), OutcomeConfig()) as collector:
            return await collector.collect_async(groups(3))

    assert asyncio.run(main()).counts == {"terminated": 6}


# Seeds


def test_splitmix64_has_its_published_outputs():
    assert mix(0, 0) == 0xE220A8397B1DCDAF
    assert mix(0x9E3779B97F4A7C15, 0) == 0x6E789E6AA1B965F4
    assert mix(2 * 0x9E3779B97F4A7C15 & (2**64 - 1), 0) == 0x06C45D188009454F


@given(st.lists(st.integers(-(2**63), 2**63), min_size=5, max_size=5))
def test_action_seeds_fit_into_63_bits(numbers):
    seed, iteration, task, member, turn = numbers
    assert 0 <= action_seed(episode_seed(seed, iteration, task, member), turn) < 2**63


def test_every_action_has_a_seed_of_its_own():
    policy = Recorder()
    for seed in (0, 1):
        for iteration in (0, 1):
            play(policy, groups(3, members=3), call={"seed": seed, "iteration": iteration})
    seeds = [request.seed for request in policy.requests]
    assert len(set(seeds)) == len(seeds)
    first = policy.requests[0]
    assert first.seed == action_seed(episode_seed(0, 0, 0, 0), 0)


def test_seeds_do_not_depend_on_who_else_is_played():
    alone, crowd = Recorder(), Recorder()
    play(alone, [Task(2, "x", 2)])
    play(crowd, groups(5, members=2), concurrency=3)
    wanted = {(r.episode.split("/")[2], r.turn): r.seed for r in alone.requests}
    assert wanted == {(r.episode.split("/")[2], r.turn): r.seed for r in crowd.requests if "/g2/" in r.episode}


def test_tasks_with_the_same_seed_do_not_share_random_numbers():
    policy = Recorder()
    play(policy, [Task(0, "a", 2, {"level": 1}), Task(0, "b", 2, {"level": 2})])
    assert max(Counter(request.seed for request in policy.requests).values()) == 1


# What the policy is shown


def test_the_policy_sees_conversation_info_and_sampling():
    policy = Recorder()
    play(policy, groups(1, 1), kwargs={"length": 3}, temperature=0.5, max_new_tokens=9)
    last = policy.requests[-1]
    roles = [message.role for message in last.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert last.messages[-1].content == last.observation == "left 1"
    assert last.info["admissible_actions"] == ["up"]
    assert last.context_ids is None
    assert last.sampling == Sampling(temperature=0.5, max_new_tokens=9)
    greedy = Sampling(temperature=0.0)
    play(policy, groups(1, 1), call={"sampling": greedy})
    assert policy.requests[-1].sampling is greedy


def test_a_window_applies_to_messages_too():
    policy = Recorder()
    play(policy, groups(1, 1), kwargs={"length": 4}, history="window(1)")
    shown = [[message.content for message in request.messages] for request in policy.requests]
    assert [len(messages) for messages in shown] == [2, 4, 4, 4]
    assert shown[3] == ["Say up.", "left 2", "up", "left 1"]


def test_observations_in_parts_are_passed_on():
    policy = Recorder()
    (trajectory,) = play(policy, groups(1, 1), "RolloutParts-v0", kwargs={"length": 1}).trajectories
    assert trajectory.turns[0].observation == [TextPart(text="look"), TextPart(text=" here")]
    assert policy.requests[0].messages[-1].content == trajectory.turns[0].observation
    assert Trajectory.model_validate_json(trajectory.model_dump_json()) == trajectory


# Limits and outcomes


def test_gymnasium_truncation_is_the_turn_limit():
    collected = play(Recorder(), groups(2), "RolloutLimited-v0")
    assert collected.counts == {"turn_limit": 4}
    assert all(len(one.turns) == 3 and one.turns[-1].truncated and one.truncated for one in collected.trajectories)


def test_max_turns_of_the_configuration_wins():
    config = EnvConfig(id="RolloutLimited-v0", max_turns=2)
    collected = collect(lambda text: "down", config, episodes=2)
    assert [len(one.turns) for one in collected.trajectories] == [2, 2]
    assert not any(one.success for one in collected.trajectories)


def test_termination_goes_before_truncation_and_numpy_is_welcome():
    (trajectory,) = play(Recorder(), groups(1, 1), "RolloutBothFlags-v0").trajectories
    assert trajectory.stop_reason is StopReason.TERMINATED
    assert trajectory.turns[0].model_dump()["terminated"] is True
    assert type(trajectory.final_observation) is str


def episode(rewards, success, stop=StopReason.TERMINATED, **info):
    turns = [Turn(observation="o", action="a", reward=reward) for reward in rewards]
    if turns and success is not None:
        turns[-1].info = {"success": success}
    return Trajectory(id="i", group_id="g", env="e", seed=0, turns=turns, stop_reason=stop)


@pytest.mark.parametrize(
    ("trajectory", "config", "wanted"),
    [
        (episode([1, 2], True), {}, (1.0, True)),
        (episode([1, 2], False), {}, (0.0, False)),
        (episode([1, 2], None), {}, (0.0, False)),
        (episode([], None, StopReason.TOKEN_LIMIT), {}, (0.0, False)),
        (episode([1], True, StopReason.TURN_LIMIT), {}, (1.0, True)),
        (episode([1], False, StopReason.TURN_LIMIT), {}, (0.0, False)),
        (episode([1, 2], False), {"rule": "return"}, (3.0, False)),
        (episode([1, 2], True), {"rule": "return"}, (3.0, True)),
        (episode([1, 2], False), {"rule": "return", "success_above": 2.5}, (3.0, True)),
        (episode([1, 2], True), {"rule": "return", "success_above": 3.0}, (3.0, False)),
        (episode([7], False, StopReason.TURN_LIMIT), {"rule": "return", "success_above": 6.0}, (7.0, True)),
        (episode([9], True, StopReason.ENVIRONMENT_ERROR), {"rule": "return", "success_above": 0.0}, (0.0, False)),
        (episode([9], True, StopReason.DEADLINE), {}, (0.0, False)),
    ],
)
def test_outcome_rules(trajectory, config, wanted):
    assert score(trajectory, OutcomeConfig(**config)) == wanted


def test_the_configured_rule_is_applied():
    outcome = OutcomeConfig(rule="return", success_above=1.6)
    collected = play(Recorder(), groups(16, 1), outcome=outcome)
    for trajectory in collected.trajectories:
        assert trajectory.outcome == 0.5 * len(trajectory.turns)
        assert trajectory.success == (len(trajectory.turns) >= 4)
    assert len({trajectory.success for trajectory in collected.trajectories}) == 2


# Environments


def test_evaluation_settings_go_over_training_settings():
    config = EnvConfig(id="RolloutDice-v0", kwargs={"split": "train", "length": 1}, eval_kwargs={"split": "test"})
    for evaluation, word in ((False, "train"), (True, "test")):
        with Collector(Recorder(), config, RolloutConfig(), OutcomeConfig(), evaluation=evaluation) as collector:
            (trajectory,) = collector.collect([Task(0, "a")]).trajectories
        assert trajectory.turns[0].observation.startswith(word)
        assert trajectory.task["kwargs"] == {"split": word, "length": 1}


@pytest.mark.parametrize("executor", ["auto", "inline", "thread"])
def test_environments_are_kept_between_collections(executor):
    Dice.made = 0
    config, rollout = EnvConfig(id="RolloutDice-v0"), RolloutConfig(concurrency=4, executor=executor)
    with Collector(Recorder(), config, rollout, OutcomeConfig()) as collector:
        first = collector.collect(groups(6))
        assert Dice.made == 4
        again = collector.collect(groups(6))
        assert Dice.made == 4
    assert untimed(first.trajectories) == untimed(again.trajectories)


@pytest.mark.parametrize(("env", "executor"), [("RolloutDice-v0", "inline"), ("RolloutSlowDice-v0", "thread")])
def test_auto_asks_the_environment(env, executor):
    with Collector(Recorder(), EnvConfig(id=env), RolloutConfig(), OutcomeConfig()) as collector:
        collector.collect(groups(2))
        assert collector.pool.executor == executor


def test_closing_ends_the_threads():
    before = threading.active_count()
    play(Recorder(), groups(3), executor="thread")
    assert threading.active_count() == before


def test_an_environment_that_ignores_its_seed_is_found():
    with pytest.raises(UserError) as caught:
        play(Recorder(), [Task(7, "a", 2)], "RolloutUnseeded-v0")
    message = str(caught.value)
    assert "RolloutUnseeded-v0" in message
    assert "reset(seed=7)" in message
    assert "first observation of members 0 and 1 differ at character" in message
    assert "self.np_random" in message
    play(Recorder(), [Task(7, "a", 1), Task(7, "b", 1)], "RolloutUnseeded-v0")  # no group, no promise


# Wrong use


@pytest.mark.parametrize("executor", ["auto", "inline", "thread"])
def test_what_the_user_must_mend_is_said_at_once(executor):
    with pytest.raises(UnknownNameError, match="no environment 'RolloutDise-v0'"):
        play(Recorder(), groups(2), "RolloutDise-v0", executor=executor)
    with pytest.raises(UserError, match="cannot be made with"):
        play(Recorder(), groups(2), kwargs={"sise": 6}, executor=executor)
    with pytest.raises(UserError, match="'RolloutPixels-v0' returned a ndarray as its observation"):
        play(Recorder(), groups(2), "RolloutPixels-v0", executor=executor)


def test_tasks_are_checked():
    with pytest.raises(UserError, match="several tasks have the group_id 'a'"):
        play(Recorder(), [Task(0, "a"), Task(1, "a")])
    with pytest.raises(UserError, match="members=0"):
        play(Recorder(), [Task(0, "a", members=0)])


def test_one_collection_at_a_time():
    async def main():
        with Collector(Recorder(), EnvConfig(id="RolloutDice-v0"), RolloutConfig(), OutcomeConfig()) as collector:
            both = await asyncio.gather(*(collector.collect_async(groups(2)) for _ in range(2)), return_exceptions=True)
            assert [type(one).__name__ for one in both] == ["Collected", "UserError"]
            assert (await collector.collect_async(groups(2))).counts == {"terminated": 4}

    asyncio.run(main())


# The one-liner


def test_a_plain_function_plays():
    collected = agentrl.collect(lambda text: "up", "RolloutDice-v0", episodes=6, group_size=3, seed=10)
    assert [trajectory.group_id for trajectory in collected.trajectories] == ["10"] * 3 + ["11"] * 3
    assert all(trajectory.success for trajectory in collected.trajectories)
    assert collected.trajectories[0].policy == "<lambda>"


def test_an_async_function_plays_concurrently():
    inside = []

    async def agent(text):
        inside.append(text)
        while len(inside) < 4:
            await asyncio.sleep(0)
        return "up"

    class Agent:
        async def __call__(self, text):
            return await agent(text)

    for function in (agent, Agent()):
        inside.clear()
        assert collect(function, "RolloutDice-v0", episodes=4).counts == {"terminated": 4}


def test_the_one_liner_checks_its_arguments():
    with pytest.raises(UserError, match=r"episodes=5 .* group_size=2"):
        collect(lambda text: "up", "RolloutDice-v0", episodes=5, group_size=2)
    with pytest.raises(UserError, match="not int"):
        collect(3, "RolloutDice-v0")


def test_collect_works_inside_a_running_loop():
    async def notebook():
        return collect(lambda text: "up", "RolloutDice-v0", episodes=2)

    assert asyncio.run(notebook()).counts == {"terminated": 2}


def test_importing_the_rollout_does_not_load_torch():
    code = "import agentrl.rollout, agentrl.rollout.process, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The watchdog


@pytest.mark.parametrize("executor", ["inline", "thread"])
def test_the_watchdog_names_what_is_waited_for(executor):
    """The environment hangs until the watchdog has spoken; also where the event loop itself hangs."""
    gate = threading.Event()
    Gate.gates = {0: gate}
    messages = []

    class Catch(logging.Handler):
        def emit(self, record):
            if "nothing has happened" in record.getMessage():
                messages.append(record.getMessage())
                gate.set()

    handler = Catch()
    logger = logging.getLogger("agentrl.rollout")
    logger.addHandler(handler)
    try:
        config, rollout = EnvConfig(id="RolloutGate-v0"), RolloutConfig(executor=executor)
        with Collector(
            FunctionPolicy(lambda request: "x"), config, rollout, OutcomeConfig(), watchdog_s=0.05
        ) as collector:
            collected = collector.collect([Task(9, "a", options={"gate": 0})], label="eval")
    finally:
        logger.removeHandler(handler)
    assert collected.counts == {"terminated": 1}
    assert messages[0].startswith("eval: nothing has happened for ")
    assert "1 environment step" in messages[0]
    assert "oldest: episode a/0 (seed 9, turn 0), environment step for" in messages[0]
