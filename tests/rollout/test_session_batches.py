"""Sessions in a batch: any calls become a forest in which every sampled token stands once, in its context."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rft.batch import Batch, Branch, Completion, Group, Prompt
from rft.kernels.forest import Forest
from rft.packing import micro_batches
from rft.rollout.calls import Call, lay_out
from rft.work import _group_work, _runs, tree_costs

PROMPT = (0, 1, 0, 2)
Sampled = tuple[tuple[int, ...], int, float, int, int]  # context, token, log-prob, version, call


@st.composite
def sessions(draw: st.DrawFn) -> tuple[Call, ...]:
    """Calls over three tokens: they extend an earlier call, leave it midway, repeat it, or start anew."""
    token = st.integers(0, 2)
    calls: list[Call] = []
    for k in range(draw(st.integers(1, 5))):
        past = [PROMPT, *(c.prompt + c.sampled for c in calls)]
        base = past[draw(st.integers(0, len(past) - 1))]
        kept = len(base) if draw(st.booleans()) else draw(st.integers(0, len(base)))
        prompt = base[:kept] + tuple(draw(st.lists(token, max_size=3)))
        sampled = tuple(draw(st.lists(token, min_size=1, max_size=4)))
        logps = tuple(-(k + i / 8) for i in range(len(sampled)))
        cut = draw(st.integers(0, len(sampled)))
        spans = ((2 * k, 0, cut), (2 * k + 1, cut, len(sampled)))
        versions = tuple(span for span in spans if span[1] < span[2])
        trained = k == 0 or draw(st.booleans())
        calls.append(Call(prompt or PROMPT, sampled, logps, "stop", versions, trained, reward=float(k)))
    return tuple(calls)


def given_of(calls: tuple[Call, ...]) -> Counter[Sampled]:
    out: Counter[Sampled] = Counter()
    for k, c in enumerate(calls):
        version = {i: v for v, a, b in c.versions for i in range(a, b)}
        for i, token in enumerate(c.sampled if c.trained else ()):
            out[c.prompt + c.sampled[:i], token, c.logps[i], version[i], k] += 1
    return out


def trained_in(batch: Batch, sequence: int) -> Counter[Sampled]:
    """What the batch trains a sequence on; a token's context by its ancestors."""
    assert batch.sampler_logps is not None and batch.version is not None and batch.turn is not None
    out: Counter[Sampled] = Counter()
    for t in (batch.mask & (batch.sequence == sequence)).nonzero()[:, 0].tolist():
        context, above = [], int(batch.source[t])
        while above >= 0:
            context.append(int(batch.tokens[above]))
            above = int(batch.source[above])
        assert int(batch.positions[t]) == len(context)
        number = (int(batch.version[t]), int(batch.turn[t]))
        out[tuple(reversed(context)), int(batch.tokens[t]), float(batch.sampler_logps[t]), *number] += 1
    return out


def check_attention(batch: Batch) -> None:
    """What a token attends to, by segments, are its ancestors by `source` and itself."""
    sees = Forest(batch.segment, batch.parent, batch.positions).sees
    for t in range(batch.num_tokens):
        ancestors = {t}
        while (above := int(batch.source[min(ancestors)])) >= 0:
            ancestors.add(above)
        earlier = sees[batch.segment[t]][batch.segment] & (torch.arange(batch.num_tokens) <= t)
        assert set(earlier.nonzero()[:, 0].tolist()) == ancestors


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(sessions(), min_size=1, max_size=3), min_size=1, max_size=2), st.booleans())
def test_every_sampled_token_is_trained_once_in_its_context(
    groups: list[list[tuple[Call, ...]]], share: bool
) -> None:
    laid_out = [
        Group(Prompt(i, PROMPT, ""), tuple(replace(lay_out(PROMPT, s), reward=float(len(s))) for s in group))
        for i, group in enumerate(groups)
    ]
    everything = [calls for group in groups for calls in group]
    batch = Batch.build(laid_out, share_prefix=share)
    assert batch.num_sequences == len(everything)
    assert batch.group.tolist() == [i for i, group in enumerate(groups) for _ in group]
    assert batch.rewards is not None and batch.rewards.tolist() == [float(len(s)) for s in everything]
    assert batch.lengths.tolist() == [given_of(calls).total() for calls in everything]
    for n, calls in enumerate(everything):
        assert trained_in(batch, n) == given_of(calls)
    check_attention(batch)

    parts = micro_batches(batch, max_tokens=12)[0]
    assert sorted(tree for trees in parts for tree in trees) == list(range(int((batch.parent < 0).sum())))
    whole = Counter(s for calls in everything for s in given_of(calls).elements())
    split: Counter[Sampled] = Counter()
    sequences = 0
    for trees in parts:
        part = batch.select(trees)
        sequences += part.num_sequences
        for n in range(part.num_sequences):
            split += trained_in(part, n)
    assert split == whole and sequences == len(everything)  # no sequence is divided


@settings(deadline=None, max_examples=40)
@given(sessions())
def test_a_session_takes_no_more_tokens_than_one_row_for_each_call(calls: tuple[Call, ...]) -> None:
    batch = Batch.build([Group(Prompt(0, PROMPT, ""), (lay_out(PROMPT, calls),))])
    rows = Batch.build(
        [
            Group(Prompt(k, c.prompt, ""), (lay_out(c.prompt, [c]),))
            for k, c in enumerate(calls)
            if c.trained and c.sampled
        ]
    )
    assert batch.num_tokens <= rows.num_tokens
    assert int(batch.mask.sum()) == int(rows.mask.sum())


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.data())
def test_a_session_that_only_appends_is_one_run(turns: int, data: st.DataObject) -> None:
    token, calls, tokens = st.integers(0, 2), [], PROMPT
    for _ in range(turns):
        sampled = tuple(data.draw(st.lists(token, min_size=1, max_size=3)))
        calls.append(Call(tokens, sampled, (0.0,) * len(sampled), "stop", ()))
        tokens += sampled + tuple(data.draw(st.lists(token, max_size=3)))
    completion = lay_out(PROMPT, calls)
    assert completion.branches == ()
    assert PROMPT + completion.tokens == calls[-1].prompt + calls[-1].sampled


@settings(deadline=None, max_examples=40)
@given(st.lists(sessions(), min_size=1, max_size=3))
def test_the_predicted_work_is_that_of_the_batch(group: list[tuple[Call, ...]]) -> None:
    completions = tuple(lay_out(PROMPT, calls) for calls in group)
    runs = [_runs(len(PROMPT), c) for c in completions]
    predicted = _group_work(runs, hidden_size=8)
    for share, work in zip((False, True), predicted, strict=True):
        batch = Batch.build([Group(Prompt(0, PROMPT, ""), completions)], share_prefix=share)
        assert float(tree_costs(batch, hidden_size=8).sum()) == pytest.approx(work)


def of(*completions: Completion, share: bool = False) -> Batch:
    return Batch.build([Group(Prompt(0, (1, 2, 3), ""), completions)], share_prefix=share)


def test_segments_end_at_branch_points() -> None:
    drifted = Completion((10, 11, 12, 99, 13), mask=(True, True, True, False, True))
    batch = of(replace(drifted, branches=(Branch(0, 2), Branch(3, 3))))
    assert batch.tokens.tolist() == [1, 2, 3, 10, 11, 12, 99, 13]
    assert batch.segment.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert batch.parent.tolist() == [-1, 0, 0]
    assert batch.source.tolist() == [-1, 0, 1, 2, 3, 4, 3, 6]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 4, 5]


def test_a_shared_prompt_ends_where_the_last_completion_leaves_it() -> None:
    early = Completion((7, 10), mask=(False, True), branches=(Branch(0, 0),))
    middle = Completion((8, 11), mask=(False, True), branches=(Branch(0, 1),))
    batch = of(early, middle, share=True)
    assert batch.tokens.tolist() == [1, 2, 7, 10, 8, 11]
    assert batch.segment.tolist() == [0, 1, 2, 2, 3, 3]
    assert batch.parent.tolist() == [-1, 0, 0, 1]
    assert batch.source.tolist() == [-1, 0, 0, 2, 1, 4]


def test_calls_without_the_prompt_are_trees_behind_that_of_the_group() -> None:
    apart = Completion((10, 8, 11), mask=(True, False, True), branches=(Branch(0, 2), Branch(1, -1)))
    batch = of(apart, Completion((12,)), share=True)
    assert batch.tokens.tolist() == [1, 2, 3, 10, 12, 8, 11]
    assert batch.parent.tolist() == [-1, 0, 0, -1]
    assert batch.sequence.tolist() == [-1, -1, -1, 0, 1, 0, 0]
    assert micro_batches(batch, max_tokens=5)[0] == [[0, 1]]  # one sequence has tokens in both


def test_turns_rewards_and_states_are_columns() -> None:
    def call(prompt: tuple[int, ...], state: str, reward: float | None = None) -> Call:
        return Call(prompt, (6,), (0.0,), "stop", (), reward=reward, state=state)

    first = lay_out((1, 2), [call((1, 2), "a", 0.5)])
    second = lay_out((1, 2), [call((1, 2), "b"), call((1, 2, 6, 7), "a")])
    prompt = Prompt(0, (1, 2), "")
    batch = Batch.build([Group(prompt, (first, second)), Group(prompt, (first,))])
    assert batch.turn is not None
    assert batch.turn[batch.mask].tolist() == [0, 0, 1, 0]
    rewards = torch.tensor([[0.5, torch.nan], [0, 0], [0.5, torch.nan]])
    states = torch.tensor([[0, torch.nan], [1, 0], [2, torch.nan]])
    torch.testing.assert_close(batch.columns["turn_rewards"], rewards, equal_nan=True)
    torch.testing.assert_close(batch.columns["turn_states"], states, equal_nan=True)


@pytest.mark.parametrize(
    "branches",
    [
        (Branch(1, 2),),  # does not start at 0
        (Branch(0, 3),),  # follows itself
        (Branch(0, 2), Branch(1, 4)),  # follows a later token
        (Branch(0, 2), Branch(0, 2)),  # without tokens
        (Branch(0, -1),),  # nothing predicts the first token
        (Branch(0, -2),),
    ],
)
def test_impossible_branches_are_refused(branches: tuple[Branch, ...]) -> None:
    with pytest.raises(ValueError, match="a completion of prompt 0 has the branches"):
        of(Completion((10, 11), branches=branches))
