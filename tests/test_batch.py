"""Rows, micro-batches and scoring: the layout of a batch is a matter of speed, never of the result."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    action_ids,
    difference,
    episodes,
    flat_gradient,
    per_turn,
    perturbed,
    plain_logp,
    trajectory,
    turn,
)

from agentrl.batch import Centre, build_batch, hidden_states, rows, score, score_microbatch, scoring
from agentrl.batch.index import segment_mean, segment_std, segment_sum
from agentrl.errors import DataError

ALL = 10**6


def gradient(model, batch, budget=ALL, weight=None, trajectories=None):
    """Gradient of the weighted sum of log-probs over all micro-batches."""
    weight = torch.linspace(-1, 1, batch.index.K) if weight is None else weight
    model.zero_grad()
    for micro in batch.microbatches(budget, trajectories):
        (weight[micro.tokens] * score_microbatch(model, micro).logprob).sum().backward()
    return flat_gradient(model)


# --- index vectors ---


def test_segment_statistics_are_those_of_each_segment():
    owner = torch.tensor([2, 0, 2, 0, 2, 3])
    values = torch.tensor([1.0, 5.0, 4.0, 7.0, 1.0, 9.0])
    assert segment_sum(values, owner, 4).tolist() == [12, 0, 6, 9]
    assert segment_mean(values, owner, 4).tolist() == [6, 0, 2, 9]
    assert segment_std(values, owner, 4).tolist() == pytest.approx([2**0.5, 0, 3**0.5, 0])
    assert segment_std(values, owner, 4, ddof=0).tolist() == pytest.approx([1, 0, 2**0.5, 0])


def test_a_segment_of_equal_values_has_no_spread_whatever_the_values():
    values = torch.tensor([0.1] * 3 + [1e8 + 0.1] * 7, dtype=torch.float64)
    owner = torch.tensor([0] * 3 + [1] * 7)
    assert segment_std(values, owner, 2).tolist() == [0, 0]


def test_the_index_lists_action_tokens_and_keeps_turns_and_trajectories_without_any():
    batch = build_batch(
        [
            trajectory("a", "g", 1, [turn([1, 2], [3], new_row=True), turn([4], []), turn([5], [6, 7])]),
            trajectory("b", "g", 0, []),
            trajectory("c", "h", 0, [turn([1], [], new_row=True)]),
            trajectory("d", "g", 0, [turn([1], [9], new_row=True)]),
        ]
    )
    index = batch.index
    assert index.turn_of_token.tolist() == [0, 2, 2, 4]
    assert index.traj_of_turn.tolist() == [0, 0, 0, 2, 3]
    assert index.group_of_traj.tolist() == [0, 0, 1, 0]
    assert (index.N, index.M, index.K, index.G) == (4, 5, 4, 2)
    assert index.tokens_per_turn.tolist() == [1, 0, 2, 0, 1]
    assert index.tokens_per_traj.tolist() == [3, 0, 0, 1]
    assert index.turns_per_traj.tolist() == [3, 0, 1, 1]
    assert batch.rows == [[1, 2, 3, 4, 5, 6, 7], [1, 9]]
    assert batch.token_ids.tolist() == [3, 6, 7, 9]


def test_an_empty_batch_scores_nothing(model):
    batch = build_batch([trajectory("a", "g", 0, [turn([1], [], new_row=True)])])
    assert batch.microbatches(10) == []
    assert score(model, batch, budget=10).logprob.shape == (0,)
    assert len(hidden_states(model, batch, budget=10)) == 0


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([turn([1], [2, 3], [-1.0], new_row=True)], "2 action ids but 1 log-probs"),
        ([turn([], [2], new_row=True)], "without any context"),
    ],
)
def test_trajectories_that_cannot_be_scored_are_refused_by_name(turns, message):
    with pytest.raises(DataError, match=f"trajectory broken.*{message}"):
        build_batch([trajectory("broken", "g", 0, turns)])


# --- against plain full-logits calls ---


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_equal_a_direct_full_logits_computation(model, temperature):
    made = episodes(0)
    batch = build_batch(made)
    policy = perturbed(model)
    centre = Centre(policy, hidden_states(policy, batch, budget=50))
    ours = score(model, batch, budget=50, temperature=temperature, want_entropy=True, centre=centre)
    with torch.no_grad():
        logp = plain_logp(model, made, temperature)
        p = plain_logp(policy, made, temperature).exp()
    chosen = logp.gather(-1, action_ids(made)[:, None])[:, 0]
    torch.testing.assert_close(ours.logprob, chosen, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.entropy, -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.centred, chosen - (p * logp).sum(-1), atol=1e-5, rtol=0)


def test_gradients_of_every_score_equal_a_direct_computation(model):
    made = episodes(1)
    batch = build_batch(made)
    model.double()
    policy = perturbed(model)
    centre = Centre(policy, hidden_states(policy, batch, budget=ALL))
    w = torch.randn(3, batch.index.K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for micro in batch.microbatches(60):
        scores = score_microbatch(model, micro, temperature=0.8, want_entropy=True, centre=centre)
        sum((w[i, micro.tokens] * part).sum() for i, part in enumerate(scores)).backward()
    ours = flat_gradient(model)
    model.zero_grad()
    logp = plain_logp(model, made, 0.8)
    p = plain_logp(policy, made, 0.8).exp().detach()
    chosen = logp.gather(-1, action_ids(made)[:, None])[:, 0]
    parts = (chosen, -(logp.exp() * logp).sum(-1), chosen - (p * logp).sum(-1))
    sum((w[i] * part).sum() for i, part in enumerate(parts)).backward()
    assert difference(ours, flat_gradient(model)) < 1e-6


def test_centred_scores_have_no_expectation_under_the_centre(model):
    """E_{a ~ policy} [log phi(a) - E log phi] = 0: summed exactly over the vocabulary, one row per possible action."""
    vocab = model.config.vocab_size
    policy = perturbed(model)
    every = [trajectory(str(a), "g", 0, [turn([5, 9, 2], [a], new_row=True)]) for a in range(vocab)]
    batch = build_batch(every)
    centre = Centre(policy, hidden_states(policy, batch, budget=ALL))
    scores = score(model, batch, budget=ALL, centre=centre)
    p = score(policy, batch, budget=ALL).logprob.double().exp()
    assert abs(float(p.sum()) - 1) < 1e-5
    assert scores.centred.std() > 0.1
    assert abs(float((p * scores.centred).sum())) < 1e-5


# --- layouts, merging, budgets, chunks ---


def test_packed_and_per_turn_rows_have_the_same_scores_and_gradients(model):
    model.double()
    packed = episodes(2)
    one, many = build_batch(packed), build_batch(per_turn(packed))
    assert len(many.rows) > len(one.rows)
    assert one.index.turn_of_token.tolist() == many.index.turn_of_token.tolist()
    a, b = (score(model, batch, budget=ALL, want_entropy=True) for batch in (one, many))
    torch.testing.assert_close(a.logprob, b.logprob, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.entropy, b.entropy, atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden_states(model, one, budget=ALL), hidden_states(model, many, budget=ALL))
    assert difference(gradient(model, one), gradient(model, many)) < 1e-6


def repeated():
    """Episodes of which several share whole rows, or differ only in what of a row was sampled."""
    base = episodes(3, groups=2, size=3)
    again = [t.model_copy(update={"id": t.id + "'"}) for t in base[::2]]
    same_ids = [
        trajectory("x", "g0", 0, [turn([1, 2, 3], [4], new_row=True)]),
        trajectory("y", "g0", 1, [turn([1, 2], [3, 4], new_row=True)]),
    ]
    return per_turn([*base, *again]) + base + same_ids


def test_merging_equal_rows_changes_nothing(model):
    model.double()
    made = repeated()
    merged, whole = build_batch(made), build_batch(made, merge_equal_rows=False)
    assert len(merged.rows) < len(whole.rows)
    torch.testing.assert_close(
        score(model, merged, budget=ALL).logprob, score(model, whole, budget=ALL).logprob, atol=1e-6, rtol=0
    )
    assert difference(gradient(model, merged), gradient(model, whole)) < 1e-6


@pytest.mark.parametrize("members", [[0], [1, 4, 5], [0, 7, 8, 9]])
def test_restricting_to_some_trajectories_scores_these_and_no_other(model, members):
    """Also where a member shares its row with an episode that is left out."""
    batch = build_batch(repeated())
    inside = torch.isin(batch.index.traj_of_token, torch.tensor(members))
    scored = torch.cat([micro.tokens for micro in batch.microbatches(40, members)])
    assert sorted(scored.tolist()) == inside.nonzero()[:, 0].tolist()
    ours = score(model, batch, budget=40, trajectories=members).logprob
    everything = score(model, batch, budget=ALL).logprob
    torch.testing.assert_close(ours, torch.where(inside, everything, 0.0), atol=1e-5, rtol=0)
    weight = torch.linspace(-1, 1, batch.index.K)
    part = gradient(model, batch, 40, weight, members)
    assert difference(part, gradient(model, batch, ALL, torch.where(inside, weight, 0.0))) < 1e-5


@pytest.mark.parametrize("budget", [1, 37, 120])
def test_the_token_budget_changes_nothing(model, budget):
    model.double()
    batch = build_batch(episodes(4))
    micros = batch.microbatches(budget)
    assert len(micros) > 1
    assert all(len(micro.ids) <= budget or len(micro.plan.lengths) == 1 for micro in micros)
    assert sorted(k for micro in micros for k in micro.tokens.tolist()) == list(range(batch.index.K))
    torch.testing.assert_close(
        score(model, batch, budget=budget).logprob, score(model, batch, budget=ALL).logprob, atol=1e-6, rtol=0
    )
    assert difference(gradient(model, batch, budget), gradient(model, batch)) < 1e-6


def alike(prompts, members, longest=12):
    """Groups whose members begin with their group's prompt and play two turns of their own."""
    random = torch.Generator().manual_seed(3)

    def ids():
        return torch.randint(5, 300, (int(torch.randint(1, longest, (), generator=random)),), generator=random).tolist()

    return [
        trajectory(f"{g}/{m}", str(g), m % 2, [turn(prompt, ids(), new_row=True), turn(ids(), ids())])
        for g, prompt in enumerate(prompts)
        for m in range(members)
    ]


@pytest.mark.parametrize("budget", [60, 150, ALL])
def test_what_rows_begin_with_is_read_once_and_changes_nothing(model, monkeypatch, budget):
    model.double()
    made = [*alike([[7] * 30, [8] * 20, [9] * 5], 4), *alike([[6] * 40], 1)]
    # Two that go the same way until they part within an action, and two until the second observation.
    made += [
        trajectory(f"s/{m}", "s", m % 2, [turn([5] * 9, [20, 21, 22 + m // 2], new_row=True), turn([30 + m], [40])])
        for m in range(4)
    ]
    monkeypatch.setattr(rows, "WORTH_SHARING", 10**9)
    whole = build_batch(made)
    assert sum(len(micro.ids) for micro in whole.microbatches(ALL)) == whole.tokens
    monkeypatch.setattr(rows, "WORTH_SHARING", 20)
    shared = build_batch(made)
    if budget == ALL:
        (micro,) = shared.microbatches(ALL)
        assert len(micro.ids) <= whole.tokens - 3 * 30 - 3 * 20 - 3 * 11
        assert len(micro.target) < len(micro.tokens)
    weight = torch.linspace(-1, 1, whole.index.K)
    for members in (None, [0, 2, 5, 12, 14]):
        found = []
        for batch, worth in ((shared, 20), (whole, 10**9)):
            monkeypatch.setattr(rows, "WORTH_SHARING", worth)
            scores = score(model, batch, budget=budget, trajectories=members).logprob
            found.append((scores, gradient(model, batch, budget, weight, members)))
        torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=0)
        assert difference(found[0][1], found[1][1]) < 1e-6


def test_the_order_of_trajectories_changes_nothing(model):
    model.double()
    made = episodes(5)
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(1)).tolist()
    straight, mixed = build_batch(made), build_batch([made[i] for i in order])
    traj = straight.index.traj_of_token
    moved = torch.cat([(traj == i).nonzero()[:, 0] for i in order])
    a, b = score(model, straight, budget=100).logprob, score(model, mixed, budget=100).logprob
    torch.testing.assert_close(a[moved], b, atol=1e-6, rtol=0)
    weight = torch.linspace(-1, 1, straight.index.K)
    assert difference(gradient(model, straight, 100, weight), gradient(model, mixed, 100, weight[moved])) < 1e-6


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunked_log_softmax_equals_unchunked_forward_and_backward(model, monkeypatch, chunk):
    batch = build_batch(repeated())
    policy = perturbed(model)
    centre = Centre(policy, hidden_states(policy, batch, budget=ALL))

    def everything():
        model.zero_grad()
        (micro,) = batch.microbatches(ALL)
        scores = score_microbatch(model, micro, temperature=0.9, want_entropy=True, centre=centre)
        sum((part * (i + 1) * torch.linspace(-1, 1, len(part))).sum() for i, part in enumerate(scores)).backward()
        return [part.detach() for part in scores], flat_gradient(model)

    whole, whole_gradient = everything()
    largest = []
    plain = scoring._head
    monkeypatch.setattr(scoring, "_head", lambda *args: largest.append(len(args[1])) or plain(*args))
    monkeypatch.setattr(scoring, "LOGIT_BUDGET", chunk * model.config.vocab_size)
    parts, parts_gradient = everything()
    assert max(largest) == chunk
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert difference(parts_gradient, whole_gradient) < 1e-5


def test_what_is_read_but_not_scored_may_be_anything_the_agent_did_not_see(model):
    """Ids after a row's last action, rewards, observations' texts: none of it reaches a score."""
    made = episodes(6)
    noisy = []
    for t in made:
        steps = [
            s.model_copy(update={"observation": "junk", "reward": float("nan"), "info": {"x": 1}}) for s in t.turns
        ]
        steps.append(turn([7, 7, 7], []))
        noisy.append(t.model_copy(update={"turns": steps, "final_observation": "junk", "outcome": float("nan")}))
    model = model.double()  # other lengths round otherwise: in float32 by two units of the last place
    torch.testing.assert_close(
        score(model, build_batch(made), budget=ALL).logprob,
        score(model, build_batch(noisy), budget=ALL).logprob,
        atol=1e-6,
        rtol=0,
    )
