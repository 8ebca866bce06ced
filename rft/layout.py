"""Lay out groups as a forest of segments: the fields of a `Batch`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from rft.samples import Branch, Completion, Group, Prompt, TopTokens, Turn


def fields_of(groups: Sequence[Group], *, share_prefix: bool) -> dict[str, Any]:
    """Return the fields of the batch of these groups, by name; see `Batch.build`."""
    return _Builder(share_prefix).build(groups)


def _column(values: Sequence[float | tuple[float, ...] | None]) -> torch.Tensor:
    """[N] float32, or [N, K] if the values are tuples; nan for missing values and at the end of shorter
    tuples."""
    rows = [v if isinstance(v, tuple) else (float("nan") if v is None else v,) for v in values]
    width = max(1, *(len(row) for row in rows))
    padded = torch.tensor([[*row, *[float("nan")] * (width - len(row))] for row in rows], dtype=torch.float32)
    return padded if any(isinstance(v, tuple) for v in values) else padded.squeeze(1)


def _teachers(given: Sequence[tuple[Sequence[int], TopTokens]], tokens: int) -> dict[str, torch.Tensor]:
    """Return `teacher_ids` and `teacher_logps` of a batch of so many tokens, from those at some places; {}
    without any."""
    if not given:
        return {}
    width = max(top.ids.shape[1] for _, top in given)
    ids = torch.full((tokens, width), -1, dtype=torch.int64)
    logps = torch.full((tokens, width), -torch.inf)
    for places, top in given:
        ids[list(places), : top.ids.shape[1]] = torch.from_numpy(top.ids.astype(np.int64))
        logps[list(places), : top.ids.shape[1]] = torch.from_numpy(top.logps)
    return {"teacher_ids": ids, "teacher_logps": logps}


class _Builder:
    """Collect columns of numbers for the tokens, segments and sequences of a batch."""

    def __init__(self, share_prefix: bool) -> None:
        self.share_prefix = share_prefix
        self.t: dict[str, list[Any]] = {name: [] for name in ("segment", "source", "positions", *_PROMPT)}
        self.parent: list[int] = []
        self.group: list[int] = []
        self.teachers: list[tuple[Sequence[int], TopTokens]] = []  # places in the batch

    def build(self, groups: Sequence[Group]) -> dict[str, Any]:
        completions = [c for g in groups for c in g.completions]
        for index, group in enumerate(g for g in groups if g.completions):
            self._add_group(index, group)
        dtypes = {"mask": np.bool_, "demonstrated": np.bool_, "sampler_logps": np.float32}
        dtypes["ref_logps"] = np.float32
        t: dict[str, Any] = {  # torch.tensor is slower for long lists
            k: torch.from_numpy(np.fromiter(v, dtypes.get(k, np.int64), len(v))) for k, v in self.t.items()
        }
        if not any(c.demonstrated for c in completions):
            del t["demonstrated"]
        if not any(c.logps is not None for c in completions):
            del t["sampler_logps"], t["version"]
        if not completions or any(c.ref_logps is None for c in completions):
            del t["ref_logps"]
        t |= _teachers(self.teachers, len(t["tokens"]))
        columns: dict[str, Sequence[float | tuple[float, ...] | None]] = {
            name: [c.values.get(name) for c in completions]
            for name in sorted({name for c in completions for name in c.values})
        }
        if any(c.turns for c in completions):
            columns["turn_rewards"], columns["turn_states"] = _turn_columns(groups)
        else:
            del t["turn"]
        rewards = None
        if completions and all(c.reward is not None for c in completions):
            rewards = torch.tensor([c.reward for c in completions], dtype=torch.float32)
        return {
            **t,
            "parent": torch.tensor(self.parent, dtype=torch.int64),
            "group": torch.tensor(self.group, dtype=torch.int64),
            "rewards": rewards,
            "truncated": torch.tensor([c.finish == "length" for c in completions], dtype=torch.bool),
            "columns": {name: _column(values) for name, values in columns.items()},
        }

    def _add_group(self, index: int, group: Group) -> None:
        prompt = group.prompt
        if not prompt.tokens:
            raise ValueError(f"prompt {prompt.id} is empty: a prompt needs at least one token")
        first = len(self.group)
        parts = [_Part.of(prompt, c, first + i) for i, c in enumerate(group.completions)]
        self.group += [index] * len(parts)
        if self.share_prefix:
            start = self._add_prompt(prompt, -1, parts)
        for part in parts:
            if not self.share_prefix:
                start = self._add_prompt(prompt, part.sequence, [part])
            part.place[: len(prompt.tokens)] = range(start, start + len(prompt.tokens))
            for branch in part.branches:
                self._add_branch(part, *branch)
        for part in parts:  # a tree's tokens are contiguous: those without the prompt come after it
            for branch in part.apart:
                self._add_branch(part, *branch)
        for part, c in zip(parts, group.completions, strict=True):
            if c.teacher is not None:
                self.teachers.append((part.place[len(prompt.tokens) :], c.teacher))

    def _add_prompt(self, prompt: Prompt, sequence: int, parts: Sequence[_Part]) -> int:
        """Start a tree with the prompt, as far as its completions read it; return where it starts."""
        start, shared = len(self.t["tokens"]), len(prompt.tokens)
        left = {after + 1 for part in parts for _, _, after in part.branches if after < shared}
        if left:
            used = max(left)
            rows: dict[str, Sequence[Any]] = {name: [value] * used for name, value in _PROMPT.items()}
            rows |= {"tokens": prompt.tokens[:used], "sequence": [sequence] * used}
            self._add_run(rows, -1, True, left)
        return start

    def _add_branch(self, part: _Part, start: int, end: int, after: int) -> None:
        """Add the completion's tokens start:end behind position `after` of (prompt + completion)."""
        shared, here = len(part.place) - part.length, len(self.t["tokens"])
        source = part.place[after] if after >= 0 else -1
        part.place[shared + start : shared + end] = range(here, here + end - start)
        alone = part.follows[after] == 1 and not (self.share_prefix and after < shared)
        rows = {name: values[start:end] for name, values in part.rows.items()}
        cuts = {a + 1 - shared - start for a in part.follows}
        self._add_run(rows, source, source != here - 1 or not alone, cuts)

    def _add_run(
        self, rows: Mapping[str, Sequence[Any]], source: int, new: bool, cuts: Iterable[int]
    ) -> None:
        """Add consecutive tokens behind the token `source`; segments begin at the offsets `cuts` and, with
        `new`, at the first token."""
        start, n = len(self.t["tokens"]), len(rows["tokens"])
        if new or source < 0:
            self.parent.append(self.t["segment"][source] if source >= 0 else -1)
        begins = [0, *sorted(c for c in cuts if 0 < c < n), n]
        for i, (a, b) in enumerate(pairwise(begins)):
            if i:
                self.parent.append(len(self.parent) - 1)
            self.t["segment"] += [len(self.parent) - 1] * (b - a)
        position = self.t["positions"][source] + 1 if source >= 0 else 0
        self.t["positions"] += range(position, position + n)
        self.t["source"] += [source, *range(start, start + n - 1)]
        for name, values in rows.items():
            self.t[name] += values


_PROMPT: dict[str, Any] = {  # columns of the tokens, and their values in a prompt
    "tokens": 0,
    "mask": False,
    "sequence": -1,
    "version": -1,
    "turn": -1,
    "demonstrated": False,
    "sampler_logps": 0.0,
    "ref_logps": 0.0,
}


@dataclass(frozen=True)
class _Part:
    """A completion to be laid out: its columns, and its branches (start, end, after), divided into those in
    the prompt's tree and those `apart` from it. place: the index in the batch of each position that is laid
    out. follows: the number of branches that follow a position."""

    sequence: int
    length: int
    rows: Mapping[str, Sequence[Any]]
    branches: list[tuple[int, int, int]]
    apart: list[tuple[int, int, int]]
    place: list[int]
    follows: Mapping[int, int]

    @staticmethod
    def of(prompt: Prompt, c: Completion, sequence: int) -> _Part:
        shared, n = len(prompt.tokens), len(c.tokens)
        if not n:
            raise ValueError(f"a completion of prompt {prompt.id} is empty: it needs at least one token")
        version, turn = [-1] * n, [-1] * n
        for v, a, b in c.versions:
            version[a:b] = [v] * (b - a)
        mask = c.mask or (True,) * n
        for k, (a, b, *_) in enumerate(_turns(prompt, c)):
            turn[a:b] = [k if sampled else -1 for sampled in mask[a:b]]
        rows = {
            "tokens": c.tokens,
            "mask": mask,
            "sequence": (sequence,) * n,
            "version": version,
            "turn": turn,
            "demonstrated": [i < c.demonstrated for i in range(n)],
            "sampler_logps": c.logps or (0.0,) * n,
            "ref_logps": c.ref_logps or (0.0,) * n,
        }
        inside: list[tuple[int, int, int]] = []
        apart: list[tuple[int, int, int]] = []
        branches = c.branches or (Branch(0, shared - 1),)
        for (start, after), end in zip(branches, [*(b.start for b in branches[1:]), n], strict=True):
            known = start < end and -1 <= after < shared + start and branches[0].start == 0
            if not known or (after < 0 and mask[start]):
                raise ValueError(
                    f"a completion of prompt {prompt.id} has the branches {[tuple(b) for b in branches]}: "
                    "the first must start at 0, each must have tokens and follow an earlier one, and the "
                    "first token of a tree (after -1), which nothing predicts, must be masked out"
                )
            behind = any(a <= after - shared < b for a, b, _ in apart)
            (apart if after < 0 or behind else inside).append((start, end, after))
        return _Part(
            sequence, n, rows, inside, apart, [-1] * (shared + n), Counter(b.after for b in branches)
        )


def _turns(prompt: Prompt, c: Completion) -> tuple[Turn, ...]:
    """Return the turns of a session; a completion of a single call is one turn, with its prompt as state."""
    return c.turns or (Turn(0, len(c.tokens), None, prompt.tokens),)


def _turn_columns(groups: Sequence[Group]) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """Return the rewards of all turns (0: none was given), and the numbers of their states, by completion.
    Equal numbers are equal states of one group."""
    numbers: dict[tuple[int, str | tuple[int, ...]], int] = {}
    rewards: list[tuple[float, ...]] = []
    states: list[tuple[float, ...]] = []
    for i, group in enumerate(groups):
        for c in group.completions:
            turns = _turns(group.prompt, c)
            rewards.append(tuple(turn.reward or 0.0 for turn in turns))
            states.append(tuple(float(numbers.setdefault((i, t.state), len(numbers))) for t in turns))
    return rewards, states
