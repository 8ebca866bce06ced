"""The calls of a session, laid out as one completion: hand-made sessions."""

from __future__ import annotations

import pytest

from rft.batch import Branch, Completion
from rft.rollout.calls import Call, lay_out

PROMPT = (1, 2, 3)


def call(prompt: tuple[int, ...], *sampled: int, version: int = 0, **options: object) -> Call:
    logps = tuple(-t / 100 for t in sampled)
    return Call(prompt, sampled, logps, "stop", ((version, 0, len(sampled)),), **options)  # type: ignore[arg-type]


def spans(completion: Completion) -> list[tuple[int, int]]:
    return [(turn.start, turn.end) for turn in completion.turns]


def test_a_single_call_is_a_plain_completion() -> None:
    out = lay_out(PROMPT, [call(PROMPT, 10, 11, version=4)])
    assert (out.tokens, out.logps, out.mask, out.versions) == ((10, 11), (-0.1, -0.11), None, ((4, 0, 2),))
    assert out.branches == () and spans(out) == [(0, 2)]


def test_a_prompt_that_extends_the_last_call_stays_linear() -> None:
    calls = [call(PROMPT, 10, 11), call((*PROMPT, 10, 11, 20), 12, version=1, reward=0.5)]
    out = lay_out(PROMPT, calls)
    assert out.tokens == (10, 11, 20, 12)
    assert out.mask == (True, True, False, True)
    assert out.logps == (-0.1, -0.11, 0.0, -0.12)
    assert out.versions == ((0, 0, 2), (1, 3, 4))
    assert out.branches == () and spans(out) == [(0, 2), (3, 4)]
    assert [t.reward for t in out.turns] == [None, 0.5]


def test_a_drifted_prompt_is_a_branch_and_keeps_what_was_sampled() -> None:
    out = lay_out(PROMPT, [call(PROMPT, 10, 11, 12), call((*PROMPT, 10, 99), 13)])
    assert out.tokens == (10, 11, 12, 99, 13)
    assert out.mask == (True, True, True, False, True)
    assert out.branches == (Branch(0, 2), Branch(3, 3)) and spans(out) == [(0, 3), (4, 5)]


def test_equal_samples_in_equal_contexts_are_two_branches() -> None:
    out = lay_out(PROMPT, [call(PROMPT, 10, 11), call(PROMPT, 10, 11), call((*PROMPT, 10, 11), 12)])
    assert out.tokens == (10, 11, 10, 11, 12)
    assert out.mask is None
    assert out.branches == (Branch(0, 2), Branch(2, 2))  # the third call continues the newer sample


def test_a_call_may_leave_the_prompt_early_or_share_nothing_with_it() -> None:
    out = lay_out(PROMPT, [call((1, 2, 7), 10), call((8,), 11), call(PROMPT, 12)])
    assert out.tokens == (12, 7, 10, 8, 11)
    assert out.mask == (True, False, True, False, True)
    assert out.branches == (Branch(0, 2), Branch(1, 1), Branch(3, -1))
    assert spans(out) == [(2, 3), (4, 5), (0, 1)]


def test_a_call_that_is_not_trained_leaves_no_tokens() -> None:
    title = call((8, 9), 50, 51, trained=False, reward=1.0)
    out = lay_out(PROMPT, [call(PROMPT, 10), title, call((*PROMPT, 10, 20), 11)])
    assert out.tokens == (10, 20, 11) and out.branches == ()
    assert spans(out) == [(0, 1), (0, 0), (2, 3)] and out.turns[1].reward == 1.0


def test_states_are_named_by_the_environment_or_are_what_the_policy_read_last() -> None:
    again = (*PROMPT, 10, 20, 21)
    calls = [call(PROMPT, 10), call(again, 11), call(again, 12), call(PROMPT, 13)]
    calls += [call((*again, 11, 22), 14), call((*PROMPT, 9), 15, state="room 3")]
    states = [t.state for t in lay_out(PROMPT, calls).turns]
    assert states == [PROMPT, (20, 21), (20, 21), PROMPT, (22,), "room 3"]


def test_versions_of_a_sample_that_a_branch_leaves_are_split_with_it() -> None:
    changed = Call(PROMPT, (10, 11, 12, 13), (-1.0, -2.0, -3.0, -4.0), "length", ((0, 0, 3), (1, 3, 4)))
    out = lay_out(PROMPT, [changed, call((*PROMPT, 10, 11), 30, version=2)])
    assert out.tokens == (10, 11, 12, 13, 30)
    assert out.versions == ((0, 0, 3), (1, 3, 4), (2, 4, 5))
    assert out.logps == (-1.0, -2.0, -3.0, -4.0, -0.3)
    assert out.branches == (Branch(0, 2), Branch(4, 4)) and out.finish == "stop"


def test_a_session_without_trained_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the 1 calls"):
        lay_out(PROMPT, [call(PROMPT, 10, trained=False)])


def test_log_probs_must_match_the_sampled_tokens() -> None:
    with pytest.raises(ValueError, match="call 0 has 2 sampled tokens, but 1 log-probs"):
        lay_out(PROMPT, [Call(PROMPT, (10, 11), (-0.1,), "stop", ((0, 0, 2),))])


def test_a_call_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="call 0 has an empty prompt"):
        lay_out(PROMPT, [call((), 10)])
