"""The policy update: the loss is that of the whole mini-batch, whatever the micro-batches and the layout.

The worked numbers of clip, dual clip, ratios, aggregation and KL are in test_golden.
"""

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
from agentrl.config import PolicyUpdateConfig
from agentrl.errors import NonFiniteError
from agentrl.train.policy_loss import token_weights
from agentrl.train.policy_update import learning_rate, make_optimizer, update_policy

ALL = 10**6
AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "turn-mean"]
RATIOS = ["token", "turn", "turn_mean"]


def update(model, made, advantage=None, **settings):
    """One update of `model`; returns its gradient and metrics (the gradient is that of the last optimiser step)."""
    options = {name: settings.pop(name) for name in ("temperature", "reference", "seed") if name in settings}
    config = PolicyUpdateConfig(**{"lr": 1e-3, "grad_clip": 1e9, "tokens_per_microbatch": ALL} | settings)
    batch = build_batch(made)
    if advantage is None:
        advantage = some_advantage(batch.index.K)
    metrics = update_policy(model, make_optimizer(model, config), batch, advantage, config, **options)
    return flat_gradient(model), metrics


def some_advantage(size):
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def direct_loss(model, made, advantage, *, ratio, aggregation, low, high, dual, temperature):
    """The clipped surrogate turn by turn, from plain full-logits calls."""
    new = plain_logp(model, made, temperature).gather(-1, action_ids(made)[:, None])[:, 0]
    sequences, turns, k = [], [], 0
    for t in made:
        tokens = []
        for one in t.turns:
            n = len(one.action_ids)
            d = new[k : k + n] - torch.tensor(one.action_logprobs, dtype=new.dtype)
            d = {"token": d, "turn": d.sum().expand(n), "turn_mean": d.mean().expand(n)}[ratio] if n else d
            a, rho = advantage[k : k + n].to(new), d.exp()
            loss = torch.stack([-a * rho, -a * rho.clamp(1 - low, 1 + high)]).amax(0)
            if dual is not None:
                loss = torch.where(a < 0, torch.minimum(loss, -a * dual), loss)
            tokens.append(loss)
            if n:
                turns.append(loss.mean())
            k += n
        if tokens and sum(map(len, tokens)):
            sequences.append(torch.cat(tokens))
    return {
        "token-mean": torch.cat(sequences).mean(),
        "seq-mean-token-sum": torch.stack([s.sum() for s in sequences]).mean(),
        "seq-mean-token-mean": torch.stack([s.mean() for s in sequences]).mean(),
        "seq-mean-token-sum-norm": torch.stack([s.sum() / 7 for s in sequences]).mean(),
        "turn-mean": torch.stack(turns).mean(),
    }[aggregation]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_gradient_is_that_of_the_loss_written_out(model, ratio, aggregation):
    model.double()
    made = played_by(perturbed(model, 0.03), episodes(0, groups=2), temperature=0.8)
    made.insert(3, trajectory("no turns", "g0", 0.0, []))
    made[5] = made[5].model_copy(update={"turns": [*made[5].turns, turn([3, 1], [])]})
    advantage = some_advantage(build_batch(made).index.K)
    loss = direct_loss(
        model, made, advantage, ratio=ratio, aggregation=aggregation, low=0.15, high=0.25, dual=1.5, temperature=0.8
    )
    loss.backward()
    theirs = flat_gradient(model)
    model.zero_grad()
    settings = {"clip_low": 0.15, "clip_high": 0.25, "dual_clip": 1.5, "aggregation_length": 7, "temperature": 0.8}
    ours, metrics = update(model, made, advantage, ratio=ratio, aggregation=aggregation, **settings)
    assert metrics["policy_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert 0 < metrics["clip_fraction"] < 1
    assert difference(ours, theirs) < 1e-6


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_token_budget_changes_nothing(model, ratio, aggregation):
    model.double()
    made = played_by(perturbed(model, 0.03), episodes(1, groups=2))
    settings = {"ratio": ratio, "aggregation": aggregation, "kl_coef": 0.1, "entropy_coef": 0.1}
    reference = torch.full((build_batch(made).index.K,), -2.0)
    whole, metrics = update(perturbed(model, 0), made, reference=reference, **settings)
    for budget in (16, 70):
        part, same = update(perturbed(model, 0), made, reference=reference, tokens_per_microbatch=budget, **settings)
        assert difference(part, whole) < 1e-6
        assert same == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_both_layouts_have_the_same_gradient_whatever_the_aggregation(model):
    """Sequences are trajectories in either layout, so that even the seq-mean modes agree."""
    model.double()
    made = played_by(perturbed(model, 0.03), episodes(2))
    for aggregation in AGGREGATIONS:
        packed, metrics = update(perturbed(model, 0), made, aggregation=aggregation)
        turns, same = update(perturbed(model, 0), per_turn(made), aggregation=aggregation)
        assert difference(turns, packed) < 1e-6
        assert same == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_the_order_of_trajectories_changes_nothing(model):
    model.double()
    made = played_by(perturbed(model, 0.03), episodes(3))
    index = build_batch(made).index
    advantage = some_advantage(index.K)
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(4)).tolist()
    moved = torch.cat([advantage[index.traj_of_token == i] for i in order])
    straight, _ = update(perturbed(model, 0), made, advantage)
    mixed, _ = update(perturbed(model, 0), [made[i] for i in order], moved)
    assert difference(mixed, straight) < 1e-6


def test_kl_and_entropy_terms_add_their_own_gradients(model):
    """Against the terms written out on full logits; with advantage 0 they are all there is."""
    model.double()
    made = played_by(model, episodes(4, groups=2))
    initial = perturbed(model, 0.03)
    batch = build_batch(made)
    reference = score(initial, batch, budget=ALL).logprob
    none = torch.zeros(batch.index.K)
    for estimator, coefficients in itertools.product(("k1", "k2", "k3"), ((0.3, 0.0), (0.3, 0.2))):
        logp = plain_logp(model, made)
        x = logp.gather(-1, action_ids(made)[:, None])[:, 0] - reference
        kl = {"k1": x, "k2": x**2 / 2, "k3": torch.exp(-x) + x - 1}[estimator].mean()
        entropy = -(logp.exp() * logp).sum(-1).mean()
        model.zero_grad()
        (coefficients[0] * kl - coefficients[1] * entropy).backward()
        theirs = flat_gradient(model)
        ours, metrics = update(
            perturbed(model, 0),
            made,
            none,
            reference=reference,
            kl_estimator=estimator,
            kl_coef=coefficients[0],
            entropy_coef=coefficients[1],
        )
        assert difference(ours, theirs) < 1e-6
        assert metrics["entropy"] == pytest.approx(float(entropy.detach()), rel=1e-5)


def test_on_policy_the_ratio_is_one_and_the_gradient_is_reinforce(model):
    model.double()
    made = played_by(model, episodes(5, groups=2), temperature=0.7)
    advantage = some_advantage(build_batch(made).index.K)
    new = plain_logp(model, made, 0.7).gather(-1, action_ids(made)[:, None])[:, 0]
    (-(advantage * new).mean()).backward()
    theirs = flat_gradient(model)
    ours, metrics = update(perturbed(model, 0), made, advantage, temperature=0.7)
    assert difference(ours, theirs) < 1e-5
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["clip_fraction"] == 0
    assert metrics["kl_behaviour"] == pytest.approx(0, abs=1e-6)
    assert metrics["logprob_mismatch"] < 1e-5


def test_the_mismatch_is_the_largest_difference_before_the_first_step(model):
    made = played_by(model, episodes(6, groups=2))
    made[2].turns[0].action_logprobs[0] += 0.25
    _, metrics = update(model, made, lr=0.1, epochs=2)
    assert metrics["logprob_mismatch"] == pytest.approx(0.25, abs=1e-4)


def test_mini_batches_deal_out_every_trajectory_once_an_epoch(model):
    made = played_by(model, episodes(7))
    seen = []
    plain = type(build_batch(made)).microbatches

    def microbatches(self, budget, trajectories):
        seen.append(list(trajectories))
        return plain(self, budget, trajectories)

    batch = build_batch(made)
    batch.microbatches = microbatches.__get__(batch)
    config = PolicyUpdateConfig(lr=1e-4, epochs=2, minibatches=5)
    metrics = update_policy(model, make_optimizer(model, config), batch, some_advantage(batch.index.K), config, seed=3)
    assert metrics["policy_steps"] == 10
    assert seen.pop(0) == list(range(len(made))), "log-probs before the first step"
    assert sorted(map(len, seen[:5])) == [2, 2, 2, 3, 3]
    for epoch in (seen[:5], seen[5:]):
        assert sorted(itertools.chain(*epoch)) == list(range(len(made)))
    assert seen[:5] != seen[5:]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_mini_batch_is_a_batch_of_its_own(model, aggregation):
    """Its loss is normalised by its own counts. (The rate is so low that the weights stand still.)"""
    model.double()
    made = played_by(perturbed(model, 0.03), episodes(11, groups=2, size=3))
    index = build_batch(made).index
    advantage = some_advantage(index.K)
    last, _ = update(perturbed(model, 0), made, advantage, aggregation=aggregation, minibatches=3, lr=1e-15, seed=5)
    gradients = []
    for members in itertools.combinations(range(len(made)), 2):
        part = torch.cat([advantage[index.traj_of_token == i] for i in members])
        alone, _ = update(perturbed(model, 0), [made[i] for i in members], part, aggregation=aggregation)
        gradients.append(difference(alone, last))
    assert sum(error < 1e-6 for error in gradients) == 1


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_belong_to_the_mini_batch_and_ignore_what_holds_no_action(aggregation):
    made = episodes(8)
    config = PolicyUpdateConfig(aggregation=aggregation, aggregation_length=5)
    members = torch.tensor([0, 3, 7])
    index = build_batch(made).index
    weight = token_weights(index, config, members)
    inside = torch.isin(index.traj_of_token, members)
    assert torch.all(weight[~inside] == 0)
    alone = build_batch([made[i] for i in members]).index
    torch.testing.assert_close(weight[inside], token_weights(alone, config, torch.arange(3)))
    silent = turn([1], [])
    padded = [t.model_copy(update={"turns": [silent, *t.turns]}) for t in made]
    padded.append(trajectory("silent", "g0", 0.0, [silent]))
    index = build_batch(padded).index
    torch.testing.assert_close(token_weights(index, config, torch.cat([members, torch.tensor([len(made)])])), weight)
    if aggregation in ("token-mean", "seq-mean-token-mean", "turn-mean"):
        assert float(weight.sum()) == pytest.approx(1)


def test_an_update_raises_what_was_good_and_lowers_what_was_bad(model):
    made = played_by(model, episodes(9, groups=2))
    batch = build_batch(made)
    good = torch.arange(batch.index.K) % 2 == 0
    before = score(model, batch, budget=ALL).logprob
    update(model, made, torch.where(good, 1.0, -1.0), lr=1e-3)
    moved = score(model, batch, budget=ALL).logprob - before
    assert moved[good].mean() > 0 > moved[~good].mean()


def test_a_clipped_bandit_stops_moving():
    """Arm 0 is rewarded in epoch after epoch: once its ratio passes 1 + clip_high, no gradient is left."""
    bandit = Bandit([0.0, 0.0])
    half = float(torch.tensor(0.5).log())
    made = [trajectory("a", "g", 1.0, [turn([1], [0], [half], new_row=True)])]
    update(bandit, made, torch.ones(1), lr=0.05, betas=(0.0, 0.9), epochs=100, clip_high=0.2)
    assert 0.6 < float(bandit.logits.detach().softmax(-1)[0]) < 0.65
    assert float(bandit.logits.grad.abs().max()) == 0


@pytest.mark.parametrize("made", [[], [trajectory("a", "g", 1.0, [turn([1], [])]), trajectory("b", "g", 0.0, [])]])
def test_a_batch_without_action_tokens_leaves_the_model_alone(model, made):
    batch = build_batch(made)
    config = PolicyUpdateConfig(lr=1e-2)
    before = flat_parameters(model)
    metrics = update_policy(model, make_optimizer(model, config), batch, torch.zeros(0), config)
    assert torch.equal(before, flat_parameters(model))
    assert metrics["policy_loss"] == 0


@pytest.mark.parametrize("where", ["advantage", "behaviour", "weights"])
def test_what_is_not_finite_stops_the_update_before_the_weights_move(model, where):
    made = played_by(model, episodes(10, groups=1))
    advantage = some_advantage(build_batch(made).index.K)
    if where == "advantage":
        advantage[3] = float("nan")
    elif where == "behaviour":
        made[0].turns[0].action_logprobs[0] = float("nan")
    else:
        with torch.no_grad():
            model.model.norm.weight[0] = float("inf")
    before = flat_parameters(model)
    with pytest.raises(NonFiniteError):
        update(model, made, advantage)
    assert torch.equal(before, flat_parameters(model))


def test_learning_rates_warm_up_and_follow_their_schedule():
    def rates(**settings):
        config = PolicyUpdateConfig(lr=1.0, **settings)
        return [learning_rate(config, iteration, 12) for iteration in range(12)]

    assert rates() == [1.0] * 12
    assert rates(warmup_iterations=3)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    for schedule in ("linear", "cosine"):
        values = rates(schedule=schedule, warmup_iterations=2)
        assert values[2] == 1.0
        assert all(a > b > 0.1 for a, b in itertools.pairwise(values[2:]))
        assert learning_rate(PolicyUpdateConfig(lr=1.0, schedule=schedule), 12, 12) == pytest.approx(0.1)
