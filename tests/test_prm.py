"""The implicit PRM: exact gradients whatever the micro-batches, and parameters that truly move."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    Bandit,
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

from agentrl.batch import build_batch, score
from agentrl.batch.index import segment_sum
from agentrl.buffer.pairs import preference_pairs
from agentrl.config import PairConfig, PRMConfig
from agentrl.errors import NonFiniteError
from agentrl.prm import ImplicitPRM, PairTensors, pair_accuracy, pair_loss
from agentrl.prm.replay import _held

ALL = 10**6


def outcomes(made):
    return torch.tensor([t.outcome for t in made], dtype=torch.float64)


def make(model, policy, pairs=None, budget=ALL, temperature=1.0, seed=0, **config):
    config = {"lr": 1e-3, "grad_clip": 1e9} | config
    return ImplicitPRM(
        model, policy, PRMConfig(**config), pairs or PairConfig(), budget=budget, temperature=temperature, seed=seed
    )


def step(prm, made, policy, replay=(), iteration=0):
    return prm.step(build_batch(made), outcomes(made), policy, list(replay), iteration)


# --- the gradient ---


def small():
    return episodes(0, groups=2, size=3, turns=3)


def autograd_loss(
    model, policy, made, *, reference, score="sum", loss="dpo", centred=False, temperature=1.0, floor=0.0
):
    """The PRM's loss over all pairs at once, by the formulas alone: one plain full-logits call per turn."""
    chosen = action_ids(made)[:, None]

    def s(lm):
        logp = plain_logp(lm, made, temperature)
        mine = logp.gather(-1, chosen)[:, 0]
        if centred:
            mine = mine - (plain_logp(policy, made, temperature).exp().detach() * logp).sum(-1)
        return mine

    log_ratio = s(model) - s(reference).detach()
    log_ratio = log_ratio * (plain_logp(policy, made, temperature).gather(-1, chosen)[:, 0].exp() >= floor)
    total = []
    start = 0
    for t in made:
        total.append(0.3 * log_ratio[start : start + t.action_tokens].sum())
        if score == "mean":
            total[-1] = total[-1] / len(t.turns)
        start += t.action_tokens
    parts = []
    for pair in preference_pairs(made, PairConfig()):
        gap = total[pair.winner] - total[pair.loser]
        if loss == "dpo":
            parts.append(-torch.log(torch.sigmoid(gap)))
        else:
            parts.append((gap - (made[pair.winner].outcome - made[pair.loser].outcome)) ** 2)
    assert len(parts) > 3
    return torch.stack(parts).mean()


@pytest.mark.parametrize("reference", ["behaviour", "frozen"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("loss", ["dpo", "ipo"])
@pytest.mark.parametrize("score", ["sum", "mean"])
def test_two_passes_give_the_gradient_of_plain_autograd_for_every_micro_batch(model, score, loss, centred, reference):
    temperature = 0.8
    model.double()
    initial, policy = perturbed(model, seed=1), perturbed(model, seed=2)
    made = played_by(policy, small(), temperature)
    judge = policy if reference == "behaviour" else initial
    settings = {"score": score, "loss": loss, "centred": centred, "temperature": temperature}
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


def test_tokens_that_the_policy_all_but_excludes_carry_no_reward_and_no_gradient(model):
    model.double()
    policy = perturbed(model)
    made = played_by(policy, small())
    behaviour = build_batch(made).behaviour
    floor = float(behaviour.exp().median()) * 1.01
    expected = autograd_loss(model, policy, made, reference=policy, floor=floor)
    expected.backward()
    prm = make(perturbed(model, 0), policy, budget=50, beta=0.3, min_probability=floor)
    reward, metrics = step(prm, made, policy)
    assert metrics["prm_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert difference(flat_gradient(prm.model), flat_gradient(model)) < 1e-6
    known = behaviour.exp() >= floor
    assert 0 < known.sum() < len(known)
    assert torch.equal(reward != 0, known)


def test_the_budgets_of_that_test_give_one_three_and_all_rows():
    batch = build_batch(small())
    rows = sorted(map(len, batch.rows))
    largest = [max(len(m.plan.lengths) for m in batch.microbatches(budget)) for budget in (1, sum(rows[-3:]), ALL)]
    assert largest[0] == 1
    assert 3 <= largest[1] < len(rows)
    assert largest[2] == len(rows)


def test_pair_weights_enter_loss_and_gradient(model):
    """With a mean per group, a group with many pairs weighs no more than one with few."""
    model.double()
    made = [t for t in episodes(1, groups=2, size=5) if t.group_id == "g0" or t.id in ("1.0", "1.1")]
    prm = make(perturbed(model, 0), model, PairConfig(per_group_mean=True))
    _, metrics = step(prm, played_by(perturbed(model), made), model)
    halves = []
    for group in ("g0", "g1"):
        part = make(perturbed(model, 0), model)
        members = [t for t in made if t.group_id == group]
        _, single = step(part, played_by(perturbed(model), members), model)
        halves.append((single["prm_loss"], flat_gradient(part.model)))
    assert metrics["pairs"] > 2
    assert metrics["prm_loss"] == pytest.approx(sum(loss for loss, _ in halves) / 2, rel=1e-6)
    assert difference(flat_gradient(prm.model), sum(gradient for _, gradient in halves) / 2) < 1e-6


def test_packed_and_per_turn_layouts_train_the_prm_alike(model):
    model.double()
    policy = perturbed(model)
    made = played_by(policy, episodes(2))
    results = []
    for layout in (made, per_turn(made)):
        for centred in (False, True):
            prm = make(perturbed(model, 0), model, centred=centred)
            reward, metrics = step(prm, layout, policy)
            results.append((reward, metrics, flat_gradient(prm.model)))
    for packed, turns in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(packed[0], turns[0], atol=1e-5, rtol=0)
        assert packed[1] == pytest.approx(turns[1], abs=1e-5)
        assert difference(packed[2], turns[2]) < 1e-6


def test_losses_and_accuracy_of_pairs():
    pairs = PairTensors(torch.tensor([0, 0, 2]), torch.tensor([1, 2, 1]), torch.tensor([1.0, 2.0, 1.0]).double())
    scores = torch.tensor([1.0, -1000.0, 1.0], dtype=torch.float64, requires_grad=True)
    loss = pair_loss(scores, pairs)
    assert float(loss.detach()) == pytest.approx(2 * 0.693147 / 4, abs=1e-6)
    assert pair_accuracy(scores, pairs) == pytest.approx(2.5 / 3), "a tie counts one half"
    backwards = pair_loss(-scores, pairs)
    backwards.backward()
    assert torch.isfinite(backwards), "log-sigmoid does not underflow"
    assert torch.isfinite(scores.grad).all()


# --- updates ---


def test_parameters_move_after_an_update_with_pairs(model):
    made = played_by(model, episodes(3))
    prm = make(perturbed(model, 0), model)
    before = flat_parameters(prm.model)
    _, metrics = step(prm, made, model)
    assert not torch.equal(before, flat_parameters(prm.model))
    assert metrics["prm_grad_norm"] > 0
    assert metrics["prm_moved"] > 0
    assert metrics["prm_steps"] == prm.updates == 1


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_parameters_rest_where_no_group_has_a_pair(model, outcome):
    made = [t.model_copy(update={"outcome": outcome, "success": outcome > 0}) for t in episodes(4)]
    prm = make(perturbed(model, 0), model, updates=3, weight_decay=0.1)
    before = flat_parameters(prm.model)
    reward, metrics = step(prm, played_by(model, made), model)
    assert torch.equal(before, flat_parameters(prm.model))
    assert reward.abs().max() < 1e-5
    assert (metrics["pairs"], metrics["prm_steps"], prm.updates) == (0, 0, 0)


@pytest.mark.parametrize("made", [[], [trajectory("a", "g", 1.0, [turn([1], [])]), trajectory("b", "g", 0.0, [])]])
@pytest.mark.parametrize("centred", [False, True])
def test_a_batch_without_action_tokens_has_no_rewards(model, made, centred):
    reward, metrics = step(make(perturbed(model, 0), model, centred=centred), made, model)
    assert reward.shape == (0,)
    assert metrics["pairs"] == 0


@pytest.mark.parametrize("centred", [False, True])
def test_the_prm_learns_to_order_its_pairs_and_leaves_policy_and_reference_alone(model, centred):
    policy = perturbed(model)
    initial = perturbed(model, 0)
    made = played_by(policy, episodes(5, groups=2, turns=3))
    prm = make(model, initial, updates=20, lr=3e-3, reference="frozen", centred=centred)
    policy_before, reference_before = flat_parameters(policy), flat_parameters(prm.reference)
    reward, metrics = step(prm, made, policy)
    assert metrics["prm_steps"] == 20
    assert metrics["pair_accuracy_after"] == 1.0 > metrics["pair_accuracy"]
    index = build_batch(made).index
    scores = segment_sum(reward, index.traj_of_token, index.N)
    assert pair_accuracy(scores, PairTensors.of(preference_pairs(made))) == 1.0
    assert torch.equal(policy_before, flat_parameters(policy))
    assert torch.equal(reference_before, flat_parameters(prm.reference))
    assert all(p.grad is None for judge in (policy, initial, prm.reference) for p in judge.parameters())


@pytest.mark.parametrize("order", ["update_then_score", "score_then_update"])
def test_rewards_come_from_the_prm_after_or_before_its_update(model, order):
    """reward = beta (log phi - log behaviour), with phi as it was, or as it is now."""
    policy = perturbed(model)
    made = played_by(policy, episodes(6), temperature=0.7)
    batch = build_batch(made)
    prm = make(model, policy, order=order, beta=0.2, lr=1e-2, temperature=0.7)
    before = score(model, batch, budget=ALL, temperature=0.7).logprob
    reward, _ = step(prm, made, policy)
    after = score(model, batch, budget=ALL, temperature=0.7).logprob
    assert difference(before, after) > 1e-3
    phi = after if order == "update_then_score" else before
    torch.testing.assert_close(reward, 0.2 * (phi - batch.behaviour), atol=1e-6, rtol=1e-5)


def test_at_the_start_prm_and_policy_agree_and_every_reward_is_noise(model):
    made = played_by(model, episodes(7))
    for centred, reference in itertools.product((False, True), ("behaviour", "frozen")):
        prm = make(perturbed(model, 0), model, order="score_then_update", centred=centred, reference=reference)
        reward, metrics = step(prm, made, model)
        assert reward.abs().max() < 1e-6
        assert metrics["prm_steps"] == 1


@pytest.mark.parametrize("reference", ["behaviour", "frozen"])
def test_centred_token_rewards_have_no_expectation_under_the_policy(reference):
    """Summed exactly over the vocabulary; the plain rewards have minus beta KL, or worse."""
    policy, initial = Bandit([0.3, -1.0, 0.5, 2.0]), Bandit([0.0, 0.2, 0.4, -0.6])
    phi = Bandit([1.0, -2.0, 0.0, 0.5])
    p = policy.logits.detach().softmax(-1)
    arms = [trajectory(str(a), "g", a % 2, [turn([0], [a], [float(p[a].log())], new_row=True)]) for a in range(4)]
    expectation = {}
    for centred in (False, True):
        prm = make(Bandit(phi.logits.tolist()), initial, centred=centred, reference=reference, lr=0.1, beta=1.0)
        reward, metrics = step(prm, arms, policy)
        assert metrics["prm_steps"] == 1
        assert reward.std() > 0.1
        expectation[centred] = abs(float((p * reward).sum()))
    assert expectation[True] < 1e-6
    assert expectation[False] > 0.1


def test_health_is_measured_before_the_update_on_the_new_batch_alone(model):
    policy, new, old = perturbed(model), episodes(8), episodes(9)
    old = [t.model_copy(update={"group_id": "old" + t.group_id}) for t in old]
    made = played_by(policy, new)
    prm = make(perturbed(model, 0), policy, beta=0.5, lr=0.05)
    _, metrics = step(prm, made, policy, replay=played_by(policy, old))
    batch = build_batch(made)
    log_ratio = score(model, batch, budget=ALL).logprob - batch.behaviour
    index, pairs = batch.index, PairTensors.of(preference_pairs(made))
    scores = 0.5 * segment_sum(log_ratio, index.traj_of_token, index.N)
    assert metrics["pair_accuracy"] == pair_accuracy(scores, pairs)
    assert metrics["pair_accuracy_per_turn"] == pair_accuracy(scores / index.turns_per_traj, pairs)
    assert metrics["pair_accuracy_length"] == pair_accuracy(-index.turns_per_traj, pairs)
    assert metrics["pair_margin"] == pytest.approx(float((scores[pairs.winner] - scores[pairs.loser]).mean()), rel=1e-4)
    assert metrics["prm_drift"] == pytest.approx(-float(log_ratio.mean()), rel=1e-4)
    assert metrics["prm_skill"] == max(0.0, 2 * metrics["pair_accuracy_per_turn"] - 1)
    assert metrics["pairs"] == len(preference_pairs([*new, *old]))


# --- replay, hold-out, groups per update ---


def test_replayed_trajectories_enter_the_loss_with_their_own_behaviour_log_probs(model):
    model.double()
    policy, older = perturbed(model, seed=1), perturbed(model, seed=2)
    new = played_by(policy, episodes(10))
    old = [t.model_copy(update={"group_id": "old" + t.group_id}) for t in played_by(older, episodes(11))]
    replayed = make(perturbed(model, 0), policy)
    reward, _ = step(replayed, new, policy, replay=old)
    together = make(perturbed(model, 0), policy)
    step(together, [*new, *old], policy)
    assert difference(flat_gradient(replayed.model), flat_gradient(together.model)) < 1e-6
    assert len(reward) == build_batch(new).index.K
    alone = make(perturbed(model, 0), policy)
    step(alone, new, policy)
    assert difference(flat_gradient(replayed.model), flat_gradient(alone.model)) > 1e-2


def test_a_batch_without_pairs_still_learns_from_replay(model):
    new = [t.model_copy(update={"outcome": 0.0, "success": False}) for t in episodes(12)]
    old = [t.model_copy(update={"group_id": "old" + t.group_id}) for t in episodes(13)]
    prm = make(perturbed(model, 0), model)
    _, metrics = step(prm, played_by(model, new), model, replay=played_by(model, old))
    assert metrics["prm_steps"] == 1
    assert "pair_accuracy" not in metrics


def test_updates_stop_when_the_loss_on_held_out_groups_rises(model):
    """Random outcomes: what is learned of some groups is memorised and cannot help the others."""
    made = played_by(model, episodes(14, groups=6, turns=2))
    prm = make(perturbed(model, 0), model, updates=25, holdout=0.5, lr=1e-3, beta=1.0)
    _, metrics = step(prm, made, model)
    assert 1 <= metrics["prm_steps"] < 25
    assert metrics["prm_steps"] == prm.updates
    free = make(perturbed(model, 0), model, updates=25, lr=1e-3, beta=1.0)
    assert step(free, made, model)[1]["prm_steps"] == 25


def test_updates_go_on_while_the_held_out_loss_falls():
    """Every group says the same: arm 0 beats arm 1."""
    arms = [(g, a) for g in range(4) for a in range(2)]
    half = float(torch.tensor(0.5).log())
    made = [trajectory(f"{g}.{a}", f"g{g}", 1 - a, [turn([0], [a], [half], new_row=True)]) for g, a in arms]
    policy = Bandit([0.0, 0.0])
    prm = make(Bandit([0.0, 0.0]), policy, updates=20, holdout=0.5, lr=1e-2)
    _, metrics = step(prm, made, policy)
    assert metrics["prm_steps"] == 20
    assert metrics["prm_holdout_loss"] < 0.6931


def test_a_step_that_makes_the_held_out_loss_worse_than_before_it_is_the_last():
    """The held-out group says the opposite of the trained one, so that already the first step does harm."""
    half = float(torch.tensor(0.5).log())
    tried = 0
    for seed in range(20):
        made = []
        for g, a in itertools.product(range(2), range(2)):
            made.append(trajectory(f"{g}.{a}", f"g{g}", float(a == g), [turn([0], [a], [half], new_row=True)]))
        policy = Bandit([0.0, 0.0])
        prm = make(Bandit([0.0, 0.0]), policy, updates=20, holdout=0.5, lr=1e-2, seed=seed)
        if _held(prm, build_batch(made), 0) == _held(prm, build_batch(made), 1):
            continue
        tried += 1
        assert step(prm, made, policy)[1]["prm_steps"] == 1
    assert tried >= 4


def test_a_group_that_is_held_out_once_is_held_out_for_good():
    """Replay brings groups back: one that an update has seen must never judge a later one."""
    made = [trajectory(f"{g}", f"g{g}", 1.0, [turn([0], [0], new_row=True)]) for g in range(400)]
    prm = make(Bandit([0.0, 0.0]), Bandit([0.0, 0.0]), updates=2, holdout=0.25)
    first, later = build_batch(made), build_batch(made[::-1])
    held = {made[g].group_id for g in range(400) if _held(prm, first, g)}
    assert held == {made[::-1][g].group_id for g in range(400) if _held(prm, later, g)}
    assert 70 < len(held) < 130


def test_groups_per_update_draws_that_many_groups_anew_for_each_step(model):
    seen = []
    prm = make(perturbed(model, 0), model, updates=8, groups_per_update=2)
    inner = prm.update

    def update(batch, *args):
        seen.append(frozenset(t.group_id for t in batch.trajectories))
        return inner(batch, *args)

    prm.update = update
    step(prm, played_by(model, episodes(15, groups=5)), model)
    assert [len(groups) for groups in seen] == [2] * 8
    assert len(set(seen)) > 1
    assert len(frozenset.union(*seen)) > 2


# --- references ---


def test_rebase_moves_prm_and_reference_to_the_policy_every_so_often(model):
    """Scored before its update, a PRM that has just been moved gives no reward at all."""
    policy = perturbed(model, seed=3)
    made = played_by(policy, episodes(16))
    settings = {"reference": "rebase", "rebase_every": 3, "order": "score_then_update"}
    prm = make(perturbed(model, seed=1), perturbed(model, seed=2), beta=1.0, **settings)
    for iteration in range(5):
        old = flat_parameters(prm.reference)
        reward, metrics = step(prm, made, policy, iteration=iteration)
        assert metrics["prm_steps"] == 1
        if iteration == 3:
            assert torch.equal(flat_parameters(prm.reference), flat_parameters(policy))
            assert reward.abs().max() < 1e-5
        else:
            assert torch.equal(flat_parameters(prm.reference), old)
            assert reward.abs().max() > 1e-3


def test_a_frozen_reference_is_the_policy_of_the_start(model):
    policy = perturbed(model, 0)
    prm = make(perturbed(model, seed=1), policy, reference="frozen", order="score_then_update", beta=1.0)
    made = played_by(model, episodes(17))
    batch = build_batch(made)
    expected = score(prm.model, batch, budget=ALL).logprob - score(policy, batch, budget=ALL).logprob
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    reward, _ = step(prm, made, policy)
    torch.testing.assert_close(reward, expected, atol=1e-6, rtol=1e-5)


# --- state, faults ---


def test_a_restored_prm_goes_on_as_if_nothing_had_happened(model):
    made = played_by(model, episodes(18))
    settings = {"updates": 2, "groups_per_update": 2, "lr": 1e-2}
    unbroken = make(perturbed(model, 0), model, **settings)
    for iteration in range(2):
        step(unbroken, made, model, iteration=iteration)
    weights = {name: tensor.clone() for name, tensor in unbroken.model.state_dict().items()}
    state = unbroken.state_dict()
    state = {"optimizer": torch.load(_through_file(state["optimizer"])), "updates": state["updates"]}
    restored = make(perturbed(model, seed=5), model, **settings)
    restored.model.load_state_dict(weights)
    restored.load_state_dict(state)
    assert restored.updates == unbroken.updates == 4
    a = step(unbroken, made, model, iteration=2)
    b = step(restored, made, model, iteration=2)
    assert torch.equal(a[0], b[0])
    assert a[1] == b[1]
    assert torch.equal(flat_parameters(unbroken.model), flat_parameters(restored.model))


def _through_file(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_the_same_seed_and_iteration_give_the_same_step_and_others_do_not(model):
    made = played_by(model, episodes(19, groups=5))
    settings = {"groups_per_update": 1}

    def parameters(seed, iteration):
        prm = make(perturbed(model, 0), model, seed=seed, **settings)
        step(prm, made, model, iteration=iteration)
        return flat_parameters(prm.model)

    assert torch.equal(parameters(0, 0), parameters(0, 0))
    assert len({tuple(parameters(seed, it).tolist()) for seed, it in itertools.product(range(3), range(3))}) > 1


@pytest.mark.parametrize("order", ["update_then_score", "score_then_update"])
def test_a_prm_that_is_not_finite_is_an_error_before_it_learns(model, order):
    made = played_by(model, episodes(20))
    with torch.no_grad():
        next(iter(model.parameters())).fill_(float("nan"))
    prm = make(model, perturbed(model, 0), order=order)
    with pytest.raises(NonFiniteError, match=rf"trajectory {made[0].id}, turn 0: a log-prob of the PRM is nan"):
        step(prm, made, model)
    assert prm.updates == 0
