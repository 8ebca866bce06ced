"""Packing: every tree once, within the limit, the same every time, balanced over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.batch import Batch, Completion, Group, Prompt
from rft.packing import micro_batches
from rft.work import shares_prefix, sharing_gain, tree_costs, tree_tokens, worth_sharing

Sizes = list[tuple[int, list[int]]]
sizes = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1, max_size=4)),
    min_size=1,
    max_size=12,
)


def batch_of(groups: Sizes, share: bool = False) -> Batch:
    return Batch.build(
        [
            Group(Prompt(i, (1,) * p, ""), tuple(Completion((2,) * r) for r in rs))
            for i, (p, rs) in enumerate(groups)
        ],
        share_prefix=share,
    )


def flat(plan: list[list[list[int]]]) -> list[list[int]]:
    return [part for rank in plan for part in rank]


@settings(max_examples=80, deadline=None)
@given(sizes, st.integers(40, 200), st.integers(1, 4), st.booleans(), st.booleans())
def test_plans_are_complete_within_limits_and_deterministic(
    groups: Sizes, limit: int, ranks: int, share: bool, keep: bool
) -> None:
    batch = batch_of(groups, share)
    plan = micro_batches(batch, limit, ranks, keep_groups=keep)
    assert plan == micro_batches(batch, limit, ranks, keep_groups=keep)
    parts = flat(plan)
    trees = [tree for part in parts for tree in part]
    assert sorted(trees) == list(range(int((batch.parent < 0).sum())))
    assert len(plan) == ranks and len({len(rank) for rank in plan}) == 1
    assert all(part == sorted(part) for part in parts)
    tokens = tree_tokens(batch)
    group_of = {int(t): int(g) for t, g in zip(tree_of_sequences(batch), batch.group, strict=True)}
    for part in parts:
        alone = len({group_of[t] for t in part}) == 1 if keep else len(part) == 1
        assert not part or alone or int(tokens[part].sum()) <= limit
    if keep:
        for group in range(batch.num_groups):
            assert sum(any(group_of[t] == group for t in part) for part in parts) == 1


def tree_of_sequences(batch: Batch) -> torch.Tensor:
    """[N]: the tree that holds each sequence."""
    known = batch.sequence >= 0
    out = torch.zeros(batch.num_sequences, dtype=torch.int64)
    return out.index_copy(0, batch.sequence[known], batch.tree[batch.segment[known]])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(2, 80), min_size=1, max_size=60), st.integers(80, 400))
def test_best_fit_decreasing_is_near_the_least_number(lengths: list[int], limit: int) -> None:
    """Best-fit decreasing needs at most 11/9 of the optimum plus one bin (Johnson 1973)."""
    batch = batch_of([(1, [n - 1]) for n in lengths])
    least = -(-sum(lengths) // limit)
    assert len(micro_batches(batch, limit)[0]) <= 11 / 9 * max(least, bound(lengths, limit)) + 1


def bound(lengths: list[int], limit: int) -> int:
    """Sequences over half the limit cannot share a bin."""
    return sum(2 * n > limit for n in lengths)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 60), min_size=24, max_size=80), st.integers(2, 4))
def test_ranks_are_balanced(lengths: list[int], ranks: int) -> None:
    """No rank carries more than one of its micro-batches beyond the mean."""
    batch = batch_of([(1, [n - 1]) for n in lengths])
    costs = tree_costs(batch, 1024)
    plan = micro_batches(batch, 120, ranks)
    loads = [sum(float(costs[part].sum()) for part in rank) for rank in plan]
    largest = max(float(costs[part].sum()) for part in flat(plan))
    assert max(loads) - min(loads) <= largest + 1e-6


def test_selected_parts_hold_what_the_batch_holds() -> None:
    batch = batch_of([(5, [3, 4]), (2, [6]), (9, [1, 1, 1])], share=True)
    parts = [batch.select(trees) for trees in flat(micro_batches(batch, 15))]
    assert sum(p.num_tokens for p in parts) == batch.num_tokens
    assert sum(p.num_sequences for p in parts) == batch.num_sequences
    assert int(sum(p.mask.sum() for p in parts)) == int(batch.mask.sum())


def test_a_tree_above_the_limit_is_alone() -> None:
    batch = batch_of([(5, [3]), (50, [60]), (2, [2])])
    assert [1] in micro_batches(batch, 20)[0]


def test_fewer_trees_than_ranks_leaves_some_empty() -> None:
    plan = micro_batches(batch_of([(3, [2]), (3, [4])]), 100, ranks=3)
    assert sorted(len(rank[0]) for rank in plan) == [0, 1, 1]
    assert micro_batches(batch_of([(3, [2])]).select([]), 100, ranks=2) == [[[]], [[]]]


def test_limits_are_checked() -> None:
    batch = batch_of([(3, [2])])
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        micro_batches(batch, 0)
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        micro_batches(batch, 10, 0)


@pytest.mark.parametrize(("prompt", "completions"), [(512, [64, 64]), (64, [256] * 8), (7, [3, 4, 5])])
def test_the_gain_of_sharing(prompt: int, completions: list[int]) -> None:
    """The linear part alone is G(p + R) / (p + G R); all of it is the ratio of the batches' costs."""
    tokens = sum(prompt + n for n in completions) / (prompt + sum(completions))
    assert sharing_gain(prompt, completions, hidden_size=10**9) == pytest.approx(tokens)
    separate, shared = (batch_of([(prompt, completions)], share=share) for share in (False, True))
    gain = float(tree_costs(separate, 256).sum() / tree_costs(shared, 256).sum())
    assert sharing_gain(prompt, completions, 256) == pytest.approx(gain)


def test_sharing_is_skipped_where_it_hardly_pays() -> None:
    assert worth_sharing([(512, [64, 64])])
    assert worth_sharing([(64, [64] * 8)])
    assert not worth_sharing([(8, [500, 500])])
    assert not worth_sharing([(512, [64])])


def test_sharing_is_decided_by_the_mode_or_by_the_gain(make_groups: Callable[..., list[Group]]) -> None:
    groups = make_groups(groups=2, size=4, longest=3)
    assert [shares_prefix(groups, mode, 64) for mode in ("on", "off")] == [True, False]
    long = [replace(g, prompt=replace(g.prompt, tokens=(7,) * 60)) for g in groups]
    assert shares_prefix(long, "auto", 64)
    alone = [replace(g, completions=g.completions[:1]) for g in long]
    assert not shares_prefix(alone, "auto", 64)
