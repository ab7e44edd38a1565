"""Token in, token out: what is stored rebuilds exactly what the sampler saw."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import register

from agentrl.config.schema import EnvConfig, OutcomeConfig, RolloutConfig
from agentrl.envs import TextEnv
from agentrl.errors import AgentRLError, NonFiniteError, UserError
from agentrl.policy import Policy, PolicyAction
from agentrl.rollout import Collector, ContextBuilder, Task
from agentrl.types import StopReason, Trajectory

START, END, USER, AGENT = 1, 2, 3, 4
LETTERS = 10
"""Letters are `LETTERS + ord`; ids of 100 000 and more are 'sampled' ids that no text encodes to."""


class FakeCodec:
    """Same contract as `agentrl.models.chat.ChatCodec`, on characters."""

    stop_ids = frozenset({END})

    @staticmethod
    def _text(text):
        return [LETTERS + ord(letter) for letter in text]

    def start(self, instructions, observation, tools=()):
        return [START, *self._text(instructions), END, USER, *self._text(observation), END, AGENT]

    def extend(self, last_action_ids, observation):
        ended = bool(last_action_ids) and last_action_ids[-1] in self.stop_ids
        return [*([] if ended else [END]), USER, *self._text(observation), END, AGENT]

    def window(self, instructions, past, observation, tools=()):
        observations = [seen for seen, _ in past] + [observation]
        ids = self.start(instructions, observations[0])
        for (_, action), following in zip(past, observations[1:], strict=True):
            ids += [*action, *self.extend(action, following)]
        return ids

    def decode(self, ids):
        return "".join(chr(i - LETTERS) for i in ids if LETTERS <= i < 100_000)


def contexts_of(turns):
    """Rebuilds from (prompt_ids, action_ids, new_row) what the model saw before each action."""
    row, contexts = [], []
    for prompt, action, new_row in turns:
        row = list(prompt) if new_row else row + list(prompt)
        contexts.append(list(row))
        row += action
    return contexts


def play(codec, window, instructions, script):
    """Returns the contexts handed out, and the stored (prompt_ids, action_ids, new_row) per turn."""
    builder = ContextBuilder(codec, instructions, window)
    seen, stored = [], []
    for observation, action in script:
        context = builder.observe(observation)
        seen.append(list(context.ids))
        stored.append((list(context.prompt_ids), action, context.new_row))
        builder.act(action)
    return seen, stored


SCRIPTS = st.lists(
    st.tuples(st.text("abc \n", max_size=5), st.lists(st.sampled_from([100_000, 100_001, 107, END]), max_size=4)),
    min_size=1,
    max_size=8,
)


@given(SCRIPTS, st.none() | st.integers(0, 9), st.text("xy", max_size=3))
def test_stored_turns_rebuild_what_the_sampler_saw(script, window, instructions):
    seen, stored = play(FakeCodec(), window, instructions, script)
    assert contexts_of(stored) == seen


@given(SCRIPTS, st.integers(0, 9))
def test_every_context_equals_a_fresh_rendering_of_the_turns_it_shows(script, window):
    codec = FakeCodec()
    seen, _ = play(codec, window, "rules", script)
    for turn, context in enumerate(seen):
        past = script[max(0, turn - window) : turn]
        assert context == codec.window("rules", past, script[turn][0])


@given(SCRIPTS)
def test_full_history_is_one_row_whose_storage_is_linear(script):
    _, stored = play(FakeCodec(), None, "rules", script)
    assert [new_row for _, _, new_row in stored] == [True] + [False] * (len(script) - 1)
    whole = FakeCodec().window("rules", script[:-1], script[-1][0])
    assert sum(len(prompt) for prompt, _, _ in stored) + sum(len(a) for _, a, _ in stored[:-1]) == len(whole)


@given(SCRIPTS)
def test_a_window_as_long_as_the_episode_is_full_history(script):
    assert play(FakeCodec(), len(script), "r", script) == play(FakeCodec(), None, "r", script)


def test_window_extends_until_it_is_full_and_then_rebuilds_each_turn():
    script = [(letter, [100_000 + i, END]) for i, letter in enumerate("abcde")]
    seen, stored = play(FakeCodec(), 2, "rules", script)
    assert [new_row for _, _, new_row in stored] == [True, False, False, True, True]
    assert 100_000 in seen[2]
    assert 100_000 not in seen[3]
    _, alone = play(FakeCodec(), 0, "rules", script)
    assert [prompt for prompt, _, _ in alone] == [FakeCodec().start("rules", letter) for letter in "abcde"]
    assert all(new_row for _, _, new_row in alone)


def test_turn_glue_is_written_only_where_it_was_not_sampled():
    _, stored = play(FakeCodec(), None, "", [("a", [100_000, END]), ("b", [100_000]), ("c", [])])
    assert stored[1][0][0] == USER
    assert stored[2][0][:2] == [END, USER]


def test_a_policy_that_writes_into_its_context_is_caught():
    builder = ContextBuilder(FakeCodec(), "rules")
    context = builder.observe("a")
    context.ids[3] = 99
    builder.act([100_000, END])
    with pytest.raises(AgentRLError, match="no longer begins with"):
        builder.observe("b")


class Count(TextEnv):
    """Counts turns; ends after `length` of them, or never."""

    fast = True
    instructions = "count"

    def __init__(self, length=4, wordy=1):
        super().__init__()
        self.length, self.wordy = length, wordy

    def begin(self, options):
        self.turn = 0
        return "start" * self.wordy, {}

    def parse_action(self, text):
        return text

    def play(self, action):
        self.turn += 1
        return f"now {self.turn}, you said {action}", 0.0, self.turn == self.length, {"success": True}


register("ContextCount-v0", Count)


class FakeModel(Policy):
    """Samples ids that no text would encode to, and remembers every context it was given."""

    name = "fake-model"

    def __init__(self, logprob=-0.5):
        self.chat = FakeCodec()
        self.contexts = {}
        self.logprob = logprob

    async def act(self, requests):
        actions = []
        for request in requests:
            key = request.episode.rpartition("#")[0]
            self.contexts.setdefault(key, []).append(list(request.context_ids))
            ids = [100_000 + request.seed % 1000, *FakeCodec._text("up")]
            if request.turn % 2 == 0:
                ids.append(END)
            actions.append(PolicyAction(self.chat.decode(ids), ids, [self.logprob] * len(ids), version=7))
        return actions


def collect(policy, *, env=None, members=2, **rollout):
    config = EnvConfig(id="ContextCount-v0", kwargs=env or {})
    with Collector(policy, config, RolloutConfig(**rollout), OutcomeConfig()) as collector:
        return collector.collect([Task(3, "g", members)])


@pytest.mark.parametrize("history", ["full", "window(0)", "window(1)", "window(2)", "window(9)"])
def test_trajectories_on_disk_rebuild_what_the_sampler_saw(history):
    policy = FakeModel()
    collected = collect(policy, env={"length": 6}, history=history)
    for trajectory in collected.trajectories:
        stored = Trajectory.model_validate_json(trajectory.model_dump_json())
        assert stored == trajectory
        turns = [(turn.prompt_ids, turn.action_ids, turn.new_row) for turn in stored.turns]
        assert contexts_of(turns) == policy.contexts[f"0/{trajectory.id}"]
        assert all(len(turn.action_ids) == len(turn.action_logprobs) for turn in stored.turns)
        assert {turn.policy_version for turn in stored.turns} == {7}
        assert all(turn.action == "up" and 100_000 <= turn.action_ids[0] < 101_000 for turn in stored.turns)


def test_an_episode_stops_before_its_context_passes_the_limit():
    policy = FakeModel()
    collected = collect(policy, env={"length": 99}, max_context_tokens=120, max_new_tokens=8)
    assert collected.counts == {"token_limit": 2}
    for trajectory in collected.trajectories:
        assert trajectory.stop_reason is StopReason.TOKEN_LIMIT
        assert trajectory.turns
        contexts = policy.contexts[f"0/{trajectory.id}"]
        assert len(contexts[-1]) + 8 <= 120 < trajectory.metadata["refused_context_tokens"] + 8
        assert trajectory.final_observation == f"now {len(trajectory.turns)}, you said up"


def test_the_limit_itself_is_allowed():
    policy = FakeModel()
    first = len(FakeCodec().start("count", "start"))
    collected = collect(policy, env={"length": 1}, max_context_tokens=first + 8, max_new_tokens=8)
    assert collected.counts == {"terminated": 2}


def test_a_window_keeps_an_endless_episode_under_the_limit():
    collected = collect(
        FakeModel(), env={"length": 40}, history="window(1)", max_context_tokens=120, max_new_tokens=8, members=1
    )
    assert [len(trajectory.turns) for trajectory in collected.trajectories] == [40]


def test_a_first_prompt_that_is_too_long_for_everybody_is_said_aloud():
    with pytest.raises(
        UserError, match=r"no episode could act: the first prompt has \d+ tokens.*max_context_tokens=64"
    ):
        collect(FakeModel(), env={"wordy": 50}, max_context_tokens=64)


class Talker(FakeModel):
    """Samples as many tokens as it may, up to `length`, and remembers how many it might have."""

    def __init__(self, length=99):
        super().__init__()
        self.length, self.allowed = length, {}

    async def act(self, requests):
        actions = []
        for request in requests:
            allowed = request.sampling.max_new_tokens
            self.allowed.setdefault(request.episode.rpartition("#")[0], []).append(allowed)
            ids = FakeCodec._text("u" * min(allowed, self.length))
            actions.append(PolicyAction(self.chat.decode(ids), ids, [-0.5] * len(ids)))
        return actions


@pytest.mark.parametrize("history", ["full", "window(0)"])
@pytest.mark.parametrize(("budget", "allowed"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3]), (1, [1])])
def test_an_episode_ends_when_its_tokens_are_used_up(history, budget, allowed):
    policy = Talker()
    limits = {"max_episode_tokens": budget, "max_new_tokens": 4, "history": history}
    collected = collect(policy, env={"length": 99}, **limits)
    assert collected.counts == {"token_limit": 2}
    for trajectory in collected.trajectories:
        assert policy.allowed[f"0/{trajectory.id}"] == allowed
        assert trajectory.action_tokens == trajectory.metadata["used_up_tokens"] == budget
        assert (trajectory.stop_reason, trajectory.truncated) == (StopReason.TOKEN_LIMIT, True)
        assert trajectory.scorable


def test_what_a_turn_leaves_is_there_for_the_next_and_an_end_in_time_is_an_end():
    policy = Talker(length=1)
    limits = {"max_episode_tokens": 5, "max_new_tokens": 3}
    assert collect(policy, env={"length": 5}, members=1, **limits).counts == {"terminated": 1}
    assert policy.allowed["0/g/0"] == [3, 3, 3, 2, 1]
    assert collect(Talker(), env={"length": 99}, members=1, max_new_tokens=3).counts == {"token_limit": 1}, "context"


def test_a_small_token_budget_needs_no_more_room_in_the_context():
    first = len(FakeCodec().start("count", "start"))
    limits = {"max_context_tokens": first + 3, "max_new_tokens": 8}
    assert collect(Talker(), env={"length": 1}, **limits, max_episode_tokens=3).counts == {"terminated": 2}
    with pytest.raises(UserError, match=rf"max_episode_tokens=4 it passes rollout\.max_context_tokens={first + 3}"):
        collect(Talker(), env={"length": 1}, **limits, max_episode_tokens=4)


def test_policies_without_tokens_have_no_token_budget():
    class Text(Policy):
        async def act(self, requests):
            assert {request.sampling.max_new_tokens for request in requests} == {16}
            return [PolicyAction("up") for _ in requests]

    assert collect(Text(), env={"length": 9}, max_episode_tokens=1).counts == {"terminated": 2}


def test_log_probs_that_are_not_finite_stop_the_run():
    with pytest.raises(NonFiniteError, match=r"fake-model.*turn 0 of episode g/0"):
        collect(FakeModel(logprob=float("nan")))
