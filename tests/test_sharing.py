"""Rows as a forest of stretches, and attention over it: exactly what reading every row whole gives."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from agentrl.batch.sharing import DEEPEST, apart, share
from agentrl.models import tree_attention
from agentrl.models.tree_attention import TokenTree


def family(seed: int, rows: int = 12, alphabet: int = 3) -> list[list[int]]:
    """Rows of a few tokens that follow one another at random: they part early, late or never."""
    rng = random.Random(seed)
    found = [[rng.randrange(alphabet) for _ in range(rng.randrange(1, 9))]]
    while len(found) < rows:
        known = rng.choice(found)
        more = [rng.randrange(alphabet) for _ in range(rng.randrange(9))]
        found.append(known[: rng.randrange(len(known) + 1)] + more)
        found[-1] = found[-1] or [0]
    rng.shuffle(found)
    return found


def token_tree(forest) -> TokenTree:
    return TokenTree(tuple((one.stop - one.start, one.below) for one in forest.stretches))


@pytest.mark.parametrize("worth", [1, 4, 10**9])
@pytest.mark.parametrize("seed", range(8))
def test_the_paths_of_a_forest_are_its_rows(seed, worth):
    rows = family(seed)
    forest = share(rows, worth)
    for row, path in zip(rows, forest.paths, strict=True):
        pieces = [forest.stretches[place] for place in path]
        assert [token for one in pieces for token in rows[one.row][one.start : one.stop]] == row
        assert [one.start for one in pieces] == [0, *(one.stop for one in pieces[:-1])]
    sizes = [one.stop - one.start for one in forest.stretches]
    assert all(sizes)
    for place, one in enumerate(forest.stretches):
        # What stands below follows directly, and is all that passes through here.
        passing = {after for path in forest.paths if place in path for after in path[path.index(place) + 1 :]}
        assert passing == set(range(place + 1, place + 1 + len(passing)))
        assert sum(sizes[after] for after in passing) == one.below


def test_with_everything_worth_sharing_no_beginning_stands_twice():
    for seed in range(8):
        rows = family(seed)
        forest = share(rows, 1)
        beginnings = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
        assert sum(one.stop - one.start for one in forest.stretches) == len(beginnings)


def test_a_stretch_is_shared_where_it_saves_enough():
    rows = [[1] * 10 + [2], [1] * 10 + [3], [1] * 10 + [4]]
    assert sum(stretch.stop - stretch.start for stretch in share(rows, 20).stretches) == 13
    assert sum(stretch.stop - stretch.start for stretch in share(rows, 21).stretches) == 33
    assert share(rows, 21).stretches == apart(rows).stretches


def test_rows_that_each_go_on_where_the_last_one_ended_are_shared_to_a_bounded_depth():
    rows = [[7] * (3 * n) for n in range(1, 3 * DEEPEST)]
    forest = share(rows, 1)
    assert max(map(len, forest.paths)) <= DEEPEST + 1
    assert sum(one.stop - one.start for one in forest.stretches) < sum(map(len, rows)) / 2


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_attention_over_a_forest_is_that_of_every_row_by_itself(seed, grouped, monkeypatch):
    monkeypatch.setattr(tree_attention, "_GROUPS_HEADS", grouped)
    rows = family(seed, rows=9)
    forest = share(rows, 2)
    tokens = sum(one.stop - one.start for one in forest.stretches)
    torch.manual_seed(seed)
    q, k, v = (torch.randn(tokens, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    starts = [0]
    for one in forest.stretches:
        starts.append(starts[-1] + one.stop - one.start)
    shared = token_tree(forest).attend(0, q, k, v, 0.3)
    loss = torch.zeros((), dtype=torch.float64)
    ours = torch.zeros((), dtype=torch.float64)
    for path in forest.paths:
        at = torch.cat([torch.arange(starts[place], starts[place + 1]) for place in path])
        mine = (x[at].transpose(0, 1)[None] for x in (q, k, v))
        plain = F.scaled_dot_product_attention(*mine, is_causal=True, scale=0.3, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(shared[at], plain, atol=1e-12, rtol=0)
        weight = torch.randn_like(plain)
        loss, ours = loss + (weight * plain).sum(), ours + (weight * shared[at]).sum()
    for mine, theirs in zip(torch.autograd.grad(ours, (q, k, v)), torch.autograd.grad(loss, (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=0)


def test_scores_far_apart_join_without_overflow():
    tree = TokenTree(((4, 3), (3, 0)))
    q, k, v = torch.randn(7, 2, 8) * 200, torch.randn(7, 2, 8) * 200, torch.randn(7, 2, 8)
    plain = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True)
    ours = tree.attend(0, q, k, v, 8**-0.5)
    torch.testing.assert_close(ours, plain[0].transpose(0, 1), atol=1e-5, rtol=0)
    assert torch.isfinite(ours).all()
