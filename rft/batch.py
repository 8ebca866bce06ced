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

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
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
        Groups without completions are left out; a completion that lacks one of the others' `values` has nan
        in that column. Raises ValueError for a prompt or a completion without tokens."""
        return _Builder(share_prefix).build(groups)


def _renumber(ids: Tensor, keep: Tensor) -> Tensor:
    """Renumber ids over the kept entries; negative ids are unchanged."""
    new = keep.to(torch.int64).cumsum(0) - 1
    return torch.where(ids >= 0, new[ids.clamp(min=0)], ids)


def _column(values: Sequence[float | tuple[float, ...] | None]) -> Tensor:
    """[N] float32, or [N, K] if the values are tuples; nan for missing values and at the end of shorter
    tuples."""
    rows = [v if isinstance(v, tuple) else (float("nan") if v is None else v,) for v in values]
    width = max(len(row) for row in rows)
    padded = torch.tensor([[*row, *[float("nan")] * (width - len(row))] for row in rows], dtype=torch.float32)
    return padded if any(isinstance(v, tuple) for v in values) else padded.squeeze(1)


class _Builder:
    """Collect columns of numbers for `Batch.build`."""

    def __init__(self, share_prefix: bool) -> None:
        self.share_prefix = share_prefix
        self.t: dict[str, list[Any]] = {
            name: []
            for name in (
                "tokens",
                "positions",
                "segment",
                "source",
                "mask",
                "sequence",
                "version",
                "demonstrated",
                "sampler_logps",
                "ref_logps",
            )
        }
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
        names = sorted({name for c in completions for name in c.values})
        rewards = None
        if completions and all(c.reward is not None for c in completions):
            rewards = torch.tensor([c.reward for c in completions], dtype=torch.float32)
        return Batch(
            **t,
            parent=torch.tensor(self.parent, dtype=torch.int64),
            group=torch.tensor(self.group, dtype=torch.int64),
            rewards=rewards,
            truncated=torch.tensor([c.finish == "length" for c in completions], dtype=torch.bool),
            columns={n: _column([c.values.get(n) for c in completions]) for n in names},
        )

    def _add_group(self, index: int, group: Group) -> None:
        prompt = group.prompt
        if not prompt.tokens:
            raise ValueError(f"prompt {prompt.id} is empty: a prompt needs at least one token")
        root = self._add_prompt(prompt, sequence=-1) if self.share_prefix else None
        for completion in group.completions:
            if completion.branches:
                raise ValueError(f"a completion of prompt {prompt.id} has branches")
            if not completion.tokens:
                raise ValueError(f"a completion of prompt {prompt.id} is empty: it needs at least one token")
            sequence = len(self.group)
            self.group.append(index)
            if root is None:
                self._add_prompt(prompt, sequence)
                self._add_completion(prompt, completion, sequence, segment=len(self.parent) - 1)
            else:
                segment, last = root
                self.parent.append(segment)
                self._add_completion(prompt, completion, sequence, len(self.parent) - 1, source=last)

    def _add_prompt(self, prompt: Prompt, sequence: int) -> tuple[int, int]:
        """Start a tree; return (its segment, the index of the prompt's last token)."""
        start, n = len(self.t["tokens"]), len(prompt.tokens)
        self.parent.append(-1)
        segment = len(self.parent) - 1
        rows = {
            "tokens": prompt.tokens,
            "positions": range(n),
            "segment": [segment] * n,
            "source": [-1, *range(start, start + n - 1)],
            "mask": [False] * n,
            "sequence": [sequence] * n,
            "version": [-1] * n,
            "demonstrated": [False] * n,
            "sampler_logps": [0.0] * n,
            "ref_logps": [0.0] * n,
        }
        self._extend(rows)
        return segment, start + n - 1

    def _add_completion(
        self, prompt: Prompt, c: Completion, sequence: int, segment: int, source: int | None = None
    ) -> None:
        start, n = len(self.t["tokens"]), len(c.tokens)
        version = [-1] * n
        for v, a, b in c.versions:
            version[a:b] = [v] * (b - a)
        rows = {
            "tokens": c.tokens,
            "positions": range(len(prompt.tokens), len(prompt.tokens) + n),
            "segment": [segment] * n,
            "source": [start - 1 if source is None else source, *range(start, start + n - 1)],
            "mask": c.mask or [True] * n,
            "sequence": [sequence] * n,
            "version": version,
            "demonstrated": [i < c.demonstrated for i in range(n)],
            "sampler_logps": c.logps or [0.0] * n,
            "ref_logps": c.ref_logps or [0.0] * n,
        }
        self._extend(rows)

    def _extend(self, rows: Mapping[str, Iterable[Any]]) -> None:
        for name, values in rows.items():
            self.t[name].extend(values)
