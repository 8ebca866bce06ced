"""Sessions need no change of an algorithm: loss and gradient are those of their calls laid out one by one,
and those of plain completions if they only append. What reads the order of tokens refuses branches."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from test_online_invariance import SETTINGS, make, same, splitter
from worlds import objective, random_groups, random_tables

from rft.batch import Batch, Branch, Completion, Group
from rft.rollout.calls import Call, lay_out

SESSIONS = [s for s in SETTINGS if not make(*s).needs_demonstrations]  # those are refused with an environment
ORDERED = [s for s in SESSIONS if make(*s).reads_order]
UNORDERED = [s for s in SESSIONS if not make(*s).reads_order]
TURN_LEVEL: list[tuple[str, dict[str, Any]]] = [
    ("grpo", {"turn_returns": "turn", "turn_discount": 0.9}),
    ("rloo", {"turn_returns": "group"}),
    ("dr_grpo", {"turn_returns": "state", "turn_discount": 0.5}),
    ("gspo", {"turn_returns": "state", "turn_weight": 0.3}),
]


def sessions_of(group: Group, *, drifts: bool) -> list[tuple[Completion, list[Call]]]:
    """Each completion of a group as a session: its first two tokens in one call, the others in a second one
    after an answer of the environment. With `drifts` the second prompt lacks the first call's last token."""
    out = []
    answers = itertools.count(190)
    for c in group.completions:
        assert c.logps is not None
        cut, prompt = (2 if len(c.tokens) > 2 else 1), group.prompt.tokens
        first = c.tokens[:cut]
        calls = [Call(prompt, first, c.logps[:cut], "stop", ((0, 0, cut),), reward=0.25, state="room")]
        if rest := c.tokens[cut:]:
            prompt += (*first[: cut - drifts], next(answers))
            calls.append(Call(prompt, rest, c.logps[cut:], "stop", ((0, 0, len(rest)),), state="room"))
        out.append((c, calls))
    return out


def as_sessions(groups: list[Group], *, drifts: bool) -> list[Group]:
    def session(prompt: tuple[int, ...], c: Completion, calls: list[Call]) -> Completion:
        laid_out = lay_out(prompt, calls)
        names = ("tokens", "mask", "logps", "versions", "branches", "turns")
        return replace(c, **{name: getattr(laid_out, name) for name in names})

    return [
        replace(
            g,
            completions=tuple(session(g.prompt.tokens, *s) for s in sessions_of(g, drifts=drifts)),
        )
        for g in groups
    ]


def as_rows(groups: list[Group], *, drifts: bool) -> list[Group]:
    """One tree for each call, with its whole prompt."""

    def row(c: Completion, calls: list[Call]) -> Completion:
        tokens: tuple[int, ...] = ()
        mask: tuple[bool, ...] = ()
        branches, turns = [], []
        whole = lay_out(calls[0].prompt, calls)
        for turn, call in zip(whole.turns, calls, strict=True):
            branches.append(Branch(len(tokens), -1))
            tokens += call.prompt + call.sampled
            turns.append(turn._replace(start=len(tokens) - len(call.sampled), end=len(tokens)))
            mask += (False,) * len(call.prompt) + (True,) * len(call.sampled)
        kept = {"tokens": tokens, "mask": mask, "branches": tuple(branches), "turns": tuple(turns)}
        return replace(c, logps=(-1.0,) * len(tokens), **kept)

    return [replace(g, completions=tuple(row(*s) for s in sessions_of(g, drifts=drifts))) for g in groups]


@pytest.mark.parametrize(("name", "settings"), UNORDERED + TURN_LEVEL)
def test_a_session_is_its_calls(name: str, settings: dict[str, Any]) -> None:
    algorithm, tables = make(name, settings), random_tables(4)
    groups = random_groups(4)
    expected = objective(algorithm, Batch.build(as_rows(groups, drifts=True)), tables)
    for share in (False, True):
        batch = Batch.build(as_sessions(groups, drifts=True), share_prefix=share)
        same(objective(algorithm, batch, tables), expected)
        same(objective(algorithm, batch, tables, splitter(algorithm, 16)), expected)


@pytest.mark.parametrize(("name", "settings"), SESSIONS)
def test_a_session_that_only_appends_is_a_completion(name: str, settings: dict[str, Any]) -> None:
    algorithm, tables = make(name, settings), random_tables(5)
    groups = random_groups(4)
    expected = objective(algorithm, Batch.build(groups), tables)
    for share in (False, True):
        batch = Batch.build(as_sessions(groups, drifts=False), share_prefix=share)
        same(objective(algorithm, batch, tables, splitter(algorithm, 16)), expected)


@pytest.mark.parametrize(("name", "settings"), ORDERED)
def test_what_reads_the_order_refuses_branches(name: str, settings: dict[str, Any]) -> None:
    algorithm = make(name, settings)
    batch = Batch.build(as_sessions(random_groups(4), drifts=True))
    with pytest.raises(ValueError, match="a session branches"):
        objective(algorithm, batch, random_tables(4))


def test_the_algorithms_that_read_the_order_are_known() -> None:
    assert {name for name, _ in ORDERED} == {"ppo", "per_step", "mml", "mml_partial"}
