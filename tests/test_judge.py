"""Signals, critic, shaping and gathering: what the trainer computes for the credit methods, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import episodes, per_turn, trajectory, turn
from toys import SOKOBAN, Echo, register, run_config, timeless

from agentrl.batch import build_batch, score
from agentrl.batch.index import following, rank, suffix_sum
from agentrl.buffer import read_jsonl
from agentrl.config import OutcomeConfig, RunConfig
from agentrl.config.schema import CriticConfig, ShapingConfig
from agentrl.credit.registry import OURS
from agentrl.errors import DataError, NonFiniteError, UserError
from agentrl.rollout import outcome as outcomes
from agentrl.train.critic import Critic
from agentrl.train.gather import Dealer, gather
from agentrl.train.judge import Judge, state_keys
from agentrl.train.metrics import read_metrics
from agentrl.train.preflight import check_task
from agentrl.train.shaping import overlong_penalty, shaped_outcome, shaped_turn_rewards, trainable
from agentrl.train.trainer import Trainer, train
from agentrl.types import StopReason

SHAPED = SOKOBAN | {"kwargs": {**SOKOBAN["kwargs"], "reward": "shaped"}}

EVERY_METHOD: dict[str, dict[str, Any]] = {
    "dr_grpo": {},
    "gigpo": {"env": SHAPED},
    "gigpo terminal": {"credit": {"method": "gigpo", "options": {"terminal_outcome": True}}},
    "ground_truth": {"env": SHAPED},
    "grpo": {},
    "oprl": {},
    "oprl merged": {"credit": {"method": "oprl", "options": {"combine": "merged"}}},
    "oprl token": {"credit": {"method": "oprl", "options": {"granularity": "token"}}},
    "ppo": {"critic": {"lr": 1e-3}},
    "prime": {"prm": {"lr": 1e-3, "loss": "ce", "order": "score_then_update"}},
    "prpo": {},
    "prpo entropy": {"credit": {"method": "prpo", "options": {"segmenter": "entropy", "min_gap": 2}}},
    "reinforce_pp": {},
    "reinforce_pp_baseline": {},
    "rloo": {},
    "spro": {"credit": {"method": "spro", "options": {"beta": 0.05}}},
}


def config_of(name: str, folder: Path, model: Path, **more: Any) -> RunConfig:
    settings = {"credit": {"method": name.split()[0]}} | EVERY_METHOD[name] | more
    return run_config(folder, model, **settings)


def test_the_table_of_methods_is_complete() -> None:
    assert {name.split()[0] for name in EVERY_METHOD} == {method.name for method in OURS}


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_every_method_trains_and_resumes_to_the_same_numbers(name: str, tmp_path: Path, warm: Path) -> None:
    whole, cut = (config_of(name, tmp_path / folder, warm, iterations=2) for folder in ("whole", "cut"))
    train(whole)
    trainer = Trainer(cut)
    trainer.iterate()
    trainer.save()
    trainer.close()
    train(cut, resume=True)
    ours, theirs = ([timeless(r) for r in read_metrics(tmp_path / f)] for f in ("whole", "cut"))
    assert ours[-1] == theirs[-1]
    weights = [(tmp_path / f / "model" / "model.safetensors").read_bytes() for f in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert weights[0] != (warm / "model.safetensors").read_bytes()


# --- order inside a trajectory ---


def test_ranks_sums_to_the_end_and_followers_against_loops() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        size, K = int(random.integers(1, 6)), int(random.integers(0, 30))
        owner = torch.from_numpy(random.integers(0, size, K))
        time, values = torch.from_numpy(random.permutation(K)), torch.from_numpy(random.normal(size=K))
        place = rank(owner, size, time)
        mine = [[j for j in range(K) if owner[j] == owner[k]] for k in range(K)]
        assert place.tolist() == [sum(bool(time[j] < time[k]) for j in mine[k]) for k in range(K)]
        for gamma in (1.0, 0.9, 0.0):
            want = [
                sum(float(values[j]) * gamma ** int(place[j] - place[k]) for j in mine[k] if place[j] >= place[k])
                for k in range(K)
            ]
            got = suffix_sum(values, owner, place, size, gamma)
            torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=1e-12)
        after = [[float(values[j]) for j in mine[k] if place[j] == place[k] + 1] for k in range(K)]
        assert following(values, owner, place, size).tolist() == [(a or [0.0])[0] for a in after]


# --- the judge ---


def judge_of(folder: Path, model: Path, needs: set[str], **settings: Any) -> tuple[Judge, Any]:
    from agentrl.models.load import load_model

    policy = load_model(model, train=True)
    return Judge(run_config(folder, model, **settings), policy, frozenset(needs)), policy  # type: ignore[arg-type]


def test_the_judge_computes_what_is_needed_and_nothing_else(tmp_path: Path, model_dir: Path) -> None:
    batch = build_batch(episodes(1))
    nothing, policy = judge_of(tmp_path, model_dir, set())
    signals, metrics = nothing.judge(batch, policy)
    assert metrics == {}
    assert torch.equal(signals.policy_logprob, batch.behaviour)
    for name in ("token_reward", "reference_logprob", "entropy", "value", "turn_reward", "state_key", "turn_score"):
        assert getattr(signals, name) is None
    assert nothing.initial is nothing.prm is nothing.critic is None
    asked, policy = judge_of(tmp_path, model_dir, {"reference", "entropy", "values", "turn_rewards"})
    signals, _ = asked.judge(batch, policy)
    whole = score(policy, batch, budget=10**6, want_entropy=True)
    torch.testing.assert_close(signals.reference_logprob, whole.logprob)
    torch.testing.assert_close(signals.entropy, whole.entropy)
    assert torch.all(signals.value == 0), "the value head starts at zero"
    assert signals.turn_reward.tolist() == [0.0] * batch.index.M


def test_the_reference_stays_where_training_began(tmp_path: Path, model_dir: Path) -> None:
    batch = build_batch(episodes(2))
    judge, policy = judge_of(tmp_path, model_dir, {"reference"})
    before = score(policy, batch, budget=10**6).logprob
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.5)
    assert torch.equal(judge.judge(batch, policy)[0].reference_logprob, before)


def test_state_keys_are_those_before_the_action() -> None:
    turns = [turn([1], [2]).model_copy(update={"info": {"state_key": key}}) for key in "bcb"]
    one = trajectory("one", "g", 1, turns, start_info={"state_key": "a"})
    two = trajectory("two", "g", 0, turns[:1], start_info={"state_key": "a"})
    assert state_keys([one, two]) == ["a", "b", "c", "a"]
    with pytest.raises(DataError, match=r"trajectory two, turn 0: environment 'none' gave no state_key .* after reset"):
        state_keys([one, two.model_copy(update={"start_info": {}})])
    turns[0].info.clear()
    with pytest.raises(DataError, match=r"trajectory one, turn 1: .* after the turn before"):
        state_keys([one])


def test_played_episodes_carry_the_state_they_started_in(tmp_path: Path, warm: Path) -> None:
    trainer = Trainer(run_config(tmp_path / "run", warm, credit__method="gigpo", env=SHAPED))
    trainer.iterate()
    trainer.close()
    assert trainer.last is not None
    keys, batch = trainer.last.signals.state_key, trainer.last.batch
    first = (batch.index.turn_rank == 0).nonzero()[:, 0].tolist()
    for group in range(batch.index.G):
        assert len({keys[m] for m in first if int(batch.index.group_of_turn[m]) == group}) == 1
    stored = read_jsonl(tmp_path / "run" / "trajectories" / "iteration-000000.jsonl")
    assert state_keys(stored) == list(keys)


# --- refused before anything is played ---


class Bare(Echo):
    """Knows nothing of state keys."""


register("Bare-v0", Bare)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"credit": {"method": "gigpo"}, "env": {"id": "Bare-v0"}},
            r"gigpo needs 'state_keys', which environment 'Bare-v0' does not provide; these do: .*Sokoban-v0",
        ),
        (
            {"credit": {"method": "ground_truth"}},
            r"ground_truth needs 'turn_rewards', which environment 'Sokoban-v0' provides with env.kwargs.reward=shaped",
        ),
        (
            {"credit": {"method": "prpo", "options": {"scores": "served"}}},
            r"credit.method=prpo wants scores of a served PRM: set prm.served_url",
        ),
        ({"credit": {"method": "prime"}}, r"prime wants a PRM trained on labels, not prm.loss=dpo; set prm.loss=ce"),
        ({"rollout__group_size": 1}, r"rollout.group_size=1 with credit.method=rloo: a group of one has no baseline"),
    ],
)
def test_a_method_without_what_it_needs_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        check_task(run_config(tmp_path, tmp_path, **settings))


def test_methods_without_a_group_take_groups_of_one(tmp_path: Path) -> None:
    for method in ("ppo", "reinforce_pp", "prpo"):
        check_task(run_config(tmp_path, tmp_path, credit__method=method, rollout__group_size=1))


# --- the critic ---


def critic_of(model: Any, **config: Any) -> Critic:
    return Critic(model, CriticConfig(**{"lr": 3e-3, "clip": None} | config), budget=10**6)


def test_the_critic_learns_the_returns(model: Any) -> None:
    batch = build_batch(episodes(3))
    target = torch.randn(batch.index.K, generator=torch.Generator().manual_seed(0))
    critic = critic_of(model)
    first = critic.update(batch, target, critic.values(batch))
    assert first["critic_loss"] == pytest.approx(0.5 * float(target.square().mean()), rel=1e-5)
    assert first["critic_explained"] == pytest.approx(0, abs=1e-6)
    for seed in range(60):
        last = critic.update(batch, target, critic.values(batch), seed=seed)
    assert last["critic_loss"] < 0.2 * first["critic_loss"]
    assert last["critic_explained"] > 0.6


def test_the_critic_does_not_see_micro_batches_or_layouts(pristine: Any) -> None:
    import copy

    made = episodes(4)
    results = []
    for trajectories, budget in ((made, 10**6), (made, 1), (per_turn(made), 10**6)):
        batch = build_batch(trajectories)
        critic = critic_of(copy.deepcopy(pristine))
        critic.budget = budget
        with torch.no_grad():
            critic.head.weight.fill_(0.1)
        old = critic.values(batch)
        target = torch.linspace(-1, 1, batch.index.K)
        metrics = critic.update(batch, target, old)
        results.append((old, metrics["critic_loss"], metrics["critic_grad_norm"], critic.values(batch)))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_value_clip_stops_the_gradient_beyond_it(model: Any) -> None:
    batch = build_batch(episodes(5))
    critic = critic_of(model, clip=0.1)
    far = torch.full((batch.index.K,), -5.0)
    # The values are 0 now and were -5 then: within reach of the target only by leaving the clip range.
    metrics = critic.update(batch, torch.zeros(batch.index.K), far)
    assert metrics["critic_loss"] == pytest.approx(0.5 * 4.9**2, rel=1e-5)
    assert metrics["critic_grad_norm"] == 0


def test_a_critic_that_is_not_finite_stops_the_run(model: Any) -> None:
    batch = build_batch(episodes(6))
    critic = critic_of(model)
    with pytest.raises(NonFiniteError, match="critic loss nan"):
        critic.update(batch, torch.full((batch.index.K,), torch.nan), critic.values(batch))


def test_while_the_critic_warms_up_the_policy_stands_still(tmp_path: Path, warm: Path) -> None:
    config = run_config(tmp_path / "run", warm, credit__method="ppo", critic={"lr": 1e-3, "warmup_iterations": 1})
    trainer = Trainer(config)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.iterate()
    assert all(map(torch.equal, before, trainer.model.parameters()))
    assert trainer.judge.critic is not None
    assert trainer.judge.critic.head.weight.any()
    trainer.iterate()
    assert not all(map(torch.equal, before, trainer.model.parameters()))
    trainer.close()


# --- shaping ---


def test_soft_overlong_punishment(golden: dict[str, Any]) -> None:
    inputs, outputs = golden["dapo"]["inputs"], golden["dapo"]["outputs"]
    config = ShapingConfig(overlong_tokens=inputs["L_max"], overlong_cache=inputs["L_cache"])
    assert (-overlong_penalty(torch.tensor(inputs["lengths"]), config)).tolist() == outputs["soft_overlong"]
    verl = config.model_copy(update={"overlong_unbounded": True})
    assert (-overlong_penalty(torch.tensor(inputs["lengths"]), verl)).tolist() == outputs["verl_overlong"]
    hard = ShapingConfig(overlong_tokens=100, overlong_penalty=2.0)
    assert overlong_penalty(torch.tensor([99, 100, 101]), hard).tolist() == [0, 0, 2]


def test_shaped_outcomes_and_rewards_leave_the_raw_ones_alone() -> None:
    invalid = turn([1], [2, 3]).model_copy(update={"info": {"valid_action": False}, "reward": 0.5})
    made = [trajectory("a", "g", 1.0, [invalid, turn([1], [2] * 7), invalid]), trajectory("b", "g", 0.0, [])]
    config = ShapingConfig(overlong_tokens=10, overlong_cache=2, invalid_action_penalty=0.25)
    assert shaped_outcome(made, config).tolist() == [1.0 - 1.0 - 0.5, 0.0]
    assert shaped_turn_rewards(made, config).tolist() == [0.25, 0.0, 0.25]
    assert shaped_outcome(made, ShapingConfig()).tolist() == [1.0, 0.0]
    assert [t.outcome for t in made] == [1.0, 0.0]


def test_the_overlong_filter_names_who_carries_loss() -> None:
    made = [trajectory(str(r), "g", 0, [], stop_reason=r) for r in ("terminated", "turn_limit", "token_limit")]
    assert trainable(made, "none") == [0, 1, 2]
    assert trainable(made, "token_limit") == [0, 1]
    assert trainable(made, "any_limit") == [0]


@pytest.mark.parametrize("success_above", [None, 0.2])
def test_a_truncated_episode_may_count_as_a_failure(success_above: float | None) -> None:
    good = turn([1], [2]).model_copy(update={"reward": 0.5, "info": {"success": True}})
    made = trajectory("a", "g", 0, [good], stop_reason=StopReason.TURN_LIMIT)
    for rule, scored in (("success", 1.0), ("return", 0.5)):
        config = {"rule": rule, "success_above": success_above}
        assert outcomes.score(made, OutcomeConfig(**config)) == (scored, True)
        assert outcomes.score(made, OutcomeConfig(**config, truncated="failure")) == (0.0, False)
    bad = made.model_copy(update={"turns": [good.model_copy(update={"reward": -2.0})]})
    assert outcomes.score(bad, OutcomeConfig(rule="return", truncated="failure")) == (-2.0, False)


def test_the_overlong_filter_takes_their_loss_away_and_leaves_them_in_the_statistics(
    tmp_path: Path, warm: Path, trainer_of: Callable[..., Trainer]
) -> None:
    plain, filtered = (
        trainer_of(run_config(tmp_path / mode, warm, policy_update={"lr": 1e-3, "overlong_filter": mode}))
        for mode in ("none", "any_limit")
    )
    first, second = plain.iterate(), filtered.iterate()
    assert 0 < second["overlong_filtered"] == second["truncated"] * second["episodes"]
    assert torch.equal(plain.last.advantage.token, filtered.last.advantage.token)
    assert first["policy_loss"] != second["policy_loss"]


# --- gathering ---


class Given(Echo):
    """An episode of one turn whose success is decided by its seed and how often that seed was reset."""

    plan: dict[int, list[bool]] = {}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        answer = super().reset(seed=seed, options=options)
        self.wins = Given.plan[seed].pop(0) if Given.plan.get(seed) else False
        return answer

    def next(self, right: bool) -> Any:
        return self.show(), 0.0, True, {"success": self.wins}


register("Given-v0", Given)


def played(folder: Path, model: Path, plan: list[list[bool]], trainer_of: Any, **settings: Any) -> Trainer:
    """A trainer on ``Given-v0`` whose i-th task ends as `plan[i]` says."""
    Given.plan = {i: list(wins) for i, wins in enumerate(plan)}
    settings = {"env": {"id": "Given-v0"}, "rollout": {"groups": 2, "group_size": 2, "max_new_tokens": 3}} | settings
    return trainer_of(run_config(folder, model, **settings))


MIXED, WON, LOST = [True, False], [True, True], [False, False]
DYNAMIC = {"rollout": {"groups": 2, "group_size": 2, "max_new_tokens": 3, "dynamic_sampling": True, "max_refills": 2}}


def test_dynamic_sampling_plays_on_until_every_group_has_contrast(
    tmp_path: Path, hesitant: Path, trainer_of: Callable[..., Trainer]
) -> None:
    trainer = played(tmp_path / "run", hesitant, [MIXED, WON, LOST, MIXED, MIXED], trainer_of, **DYNAMIC)
    metrics = trainer.iterate()
    assert (metrics["groups_dropped"], metrics["refills"]) == (2, 2)
    assert metrics["episodes"] == 8, "what was played is counted whole"
    assert [t.seed for t in trainer.last.batch.trajectories] == [0, 0, 3, 3]
    assert len(read_jsonl(tmp_path / "run" / "trajectories" / "iteration-000000.jsonl")) == 8
    assert trainer.dealer.drawn == 4
    trainer.save()
    again = trainer_of(trainer.config, resume=True)
    assert [task.seed for task in again.dealer.deal(2, 1)] == [4, 5]


def test_dynamic_sampling_gives_up_after_its_refills_and_trains_on_what_it_has(
    tmp_path: Path, hesitant: Path, trainer_of: Callable[..., Trainer]
) -> None:
    trainer = played(tmp_path / "run", hesitant, [LOST, LOST, MIXED], trainer_of, **DYNAMIC)
    metrics = trainer.iterate()
    assert (metrics["groups_dropped"], metrics["refills"]) == (4, 2)
    assert [t.seed for t in trainer.last.batch.trajectories] == [2, 2]
    trainer = played(tmp_path / "none", hesitant, [], trainer_of, **DYNAMIC)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    assert trainer.iterate()["groups_dropped"] == 6
    assert all(map(torch.equal, before, trainer.model.parameters()))


def test_the_groups_of_a_batch_are_judged_by_their_raw_outcomes(
    golden: dict[str, Any], tmp_path: Path, hesitant: Path, trainer_of: Callable[..., Trainer]
) -> None:
    rewards, keep = golden["dapo"]["inputs"]["group_rewards"], golden["dapo"]["outputs"]["dynamic_sampling_keep"]
    plan = [[bool(r) for r in group] for group in rewards]
    rollout = {"groups": 3, "group_size": 4, "max_new_tokens": 3, "dynamic_sampling": True, "max_refills": 0}
    shaping = {"overlong_tokens": 1, "overlong_cache": 0}
    trainer = played(tmp_path / "run", hesitant, plan, trainer_of, rollout=rollout, shaping=shaping)
    trainer.iterate()
    kept = {t.seed for t in trainer.last.batch.trajectories}
    assert [seed in kept for seed in range(3)] == keep


def test_truncated_episodes_may_be_left_out(tmp_path: Path, warm: Path, trainer_of: Callable[..., Trainer]) -> None:
    trainer = trainer_of(run_config(tmp_path / "run", warm, outcome={"truncated": "excluded"}))
    metrics = trainer.iterate()
    assert not any(t.truncated for t in trainer.last.batch.trajectories)
    assert metrics["truncated_excluded"] == metrics["truncated"] * metrics["episodes"] > 0
    assert metrics["episodes"] - metrics["truncated_excluded"] == trainer.last.batch.index.N


def test_held_out_tasks_stay_clear_of_refills(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"seeds 0 to 29 with"):
        run_config(
            tmp_path, tmp_path, rollout={"groups": 2, "dynamic_sampling": True, "max_refills": 4}, eval={"seed": 29}
        )
    config = run_config(tmp_path, tmp_path, rollout={"groups": 2}, eval={"seed": 29})
    assert config.training_seeds() == (0, 5)


def test_gathering_needs_no_trainer(tmp_path: Path, warm: Path) -> None:
    from agentrl.policy import load_policy
    from agentrl.rollout import Collector

    config = run_config(tmp_path, warm)
    teacher = load_policy("sokoban-noisy-solver", skill=0.5)
    with Collector(teacher, config.env, config.rollout, config.outcome) as collector:
        gathered = gather(collector, Dealer(config, drawn=7), config, 3)
    assert {t.seed for t in gathered.trajectories} == {7, 8}
    assert {t.group_id for t in gathered.trajectories} == {"000003-0000", "000003-0001"}
    assert gathered.trajectories == gathered.played.trajectories


def test_a_pool_that_deals_a_task_twice_does_not_play_it_twice_alike(
    tmp_path: Path, warm: Path, trainer_of: Callable[..., Trainer]
) -> None:
    rollout = {"groups": 2, "group_size": 4, "tasks": 2, "max_new_tokens": 3, "history": "window(0)"}
    trainer = trainer_of(run_config(tmp_path / "run", warm, rollout=rollout | {"dynamic_sampling": True}))
    trainer.config.rollout.max_refills = 3
    played: dict[tuple[int, str], list[str]] = {}
    while not any(len({g for s, g in played if s == seed}) > 1 for seed, _ in played):
        trainer.iterate()
        path = tmp_path / "run" / "trajectories" / f"iteration-{trainer.iteration - 1:06d}.jsonl"
        played = {}
        for t in read_jsonl(path):
            played.setdefault((t.seed, t.group_id), []).append(" ".join(turn.action for turn in t.turns))
    twice = next(seed for seed, _ in played if len({g for s, g in played if s == seed}) > 1)
    plays = [episodes for (seed, _), episodes in played.items() if seed == twice]
    assert plays[0] != plays[1]


def test_unit_advantages_change_the_scale_alone(tmp_path: Path, warm: Path, trainer_of: Callable[..., Trainer]) -> None:
    norms = {}
    for scale in (False, True):
        update = {"lr": 1e-3, "unit_advantage": scale, "grad_clip": 1e9}
        trainer = trainer_of(run_config(tmp_path / str(scale), warm, credit__method="rloo", policy_update=update))
        norms[scale] = trainer.iterate()["policy_grad_norm"]
        spread = float(trainer.last.advantage.token.std())
    assert norms[True] == pytest.approx(norms[False] / spread, rel=1e-4)
