"""The engine's log-probs against the trainer's: measured always, corrected where asked for, left alone where equal."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import action_ids, difference, episodes, flat_gradient, perturbed, plain_logp, played_by
from hypothesis import given
from hypothesis import strategies as st
from toys import run_config

from agentrl.batch import build_batch, score
from agentrl.config import RunConfig
from agentrl.config.load import checked
from agentrl.config.schema import PolicyUpdateConfig
from agentrl.errors import AgentRLError, ConfigError
from agentrl.train.mismatch import compare, disagree, importance
from agentrl.train.policy_update import make_optimizer, update_policy
from agentrl.train.trainer import Trainer
from agentrl.types import Trajectory

Tensor = torch.Tensor
ALL = 10**6
CORRECTIONS: list[dict[str, Any]] = [
    {"tis": "token"},
    {"tis": "turn"},
    {"reject": "token"},
    {"reject": "turn_mean", "reject_low": 0.9, "reject_high": 1.2},
    {"tis": "turn", "reject": "turn", "tis_cap": 1.3},
]


def noisy(made: list[Trajectory], size: float, seed: int = 0) -> list[Trajectory]:
    """The episodes as an engine tells them whose log-probs are off by noise."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for t in made:
        turns = []
        for step in t.turns:
            off = (size * torch.randn(len(step.action_ids), generator=generator)).tolist()
            told = [p + e for p, e in zip(step.action_logprobs, off, strict=True)]
            turns.append(step.model_copy(update={"action_logprobs": told}))
        out.append(t.model_copy(update={"turns": turns}))
    return out


def some_advantage(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(3))


def update(model: Any, made: list[Trajectory], **options: Any) -> tuple[Tensor, dict[str, float]]:
    """Gradient of the last step, and metrics; the model is not changed."""
    model = copy.deepcopy(model)
    batch = build_batch(made)
    config = PolicyUpdateConfig(**{"lr": 1e-6, "grad_clip": 1e9} | options)
    metrics = update_policy(model, make_optimizer(model, config), batch, some_advantage(batch.index.K), config, seed=4)
    return flat_gradient(model), metrics


def by_hand(ours: Tensor, engine: Tensor, turn: Tensor, config: PolicyUpdateConfig) -> tuple[list[float], list[float]]:
    """Weights, and the ratios that decide about rejection, token by token from the formulas."""
    ratio: dict[str, list[float]] = {"token": [], "turn": [], "turn_mean": []}
    for k in range(len(ours)):
        mine = [float(ours[j] - engine[j]) for j in range(len(ours)) if turn[j] == turn[k]]
        ratio["token"].append(math.exp(ours[k] - engine[k]))
        ratio["turn"].append(math.exp(sum(mine)))
        ratio["turn_mean"].append(math.exp(sum(mine) / len(mine)))
    weight = [1.0] * len(ours) if config.tis == "none" else [min(r, config.tis_cap) for r in ratio[config.tis]]
    return weight, [1.0] * len(ours) if config.reject == "none" else ratio[config.reject]


# --- equal engines ---


@pytest.mark.parametrize("options", CORRECTIONS)
@pytest.mark.parametrize("parts", [{}, {"epochs": 2, "minibatches": 3}])
def test_where_engine_and_trainer_agree_a_correction_changes_no_bit(model: Any, options: Any, parts: Any) -> None:
    made = played_by(model, episodes(1))
    off, plain = update(model, made, **parts)
    on, metrics = update(model, made, **parts, **options)
    assert torch.equal(on, off)
    assert metrics["mismatch_corrected"] == 0
    assert "tis_weight" not in metrics
    for name in ("logprob_mismatch", "logprob_mismatch_mean", "mismatch_kl", "mismatch_outside"):
        assert metrics[name] == plain[name] == pytest.approx(0, abs=1e-5)


def test_the_check_reads_the_sample_and_no_more(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = build_batch(played_by(model, episodes(2, groups=5, size=4)))
    asked: list[list[int]] = []

    def counted(*arguments: Any, trajectories: Any, **options: Any) -> Any:
        asked.append(list(trajectories))
        return score(*arguments, trajectories=trajectories, **options)

    monkeypatch.setattr("agentrl.train.mismatch.score", counted)
    for share, size in ((0.1, 2), (0.01, 1), (1.0, 20)):
        config = PolicyUpdateConfig(tis="token", mismatch_sample=share)
        assert not disagree(model, batch, config, 1.0, list(range(20)), seed=0)
        assert len(set(asked[-1])) == size
    config = PolicyUpdateConfig(tis="token")
    drawn = {tuple(sorted(asked[-1])) for seed in range(6) if not disagree(model, batch, config, 1.0, range(20), seed)}
    assert len(drawn) > 1


def test_the_tolerance_is_in_nats(model: Any) -> None:
    made = played_by(model, episodes(3))
    for t in made:
        for step in t.turns:
            step.action_logprobs[0] += 0.01
    batch = build_batch(made)
    for tolerance, expected in ((0.011, False), (0.009, True)):
        config = PolicyUpdateConfig(tis="token", mismatch_tolerance=tolerance)
        assert disagree(model, batch, config, 1.0, range(len(made)), seed=0) is expected


# --- engines that differ ---


@pytest.mark.parametrize("options", CORRECTIONS)
@pytest.mark.parametrize("engine", ["noise", "one version old"])
def test_the_gradient_is_that_of_the_formula(model: Any, options: dict[str, Any], engine: str) -> None:
    """Against full logits, weights token by token and autograd; at the first step the update's own ratio is 1."""
    model.double()
    if engine == "noise":
        made = noisy(played_by(model, episodes(4, groups=2)), 0.5)
    else:
        made = played_by(perturbed(model, 0.05), episodes(4, groups=2))
    index, told = build_batch(made).index, build_batch(made).behaviour.double()
    new = plain_logp(model, made).gather(-1, action_ids(made)[:, None])[:, 0]
    config = PolicyUpdateConfig(**options)
    weight, ratio = by_hand(new.detach(), told, index.turn_of_token, config)
    kept = [config.reject_low <= r <= config.reject_high for r in ratio]
    if "reject" in options:
        assert not all(kept)
    assert any(kept)
    scale = torch.tensor(weight, dtype=torch.float64) * torch.tensor(kept)
    # Unscaled: the mean is over all tokens, with neither the weights' sum nor the kept ones' number below.
    (-(scale * some_advantage(index.K).double() * new).sum() / index.K).backward()
    theirs = flat_gradient(model)
    model.zero_grad()
    ours, metrics = update(model, made, **options)
    assert difference(ours, theirs) < 1e-5
    assert metrics["mismatch_corrected"] == 1
    assert metrics["tokens_rejected"] == kept.count(False)
    assert metrics["tis_weight"] == pytest.approx(sum(weight) / index.K, rel=1e-5)
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)


def test_later_steps_take_their_ratio_from_the_trainer_s_own_log_probs(model: Any) -> None:
    """Without a rejection or a weight in the way, the clip works as if the engine had agreed all along."""
    agreed = played_by(model, episodes(5))
    parts = {"epochs": 3, "minibatches": 2, "lr": 1e-3}
    plain, _ = update(model, agreed, **parts)
    told = noisy(agreed, 0.3)
    keeps_all, metrics = update(model, told, **parts, reject="token", reject_low=0.0, reject_high=1e6)
    assert metrics["mismatch_corrected"] == 1
    assert metrics["tokens_rejected"] == 0
    assert difference(keeps_all, plain) < 1e-4
    uncorrected, _ = update(model, told, **parts)
    assert difference(uncorrected, plain) > 1e-2


@pytest.mark.parametrize("options", CORRECTIONS)
def test_one_step_and_its_own_forward_pass_give_what_a_pass_beforehand_gives(model: Any, options: Any) -> None:
    """With a tiny rate the last of two epochs stands where the first stood, its log-probs computed beforehand."""
    made = noisy(played_by(model, episodes(6)), 0.5)
    once, first = update(model, made, **options, lr=1e-12)
    twice, second = update(model, made, **options, lr=1e-12, epochs=2)
    assert difference(twice, once) < 1e-4
    for name in ("tis_weight", "tis_truncated", "tokens_rejected", "logprob_mismatch", "mismatch_kl"):
        assert first[name] == pytest.approx(second[name], rel=1e-4)


def test_rejected_tokens_carry_no_loss_of_any_kind(model: Any) -> None:
    made = noisy(played_by(model, episodes(7)), 0.5)
    rest = {"kl_coef": 0.0, "entropy_coef": 0.5, "reject_low": 0.999, "reject_high": 1.001}
    gradient, metrics = update(model, made, reject="turn", **rest)
    assert metrics["tokens_rejected"] == build_batch(made).index.K
    assert not gradient.any()


def test_the_micro_batch_does_not_matter(model: Any) -> None:
    made = noisy(played_by(model, episodes(8)), 0.5)
    for options in CORRECTIONS:
        whole, _ = update(model, made, **options)
        small, _ = update(model, made, **options, tokens_per_microbatch=16)
        assert difference(small, whole) < 1e-4


def off_at(made: list[Trajectory], at: int, nats: float) -> list[Trajectory]:
    """The episodes with all log-probs of one of them told wrong."""
    out = copy.deepcopy(made)
    for step in out[at].turns:
        step.action_logprobs = [told - nats for told in step.action_logprobs]
    return out


@pytest.mark.parametrize("parts", [{}, {"epochs": 2}, {"minibatches": 3}, {"epochs": 2, "minibatches": 12}])
def test_one_wrong_trajectory_is_seen_wherever_it_is(model: Any, parts: dict[str, int]) -> None:
    """In one step by its own forward pass; of several, all but the first are read when the model has moved."""
    made = played_by(model, episodes(9))
    corrected = 0.0
    for at in range(len(made)):
        told = off_at(made, at, 3.0)
        _, metrics = update(model, told, lr=1e-2, **parts)
        assert metrics["logprob_mismatch"] == pytest.approx(3, abs=1e-4)
        _, metrics = update(model, told, lr=1e-2, **parts, tis="token", mismatch_sample=0.01)
        assert metrics["logprob_mismatch"] == pytest.approx(3, abs=1e-4)
        corrected += metrics["mismatch_corrected"]
    assert corrected == (len(made) if "minibatches" in parts else 1), "a sample of one decides where all is one step"


def test_only_several_mini_batches_cost_a_pass_of_their_own(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(*arguments: Any, trajectories: Any, **options: Any) -> Any:
        asked.append(len(trajectories))
        return score(*arguments, trajectories=trajectories, **options)

    made = played_by(model, episodes(10))
    monkeypatch.setattr("agentrl.train.mismatch.score", counted)
    for options, passes in (
        ({}, []),
        ({"epochs": 3}, []),
        ({"minibatches": 2}, [12]),
        ({"tis": "token"}, [1]),
        ({"tis": "token", "epochs": 3}, [1]),
        ({"tis": "token", "minibatches": 2}, [12]),
    ):
        asked.clear()
        update(model, made, **options)
        assert asked == passes, options


def test_where_no_trajectory_carries_loss_nothing_is_said_about_agreement(model: Any) -> None:
    made = played_by(model, episodes(11))
    batch, config = build_batch(made), PolicyUpdateConfig(tis="token")
    optimizer, advantage = make_optimizer(model, config), some_advantage(batch.index.K)
    metrics = update_policy(model, optimizer, batch, advantage, config, trajectories=[])
    assert metrics["mismatch_corrected"] == 0
    assert not {name for name in metrics if "logprob" in name}


# --- pure functions ---


@given(
    st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0), st.integers(0, 3)), min_size=1, max_size=24),
    st.sampled_from(["none", "token", "turn"]),
    st.sampled_from(["none", "token", "turn", "turn_mean"]),
    st.floats(1.01, 10),
    st.floats(0, 0.99),
)
def test_weights_and_rejections_follow_the_formula_for_any_ratios(
    tokens: list[tuple[float, float, int]], tis: Any, reject: Any, cap: float, low: float
) -> None:
    ours, engine = (torch.tensor([t[i] for t in tokens], dtype=torch.float64) for i in (0, 1))
    turn = torch.tensor([t[2] for t in tokens])
    config = PolicyUpdateConfig(tis=tis, reject=reject, tis_cap=cap, reject_low=low)
    part = importance(ours, engine, turn, config)
    # exp(+-20) is where ratios end here, far beyond every bound.
    weight, ratio = by_hand(ours, engine, turn, config)
    assert part.weight.tolist() == pytest.approx([max(w, math.exp(-20)) for w in weight], rel=1e-6)
    assert ((part.weight > 0) & (part.weight <= (cap if tis != "none" else 1))).all()
    for kept, r in zip(part.kept.tolist(), ratio, strict=True):
        on_the_edge = any(math.isclose(r, edge, rel_tol=1e-9) for edge in (config.reject_low, config.reject_high))
        below = math.exp(-20) if r < math.exp(-20) else r
        assert on_the_edge or kept == (config.reject_low <= below <= config.reject_high)
    if reject != "none":
        for number in turn.unique():
            assert reject == "token" or len(set(part.kept[turn == number].tolist())) == 1
    if tis == "none":
        assert (part.weight == 1).all()
    if reject == "none":
        assert part.kept.all()


@given(st.lists(st.floats(-3, 3), max_size=20), st.floats(1.1, 5))
def test_a_mismatch_is_told_by_four_numbers(off: list[float], bound: float) -> None:
    engine = torch.full((len(off),), -2.0, dtype=torch.float64)
    told = compare(engine + torch.tensor(off, dtype=torch.float64), engine, bound)
    d = [float(x) for x in off]
    if not d:
        assert told == {}, "nothing compared is not agreement"
        return
    assert told["logprob_mismatch"] == pytest.approx(max(map(abs, d)))
    assert told["logprob_mismatch_mean"] == pytest.approx(sum(map(abs, d)) / len(d))
    assert told["mismatch_kl"] == pytest.approx(sum(math.exp(x) - 1 - x for x in d) / len(d), abs=1e-12)
    assert told["mismatch_kl"] >= -1e-12
    assert 0 <= told["mismatch_outside"] <= 1
    assert compare(engine, engine, bound) == dict.fromkeys(told, 0.0)


def test_the_k3_of_samples_tends_to_the_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    mu, pi = (torch.softmax(torch.randn(8, generator=generator), -1) for _ in range(2))
    drawn = torch.multinomial(mu, 200_000, replacement=True, generator=generator)
    exact = float((mu * (mu / pi).log()).sum())
    assert compare(pi.log()[drawn], mu.log()[drawn], 2.0)["mismatch_kl"] == pytest.approx(exact, rel=0.02)


# --- runs ---


def off_by(trainer: Trainer, nats: float) -> None:
    """Makes the engine of `trainer` tell log-probs that are wrong by `nats`."""
    plain = trainer.policy.sampler.sample  # type: ignore[attr-defined]

    def sample(*arguments: Any) -> Any:
        return [(ids, [p - nats for p in told], stopped) for ids, told, stopped in plain(*arguments)]

    trainer.policy.sampler.sample = sample  # type: ignore[attr-defined]


def test_a_run_stops_at_a_mismatch_that_nobody_asked_to_correct(
    warm: Path, tmp_path: Path, trainer_of: Callable[..., Trainer]
) -> None:
    trainer = trainer_of(run_config(tmp_path, warm))
    off_by(trainer, 0.2)
    with pytest.raises(AgentRLError, match=r"differ from the trainer's by 0\.2 nats.*policy_update\.tis"):
        trainer.iterate()


def test_a_run_that_corrects_goes_on_and_tells_the_numbers(
    warm: Path, tmp_path: Path, trainer_of: Callable[..., Trainer]
) -> None:
    trainer = trainer_of(run_config(tmp_path, warm, policy_update={"lr": 1e-3, "tis": "token", "reject": "token"}))
    agreed = trainer.iterate()
    assert agreed["mismatch_corrected"] == 0
    assert agreed["logprob_mismatch"] < 1e-4
    off_by(trainer, 0.2)
    metrics = trainer.iterate()
    assert metrics["mismatch_corrected"] == 1
    assert metrics["logprob_mismatch"] == pytest.approx(0.2, abs=1e-4)
    assert metrics["logprob_mismatch_mean"] == pytest.approx(0.2, abs=1e-4)
    assert metrics["tis_weight"] == pytest.approx(math.exp(0.2), rel=1e-3)
    assert metrics["mismatch_kl"] == pytest.approx(math.exp(0.2) - 1.2, rel=1e-2)
    assert metrics["mismatch_outside"] == metrics["tokens_rejected"] == 0


def test_a_mismatch_that_the_sample_missed_is_refused(
    warm: Path, tmp_path: Path, trainer_of: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(run_config(tmp_path, warm, policy_update={"lr": 1e-3, "tis": "token", "reject": "token"}))
    off_by(trainer, 0.2)
    monkeypatch.setattr("agentrl.train.policy_update.disagree", lambda *_: False)
    with pytest.raises(AgentRLError, match=r"differ from the trainer's by 0\.2 nats.*policy_update\.mismatch_sample=1"):
        trainer.iterate()


def test_while_only_the_critic_learns_the_mismatch_is_told_and_refused(
    warm: Path, tmp_path: Path, trainer_of: Callable[..., Trainer]
) -> None:
    critic = {"lr": 1e-3, "warmup_iterations": 2}
    settings: dict[str, Any] = {"credit__method": "ppo", "critic": critic}
    trainer = trainer_of(run_config(tmp_path / "a", warm, **settings))
    assert 0 < trainer.iterate()["logprob_mismatch"] < 1e-4
    off_by(trainer, 0.2)
    with pytest.raises(AgentRLError, match=r"differ from the trainer's by 0\.2 nats"):
        trainer.iterate()
    corrects = trainer_of(run_config(tmp_path / "b", warm, **settings, policy_update__tis="token"))
    off_by(corrects, 0.2)
    assert corrects.iterate()["logprob_mismatch"] == pytest.approx(0.2, abs=1e-4)


def test_a_run_without_a_trajectory_that_carries_loss_goes_on(
    warm: Path, tmp_path: Path, trainer_of: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(run_config(tmp_path, warm, policy_update__overlong_filter="any_limit"))
    monkeypatch.setattr("agentrl.train.trainer.trainable", lambda *_: [])
    metrics = trainer.iterate()
    assert metrics["overlong_filtered"] == metrics["episodes"]
    assert "logprob_mismatch" not in metrics


def test_truncated_sampling_while_training_is_refused_and_says_why() -> None:
    for settings in ({"top_p": 0.9}, {"top_k": 20}):
        with pytest.raises(ConfigError, match=r"no engine tells which tokens those were.*train with top_p=1, top_k=0"):
            checked(RunConfig, {"rollout": settings})
