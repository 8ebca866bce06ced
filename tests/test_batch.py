"""The packed batch: layout, selection, and the maps between tokens and sequences."""

from __future__ import annotations

import pytest
import torch

from rft.batch import Batch, Completion, Group, Prompt

PAIR = Group(
    Prompt(0, (10, 11), "p"),
    (Completion((20, 21), reward=1.0), Completion((30,), reward=0.0)),
)


def test_shared_layout_is_the_one_of_the_docstring() -> None:
    batch = Batch.build([PAIR], share_prefix=True)
    assert batch.tokens.tolist() == [10, 11, 20, 21, 30]
    assert batch.segment.tolist() == [0, 0, 1, 1, 2]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2]
    assert batch.source.tolist() == [-1, 0, 1, 2, 1]
    assert batch.sequence.tolist() == [-1, -1, 0, 0, 1]
    assert batch.mask.tolist() == [False, False, True, True, True]
    assert batch.parent.tolist() == [-1, 0, 0]
    assert batch.group.tolist() == [0, 0]


def test_unshared_layout_repeats_the_prompt() -> None:
    batch = Batch.build([PAIR])
    assert batch.tokens.tolist() == [10, 11, 20, 21, 10, 11, 30]
    assert batch.source.tolist() == [-1, 0, 1, 2, -1, 4, 5]
    assert batch.parent.tolist() == [-1, -1]


@pytest.mark.parametrize("share", [False, True])
def test_select_counts_everything_anew(make_groups, share: bool) -> None:
    groups = make_groups(groups=4, size=3)
    whole = Batch.build(groups, share_prefix=share)
    part = whole.select_groups(torch.tensor([1, 3]))
    again = Batch.build([groups[1], groups[3]], share_prefix=share)
    for name in (
        "tokens",
        "positions",
        "segment",
        "source",
        "sequence",
        "mask",
        "parent",
        "group",
        "rewards",
    ):
        assert torch.equal(getattr(part, name), getattr(again, name)), name
    assert torch.equal(part.sampler_logps, again.sampler_logps)


def test_sums_and_spreads_are_inverse_on_constants(make_groups) -> None:
    batch = Batch.build(make_groups(groups=3, size=2), share_prefix=True)
    x = torch.arange(batch.num_sequences, dtype=torch.float32) + 1
    assert torch.allclose(batch.mean_by_sequence(batch.to_tokens(x)), x)
    assert batch.to_tokens(x)[~batch.mask].abs().sum() == 0


def test_pairs_go_down_the_rewards_within_a_group() -> None:
    ranked = Group(Prompt(0, (1,), "p"), tuple(Completion((2,), reward=r) for r in (0.0, 2.0, 1.0, 1.0)))
    better, worse = Batch.build([ranked, PAIR]).pairs()
    assert list(zip(better.tolist(), worse.tolist(), strict=True)) == [(1, 2), (3, 0), (4, 5)]


def test_a_missing_reward_is_no_zero() -> None:
    group = Group(Prompt(0, (1,), "p"), (Completion((2,), reward=None), Completion((3,), reward=1.0)))
    assert Batch.build([group]).rewards is None


@pytest.mark.parametrize(
    ("prompt", "completion", "words"),
    [((), (1,), "prompt 5 is empty"), ((1,), (), "completion of prompt 5")],
)
def test_empty_sequences_are_refused_by_name(prompt, completion, words) -> None:
    with pytest.raises(ValueError, match=words):
        Batch.build([Group(Prompt(5, prompt, "p"), (Completion(completion),))])


@pytest.mark.parametrize("share_prefix", [False, True])
def test_values_that_a_completion_lacks_are_nan(share_prefix) -> None:
    some = (Completion((2,), values={"rate": 0.5, "steps": (1.0, 2.0)}), Completion((3,)))
    other = (Completion((4,), values={"steps": (3.0,)}),)
    groups = [Group(Prompt(i, (1,), "p"), c) for i, c in enumerate((some, (), other))]
    batch = Batch.build(groups, share_prefix=share_prefix)
    nan = torch.nan
    for name, expected in (
        ("rate", [0.5, nan, nan]),
        ("steps", [[1.0, 2.0], [nan, nan], [3.0, nan]]),
    ):
        torch.testing.assert_close(batch.columns[name], torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_groups_without_completions_are_left_out(share_prefix) -> None:
    """Groups are counted from 0 without gaps, wherever the empty ones stand; nothing is read of those."""
    empty = [Group(Prompt(i, tokens, "p"), ()) for i, tokens in enumerate([(7,), (), (8, 9)])]
    batch = Batch.build([empty[0], PAIR, empty[1], PAIR, empty[2]], share_prefix=share_prefix)
    assert batch.group.tolist() == [0, 0, 1, 1] and batch.num_groups == 2
    assert torch.equal(batch.tokens, Batch.build([PAIR, PAIR], share_prefix=share_prefix).tokens)
    assert batch.select_groups(torch.tensor([1])).num_sequences == 2
    assert Batch.build(empty, share_prefix=share_prefix).num_sequences == 0
