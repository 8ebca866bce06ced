"""The types that flow through rft: `Prompt`, `Completion`, `Group` and the packed `Batch`.

A `Batch` is flat over T tokens, without padding, and every algorithm sees the same layout. Its tokens
form a forest of segments. A segment is a contiguous run of tokens; it either starts a tree (parent -1)
or continues the segment `parent`. A token attends to the earlier tokens of its segment and to all of
its segment's ancestors. Plain packing (all roots), a prompt shared by the two completions of a
preference pair, and a prompt shared by G rollouts differ only in `parent`.

Example: prompt `p0 p1` shared by the completions `a0 a1` and `b0` (N = 2 sequences, S = 3 segments):

    tokens     p0 p1 a0 a1 b0        parent   -1  0  0
    segment     0  0  1  1  2        group     0  0
    positions   0  1  2  3  2
    source     -1  0  1  2  1        the index whose hidden state predicts this token
    sequence   -1 -1  0  0  1        -1: shared by several sequences
    mask        F  F  T  T  T
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

FinishReason = Literal["stop", "length", "demonstration"]


@dataclass(frozen=True)
class Prompt:
    """One row of a dataset, tokenised.

    `id` is stable over epochs and resumes. `text` is passed to the rewards: a string, or a list of
    chat messages. `columns` are the row's other columns, passed to rewards by name.
    """

    id: int
    tokens: tuple[int, ...]
    text: str | list[dict[str, Any]]
    columns: Mapping[str, Any] = field(default_factory=dict)


class Branch(NamedTuple):
    """The tokens of a completion from `start` to the next branch's start follow position `after` of (prompt +
    completion), which may lie in the prompt; -1: they start a tree without the prompt."""

    start: int
    after: int


class Turn(NamedTuple):
    """The tokens start:end of a completion that one call of its session sampled (none for a call that is not
    trained), the part of the session's reward that the turn earned, and the state in which it was sampled."""

    start: int
    end: int
    reward: float | None
    state: Hashable


@dataclass(frozen=True)
class Completion:
    """One response to a prompt: sampled by an engine, or read from a dataset.

    `logps[i]` is the sampler's log-prob of `tokens[i]` (None: not sampled), `ref_logps[i]` the reference's,
    if precomputed. `mask[i]` says whether the loss may act on `tokens[i]` (None: on all). The first
    `demonstrated` tokens come from a demonstration instead of the policy. `versions` are (policy version,
    start, end) spans.
    `reward` is the combined reward; None means that it could not be judged (never a zero).
    `values` are further per-sequence numbers for the algorithm (a margin, a reward vector); nan: unknown.
    A session has `turns`, one for each of its model calls, and `branches` if one call's prompt did not extend
    the call before; `tokens` are those of all branches. No branches: the tokens follow the prompt's last.
    """

    tokens: tuple[int, ...]
    text: str = ""
    finish: FinishReason = "stop"
    logps: tuple[float, ...] | None = None
    ref_logps: tuple[float, ...] | None = None
    mask: tuple[bool, ...] | None = None
    demonstrated: int = 0
    versions: tuple[tuple[int, int, int], ...] = ()
    reward: float | None = None
    scores: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    branches: tuple[Branch, ...] = ()
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Group:
    """A prompt with its completions: G rollouts, a preference pair, or a single demonstration."""

    prompt: Prompt
    completions: tuple[Completion, ...]


_T, _N, _S = ({"axis": axis} for axis in "TNS")


@dataclass(frozen=True)
class Batch:
    """A forest of T tokens in S segments, holding N sequences. Never mutated: use `with_`.

    Where `mask` is True, `sequence` names one sequence. `logps`-like fields hold, at index t, the
    log-prob of `tokens[t]`; they are 0 where the mask is False.
    """

    tokens: Tensor = field(metadata=_T)  # [T] int64
    positions: Tensor = field(metadata=_T)  # [T] int64
    segment: Tensor = field(metadata=_T)  # [T] int64, contiguous, ascending from 0
    source: Tensor = field(metadata=_T)  # [T] int64, -1 for the first token of a tree
    mask: Tensor = field(metadata=_T)  # [T] bool, True where the loss may act
    sequence: Tensor = field(metadata=_T)  # [T] int64 in -1..N-1
    parent: Tensor = field(metadata=_S)  # [S] int64, -1 for a root; a parent precedes its children
    group: Tensor = field(metadata=_N)  # [N] int64, contiguous, ascending from 0
    rewards: Tensor | None = field(default=None, metadata=_N)  # [N] float32
    truncated: Tensor | None = field(default=None, metadata=_N)  # [N] bool, ran into the length limit
    version: Tensor | None = field(default=None, metadata=_T)  # [T] int64, -1 where not sampled
    turn: Tensor | None = field(default=None, metadata=_T)  # [T] int64, of the session; -1 where not sampled
    demonstrated: Tensor | None = field(default=None, metadata=_T)  # [T] bool, from a demonstration
    sampler_logps: Tensor | None = field(default=None, metadata=_T)  # [T] float32
    old_logps: Tensor | None = field(default=None, metadata=_T)  # [T] float32, policy before the step
    ref_logps: Tensor | None = field(default=None, metadata=_T)  # [T] float32, frozen reference
    old_entropy: Tensor | None = field(default=None, metadata=_T)  # [T] float32, before the step
    values: Tensor | None = field(default=None, metadata=_T)  # [T] float32, critic before the step
    end_values: Tensor | None = field(default=None, metadata=_T)  # [T] float32, see `PolicyOutput`
    returns: Tensor | None = field(default=None, metadata=_T)  # [T] float32
    advantages: Tensor | None = field(default=None, metadata=_T)  # [T] float32
    labels: Tensor | None = field(default=None, metadata=_T)  # [T] float32, right (1) or wrong (0) steps
    weight: Tensor | None = field(default=None, metadata=_T)  # [T] float32, share of the step's objective
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # each [N, ...]
    state: Mapping[str, float] = field(default_factory=dict)  # `progress` in [0, 1], algorithm state

    # -- sizes -------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()

    @property
    def num_sequences(self) -> int:
        return self.group.numel()

    @property
    def num_groups(self) -> int:
        return int(self.group[-1]) + 1 if self.group.numel() else 0

    @property
    def tree(self) -> Tensor:
        """[S] int64: the tree that each segment belongs to, counted from 0."""
        return (self.parent < 0).cumsum(0) - 1

    @property
    def lengths(self) -> Tensor:
        """[N] float32: the number of masked-in tokens of each sequence."""
        return self.sum_by_sequence(torch.ones_like(self.tokens, dtype=torch.float32))

    # -- between tokens and sequences --------------------------------------------------------------

    def sum_by_sequence(self, x: Tensor) -> Tensor:
        """Sum a per-token tensor [T] over each sequence's masked-in tokens: [N]."""
        index = self.sequence[self.mask]
        return x.new_zeros(self.num_sequences).index_add(0, index, x[self.mask])

    def mean_by_sequence(self, x: Tensor) -> Tensor:
        """Mean of a per-token tensor [T] over each sequence's masked-in tokens: [N]; 0 if it has none."""
        return self.sum_by_sequence(x) / self.lengths.clamp(min=1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Spread a per-sequence tensor [N] over the sequences' masked-in tokens: [T], 0 elsewhere."""
        out = x.new_zeros(self.num_tokens)
        return out.masked_scatter(self.mask, x[self.sequence[self.mask]])

    def old_logps_or(self, logps: Tensor) -> Tensor:
        """Return the behaviour policy's log-probs [T]: `old_logps`, or `logps`, detached, if the batch is
        used for a single update and the two are equal."""
        return logps.detach() if self.old_logps is None else self.old_logps

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return sequence indices ([P], [P]) of (preferred, other): within each group, sequences ordered by
        reward, each with the next lower one. Equal rewards do not form a pair. Raises ValueError if the batch
        has no rewards."""
        if self.rewards is None:
            raise ValueError("preference pairs need rewards; this batch carries none")
        order = torch.argsort(self.rewards, descending=True, stable=True)
        order = order[torch.argsort(self.group[order], stable=True)]
        first, second = order[:-1], order[1:]
        keep = (self.group[first] == self.group[second]) & (self.rewards[first] > self.rewards[second])
        return first[keep], second[keep]

    # -- new batches -------------------------------------------------------------------------------

    def with_(self, **changes: Any) -> Batch:
        """Return a copy with some fields replaced."""
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> Batch:
        """Return a copy with every tensor on `device`."""
        changes: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **changes, columns={k: v.to(device) for k, v in self.columns.items()})

    def select(self, trees: Iterable[int]) -> Batch:
        """Return the batch of the given trees, in ascending order, with all ids renumbered."""
        wanted = torch.zeros(int((self.parent < 0).sum()), dtype=torch.bool)
        wanted[torch.as_tensor(list(trees), dtype=torch.int64)] = True
        return self._of_segments(wanted.to(self.tokens.device)[self.tree])

    def pruned(self, keep: Tensor) -> tuple[Batch, Tensor]:
        """Drop segments that neither contain a token of `keep` [T] bool nor are ancestors of such a segment.
        Returns the batch and [T'] int64, the indices of its tokens in this one. Kept tokens never attend to
        dropped ones."""
        keep_s = torch.zeros_like(self.parent, dtype=torch.bool)
        keep_s[self.segment[keep]] = True
        above = self.parent[keep_s & (self.parent >= 0)]
        while above.numel():
            keep_s[above] = True
            above = self.parent[above]
            above = above[above >= 0]
        return self._of_segments(keep_s), keep_s[self.segment].nonzero()[:, 0]

    def _of_segments(self, keep_s: Tensor) -> Batch:
        """Return the batch of the segments [S] bool; the parent of each one must be selected too."""
        keep_t = keep_s[self.segment]
        kept = self.sequence[keep_t & (self.sequence >= 0)]
        keep_n = torch.zeros(self.num_sequences, dtype=torch.bool, device=self.tokens.device)
        keep_n[kept] = True
        keep = {"T": keep_t, "N": keep_n, "S": keep_s}
        changes: dict[str, Any] = {
            f.name: value[keep[f.metadata["axis"]]]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        for name, mask in (("segment", keep_s), ("parent", keep_s), ("source", keep_t), ("sequence", keep_n)):
            changes[name] = _renumber(changes[name], mask)
        changes["group"] = torch.unique(changes["group"], return_inverse=True)[1]
        return replace(self, **changes, columns={k: v[keep_n] for k, v in self.columns.items()})

    def select_groups(self, groups: Tensor) -> Batch:
        """Return the batch of the given groups (indices [K]), with the trees that contain them."""
        token_group = torch.where(self.sequence >= 0, self.group[self.sequence.clamp(min=0)], -1)
        chosen = torch.isin(token_group, groups.to(token_group.device))
        return self.select(torch.unique(self.tree[self.segment[chosen]]).tolist())

    @staticmethod
    def build(groups: Sequence[Group], *, share_prefix: bool = False) -> Batch:
        """Pack groups into one batch. With `share_prefix` a group is one tree (its prompt once, each
        completion a child segment); without, each completion is a separate tree that repeats the prompt.
        Branches of a completion are children of the segments that they leave, which end there; a prompt ends
        where the last completion leaves it. Completions with `turns` fill in `turn` and, padded with nan,
        the columns `turn_rewards` and `turn_states` [N, K]: equal numbers are equal states of one group.
        Groups without completions are left out; a completion that lacks one of the others' `values` has nan
        in that column. Raises ValueError for a prompt or a completion without tokens, or if a branch follows
        a later token."""
        return _Builder(share_prefix).build(groups)


def _renumber(ids: Tensor, keep: Tensor) -> Tensor:
    """Renumber ids over the kept entries; negative ids are unchanged."""
    new = keep.to(torch.int64).cumsum(0) - 1
    return torch.where(ids >= 0, new[ids.clamp(min=0)], ids)


def _column(values: Sequence[float | tuple[float, ...] | None]) -> Tensor:
    """[N] float32, or [N, K] if the values are tuples; nan for missing values and at the end of shorter
    tuples."""
    rows = [v if isinstance(v, tuple) else (float("nan") if v is None else v,) for v in values]
    width = max(1, *(len(row) for row in rows))
    padded = torch.tensor([[*row, *[float("nan")] * (width - len(row))] for row in rows], dtype=torch.float32)
    return padded if any(isinstance(v, tuple) for v in values) else padded.squeeze(1)


class _Builder:
    """Collect columns of numbers for `Batch.build`."""

    def __init__(self, share_prefix: bool) -> None:
        self.share_prefix = share_prefix
        self.t: dict[str, list[Any]] = {name: [] for name in ("segment", "source", "positions", *_PROMPT)}
        self.parent: list[int] = []
        self.group: list[int] = []

    def build(self, groups: Sequence[Group]) -> Batch:
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
        columns: dict[str, Sequence[float | tuple[float, ...] | None]] = {
            name: [c.values.get(name) for c in completions]
            for name in sorted({name for c in completions for name in c.values})
        }
        if any(c.turns for c in completions):
            columns["turn_rewards"] = [tuple(turn.reward or 0.0 for turn in c.turns) for c in completions]
            columns["turn_states"] = _state_numbers(groups)
        else:
            del t["turn"]
        rewards = None
        if completions and all(c.reward is not None for c in completions):
            rewards = torch.tensor([c.reward for c in completions], dtype=torch.float32)
        return Batch(
            **t,
            parent=torch.tensor(self.parent, dtype=torch.int64),
            group=torch.tensor(self.group, dtype=torch.int64),
            rewards=rewards,
            truncated=torch.tensor([c.finish == "length" for c in completions], dtype=torch.bool),
            columns={name: _column(values) for name, values in columns.items()},
        )

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
        for k, (a, b, *_) in enumerate(c.turns):
            turn[a:b] = [k] * (b - a)
        mask = c.mask or (True,) * n
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


def _state_numbers(groups: Sequence[Group]) -> list[tuple[float, ...]]:
    """Number the states of all turns, by completion: equal numbers are equal states of one group."""
    numbers: dict[tuple[int, Hashable], int] = {}
    return [
        tuple(float(numbers.setdefault((i, turn.state), len(numbers))) for turn in c.turns)
        for i, group in enumerate(groups)
        for c in group.completions
    ]
