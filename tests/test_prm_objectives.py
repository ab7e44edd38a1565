"""What the PRM learns: cross-entropy of outcomes (PRIME), and that a PRM under either objective truly learns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import (
    action_ids,
    difference,
    episodes,
    flat_gradient,
    flat_parameters,
    per_turn,
    perturbed,
    plain_logp,
    played_by,
    trajectory,
    turn,
)

from agentrl.batch import build_batch, score, score_microbatch
from agentrl.batch.index import segment_sum
from agentrl.buffer.pairs import preference_pairs
from agentrl.config import PairConfig, PRMConfig
from agentrl.errors import AgentRLError, NonFiniteError
from agentrl.prm import ImplicitPRM, LabelObjective, PairObjective, PairTensors, ce_loss, label_accuracy, make_objective
from agentrl.prm import implicit as implicit_module
from agentrl.types import StopReason

ALL = 10**6


def make(model, policy, budget=ALL, temperature=1.0, seed=0, **config):
    config = {"lr": 1e-3, "grad_clip": 1e9, "loss": "ce"} | config
    return ImplicitPRM(
        model, policy, PRMConfig(**config), PairConfig(), budget=budget, temperature=temperature, seed=seed
    )


def step(prm, made, policy, replay=(), iteration=0):
    outcome = torch.tensor([t.outcome for t in made], dtype=torch.float64)
    return prm.step(build_batch(made), outcome, policy, list(replay), iteration)


def labels(made):
    return torch.tensor([t.success for t in made], dtype=torch.bool)


def ended(made, success):
    """The episodes, all of them ended alike."""
    return [t.model_copy(update={"outcome": float(success), "success": success}) for t in made]


def of_another_batch(made):
    return [t.model_copy(update={"group_id": "old" + t.group_id, "id": "old" + t.id}) for t in made]


# --- the loss ---


def test_cross_entropy_is_that_of_the_specification(golden):
    prime = golden["prime"]
    scores = torch.tensor([prime["inputs"]["beta"] * sum(row) for row in prime["inputs"]["log_ratio_tokens"]])
    loss = ce_loss(scores.double(), torch.tensor(prime["inputs"]["outcome"]))
    assert float(loss) == pytest.approx(prime["outputs"]["prm_ce_loss"], abs=1e-6)


@pytest.mark.parametrize("turns", [1, 2])
def test_the_two_pass_update_has_that_loss_however_turns_cut_the_tokens(golden, model, turns):
    """Tokens of all turns of a trajectory make its one score."""
    inputs = golden["prime"]["inputs"]
    made = []
    for n, (row, outcome) in enumerate(zip(inputs["log_ratio_tokens"], inputs["outcome"], strict=True)):
        cut = [len(row)] if turns == 1 else [1, len(row) - 1]
        steps = [turn([5], [7] * length, new_row=not t) for t, length in enumerate(cut)]
        made.append(trajectory(f"{n}", "g", outcome, steps))
    prm, batch = make(model, None, beta=inputs["beta"]), build_batch(made)
    log_ratio = torch.tensor(list(itertools.chain(*inputs["log_ratio_tokens"])), dtype=torch.float64)
    objective = make_objective("ce", made, torch.zeros(3), PairTensors.of([]))
    loss, weight = prm.token_weights(batch, objective, log_ratio)
    assert loss == pytest.approx(golden["prime"]["outputs"]["prm_ce_loss"], abs=1e-6)
    scores = prm.trajectory_scores(batch, log_ratio)
    by_hand = (torch.sigmoid(scores) - labels(made).double()) / 3
    torch.testing.assert_close(weight, inputs["beta"] * by_hand[batch.index.traj_of_token])


def test_cross_entropy_does_not_overflow_and_label_accuracy_takes_the_half_as_no():
    scores = torch.tensor([-1e4, 1e4, 0.0, 1e-9], dtype=torch.float64, requires_grad=True)
    success = torch.tensor([True, False, False, True])
    loss = ce_loss(scores, success)
    loss.backward()
    assert float(loss.detach()) == pytest.approx((2e4 + 2 * 0.693147) / 4, rel=1e-6)
    assert torch.isfinite(scores.grad).all()
    assert label_accuracy(scores, success) == 0.5


# --- the gradient ---


def autograd_loss(model, policy, made, *, reference, score="sum", centred=False, temperature=1.0):
    """The loss over all trajectories at once, by the formulas alone: one plain full-logits call per turn."""
    chosen = action_ids(made)[:, None]

    def s(lm):
        logp = plain_logp(lm, made, temperature)
        mine = logp.gather(-1, chosen)[:, 0]
        if centred:
            mine = mine - (plain_logp(policy, made, temperature).exp().detach() * logp).sum(-1)
        return mine

    log_ratio = s(model) - s(reference).detach()
    parts = []
    start = 0
    for t in made:
        total = 0.3 * log_ratio[start : start + t.action_tokens].sum()
        if score == "mean":
            total = total / len(t.turns)
        likely = torch.sigmoid(total)
        parts.append(-torch.log(likely if t.success else 1 - likely))
        start += t.action_tokens
    return torch.stack(parts).mean()


@pytest.mark.parametrize("reference", ["behaviour", "frozen"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("score", ["sum", "mean"])
def test_two_passes_give_the_gradient_of_plain_autograd_for_every_micro_batch(model, score, centred, reference):
    """Micro-batches of one row, of three, and of all (`test_prm` shows that these budgets make them)."""
    model.double()
    initial, policy = perturbed(model, seed=1), perturbed(model, seed=2)
    made = played_by(policy, episodes(0, groups=2, size=3, turns=3), 0.8)
    judge = policy if reference == "behaviour" else initial
    settings = {"score": score, "centred": centred, "temperature": 0.8}
    expected = autograd_loss(model, policy, made, reference=judge, **settings)
    expected.backward()
    theirs = flat_gradient(model)
    model.zero_grad()
    rows = sorted(map(len, build_batch(made).rows))
    for budget in (1, sum(rows[-3:]), ALL):
        prm = make(perturbed(model, 0), initial, budget=budget, beta=0.3, reference=reference, **settings)
        _, metrics = step(prm, made, policy)
        assert metrics["prm_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
        assert difference(flat_gradient(prm.model), theirs) < 1e-6


def test_packed_and_per_turn_layouts_train_the_prm_alike(model):
    model.double()
    policy = perturbed(model)
    made = played_by(policy, episodes(2))
    gradients = []
    for layout in (made, per_turn(made)):
        prm = make(perturbed(model, 0), model)
        step(prm, layout, policy)
        gradients.append(flat_gradient(prm.model))
    assert difference(*gradients) < 1e-6


@pytest.mark.parametrize("loss", ["ce", "dpo", "ipo"])
def test_the_order_of_trajectories_changes_nothing(model, loss):
    model.double()
    policy = perturbed(model)
    made = played_by(policy, episodes(3))
    shuffled = [made[n] for n in np.random.default_rng(0).permutation(len(made))]
    found = []
    for order in (made, shuffled):
        prm = make(perturbed(model, 0), model, loss=loss)
        reward, metrics = step(prm, order, policy)
        by_id = dict(zip([t.id for t in order], reward.split([t.action_tokens for t in order]), strict=True))
        found.append((metrics, flat_gradient(prm.model), torch.cat([by_id[t.id] for t in made])))
    (a, gradient_a, reward_a), (b, gradient_b, reward_b) = found
    assert a == pytest.approx(b, rel=1e-5)
    assert difference(gradient_b, gradient_a) < 1e-6
    torch.testing.assert_close(reward_b, reward_a, atol=1e-5, rtol=0)


def test_what_is_said_of_episodes_that_cannot_count_is_not_heard(model):
    """Trajectories without action tokens or scorable end, and context tokens, which are not the agent's."""
    model.double()
    policy = perturbed(model)
    made = played_by(policy, episodes(4))
    junk = played_by(policy, episodes(5, groups=1, size=2))
    odd = [
        trajectory("silent", "g0", 1.0, [turn([3], [])]),
        *[t.model_copy(update={"stop_reason": StopReason.DEADLINE, "outcome": 9.0, "success": True}) for t in junk],
    ]
    gradients = []
    for batch in (made, [*odd, *made]):
        prm = make(perturbed(model, 0), model)
        _, metrics = step(prm, batch, policy)
        assert metrics["prm_labels"] == len(made)
        gradients.append(flat_gradient(prm.model))
    assert difference(*gradients) < 1e-6


def test_tokens_below_the_floor_are_masked_whatever_their_ratio(model):
    """A behaviour log-prob far below the floor would be a huge ratio, were it heard."""
    model.double()
    policy = perturbed(model)
    made = played_by(policy, episodes(6))
    found = []
    for junk in (-50.0, -1000.0):
        noisy = [
            t.model_copy(
                update={
                    "turns": [s.model_copy(update={"action_logprobs": [junk, *s.action_logprobs[1:]]}) for s in t.turns]
                }
            )
            for t in made
        ]
        prm = make(perturbed(model, 0), model, min_probability=1e-15)
        reward, metrics = step(prm, noisy, policy)
        found.append((reward, metrics["prm_loss"], flat_gradient(prm.model)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][2], found[1][2])


# --- what an objective looks at ---


def test_groups_of_one_outcome_teach_cross_entropy_and_no_pair_loss(model):
    made = played_by(model, ended(episodes(7), False))
    for loss, steps in (("ce", 1), ("dpo", 0), ("ipo", 0)):
        prm = make(perturbed(model, 0), model, loss=loss)
        before = flat_parameters(prm.model)
        _, metrics = step(prm, made, model)
        assert metrics["prm_steps"] == prm.updates == steps
        assert torch.equal(before, flat_parameters(prm.model)) == (steps == 0)
    assert "pair_accuracy" not in metrics


@pytest.mark.parametrize("success", [True, False])
def test_groups_of_one_outcome_move_all_scores_its_way(model, success):
    made = played_by(perturbed(model), ended(episodes(8), success))
    prm = make(model, None, updates=10, beta=0.5)
    reward, metrics = step(prm, made, model)
    index = build_batch(made).index
    scores = segment_sum(reward, index.traj_of_token, index.N)
    assert label_accuracy(scores, labels(made)) == 1.0 > metrics["prm_label_accuracy"]


@pytest.mark.parametrize("made", [[], [trajectory("a", "g", 1.0, [turn([1], [])]), trajectory("b", "g", 0.0, [])]])
def test_a_batch_without_action_tokens_teaches_nothing(model, made):
    reward, metrics = step(make(perturbed(model, 0), model, updates=2), made, model)
    assert reward.shape == (0,)
    assert (metrics["prm_labels"], metrics["prm_steps"]) == (0, 0)
    assert "prm_label_accuracy" not in metrics


def test_restricting_an_objective_keeps_what_it_says_of_those_that_stay():
    made = episodes(9, groups=3, size=5)
    outcome = torch.tensor([t.outcome for t in made], dtype=torch.float64)
    scores = torch.randn(len(made), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = [n for n, t in enumerate(made) if t.group_id != "g1"]
    part = [made[n] for n in kept]
    for kind in ("dpo", "ipo", "ce"):
        whole = make_objective(kind, made, outcome, PairTensors.of(preference_pairs(made)))
        alone = make_objective(kind, part, outcome[kept], PairTensors.of(preference_pairs(part)))
        cut = whole.restrict(kept)
        assert cut.members == alone.members
        assert cut.size() == alone.size() != whole.size()
        assert float(cut.loss(scores[kept])) == float(alone.loss(scores[kept])) != float(whole.loss(scores))
        assert whole.restrict([]).members == []


def test_the_setting_chooses_the_objective():
    made = episodes(10)
    pairs = PairTensors.of(preference_pairs(made))
    outcome = torch.tensor([t.outcome for t in made])
    assert isinstance(make_objective("ce", made, outcome, pairs), LabelObjective)
    assert [make_objective(kind, made, outcome, pairs).kind for kind in ("dpo", "ipo")] == ["dpo", "ipo"]
    assert isinstance(make_objective("dpo", made, outcome, pairs), PairObjective)


# --- one iteration ---


@pytest.mark.parametrize("order", ["update_then_score", "score_then_update"])
@pytest.mark.parametrize("reference", ["behaviour", "frozen", "rebase"])
def test_rewards_come_from_the_prm_after_or_before_its_update_against_either_reference(model, order, reference):
    policy, initial = perturbed(model, seed=1), perturbed(model, seed=2)
    made = played_by(policy, episodes(11))
    batch = build_batch(made)
    prm = make(model, initial, order=order, reference=reference, beta=0.2, lr=1e-2)
    before = score(model, batch, budget=ALL).logprob
    against = batch.behaviour if reference == "behaviour" else score(initial, batch, budget=ALL).logprob
    reward, metrics = step(prm, made, policy)
    after = score(model, batch, budget=ALL).logprob
    assert difference(before, after) > 1e-3
    phi = after if order == "update_then_score" else before
    torch.testing.assert_close(reward, 0.2 * (phi - against), atol=1e-6, rtol=1e-5)
    assert ("pair_accuracy_after" in metrics) == (order == "update_then_score")


def test_health_is_measured_before_the_update_on_the_new_batch_alone(model):
    policy = perturbed(model)
    made, old = played_by(policy, episodes(12)), of_another_batch(played_by(policy, episodes(13)))
    prm = make(perturbed(model, 0), policy, beta=0.5, lr=0.05)
    batch = build_batch(made)
    log_ratio = score(prm.model, batch, budget=ALL).logprob - batch.behaviour
    scores = 0.5 * segment_sum(log_ratio, batch.index.traj_of_token, batch.index.N)
    _, metrics = step(prm, made, policy, replay=old)
    right = [(float(q) > 0) == t.success for q, t in zip(scores, made, strict=True)]
    assert metrics["prm_label_accuracy"] == pytest.approx(sum(right) / len(made))
    assert 0 < sum(right) < len(made)
    gaps = [float(scores[p.winner] - scores[p.loser]) for p in preference_pairs(made)]
    assert metrics["pair_accuracy"] == pytest.approx(sum(gap > 0 for gap in gaps) / len(gaps))
    assert metrics["prm_labels"] == len(made) + len(old)


def test_replayed_trajectories_enter_the_loss_with_their_own_behaviour_log_probs(model):
    model.double()
    policy, older = perturbed(model, seed=1), perturbed(model, seed=2)
    new = played_by(policy, ended(episodes(14), False))
    old = of_another_batch(played_by(older, ended(episodes(15), True)))
    replayed, together, alone = (make(perturbed(model, 0), policy) for _ in range(3))
    step(replayed, new, policy, replay=old)
    step(together, [*new, *old], policy)
    step(alone, new, policy)
    assert difference(flat_gradient(replayed.model), flat_gradient(together.model)) < 1e-6
    assert difference(flat_gradient(replayed.model), flat_gradient(alone.model)) > 1e-2


def test_groups_per_update_draws_groups_of_one_outcome_too(model):
    seen = []
    prm = make(perturbed(model, 0), model, updates=12, groups_per_update=2)
    inner = prm.update

    def update(batch, *args):
        seen.append(frozenset(t.group_id for t in batch.trajectories))
        return inner(batch, *args)

    prm.update = update
    made = episodes(16, groups=5)
    made = [t if t.group_id != "g3" else ended([t], True)[0] for t in made]
    step(prm, played_by(model, made), model)
    assert [len(groups) for groups in seen] == [2] * 12
    assert frozenset.union(*seen) == {f"g{n}" for n in range(5)}


def test_updates_stop_when_the_loss_on_held_out_groups_rises(model):
    """Outcomes at random: what is learned of some groups is memorised and cannot help the others."""
    made = played_by(model, episodes(17, groups=6, turns=2))
    prm = make(perturbed(model, 0), model, updates=25, holdout=0.5, lr=1e-2, beta=1.0)
    _, metrics = step(prm, made, model)
    assert 1 <= metrics["prm_steps"] == prm.updates < 25
    assert metrics["prm_holdout_loss"] > 0


def test_a_prm_that_is_not_finite_is_an_error_before_it_learns(model):
    made = played_by(model, episodes(18))
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    prm = make(model, perturbed(model, 0))
    with pytest.raises(NonFiniteError, match="PRM"):
        step(prm, made, model)
    assert prm.updates == 0


# --- it learns, and would be caught if it did not ---


def toy(policy, iteration):
    """A new batch that is separable: winners say even ids and losers odd ones, whatever the length and the context."""
    made = []
    for t in episodes(1000 + iteration, groups=6, size=6, turns=3, prompt=3, vocab=32):
        steps = [
            s.model_copy(update={"action_ids": [i // 2 * 2 + (not t.success) for i in s.action_ids]}) for s in t.turns
        ]
        made.append(t.model_copy(update={"turns": steps}))
    return played_by(policy, made)


def learn(model, loss, iterations=20):
    """Trains a PRM on toy batches; returns its metrics on each batch before it learned from it."""
    policy = perturbed(model, 0)
    prm = make(model, policy, loss=loss, beta=0.5, lr=1e-2, grad_clip=10.0, order="score_then_update")
    return [step(prm, toy(policy, iteration), policy, iteration=iteration)[1] for iteration in range(iterations)]


def assert_learned(history):
    """The check that a dead PRM must not pass: above 0.9 on the pairs of batches that it has not seen."""
    late = history[-5:]
    accuracy = sum(m["pair_accuracy"] for m in late) / len(late)
    assert accuracy > 0.9, f"pair accuracy on new batches is {accuracy:.2f}"


@pytest.mark.parametrize("loss", ["dpo", "ce"])
def test_pair_accuracy_on_new_batches_rises_above_nine_tenths(model, loss):
    before = flat_parameters(model)
    history = learn(model, loss)
    assert_learned(history)
    assert history[0]["pair_accuracy"] < 0.7, "at the start it knows nothing"
    assert all(m["prm_moved"] > 0 for m in history)
    assert not torch.equal(before, flat_parameters(model))
    if loss == "ce":
        assert sum(m["prm_label_accuracy"] for m in history[-5:]) / 5 > 0.9


def detached(model, micro, **options):
    """The released code's fault (algorithms.md 1.6, 1): scores are detached, then made a leaf that needs gradients."""
    scores = score_microbatch(model, micro, **options)
    return scores._replace(logprob=scores.logprob.detach().requires_grad_(True))


@pytest.mark.parametrize("loss", ["dpo", "ipo", "ce"])
def test_a_prm_that_no_gradient_reaches_is_an_error(model, monkeypatch, loss):
    monkeypatch.setattr(implicit_module, "score_microbatch", detached)
    with pytest.raises(AgentRLError, match="no gradient reaches"):
        learn(model, loss, iterations=1)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "ce"])
def test_a_prm_whose_rate_is_too_small_to_move_it_is_an_error(model, loss):
    prm = make(model, None, loss=loss, lr=1e-30)
    with pytest.raises(AgentRLError, match=r"prm\.lr=1e-30 too small"):
        step(prm, toy(perturbed(model, 0), 0), perturbed(model, 0))


@pytest.mark.parametrize("loss", ["dpo", "ce"])
def test_without_that_guard_the_accuracy_test_would_find_it(model, monkeypatch, loss):
    monkeypatch.setattr(implicit_module, "score_microbatch", detached)
    monkeypatch.setattr(implicit_module, "SLOPE_FLOOR", float("inf"))
    history = learn(model, loss)
    assert len(history) == 20
    with pytest.raises(AssertionError, match="pair accuracy on new batches"):
        assert_learned(history)
