"""The packed `Batch`, which flows through rft with the samples that it is built of.

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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from rft.layout import fields_of
from rft.samples import Branch, Completion, FinishReason, Group, Prompt, Turn

__all__ = ["Batch", "Branch", "Completion", "FinishReason", "Group", "Prompt", "Turn"]

_T, _N, _S = ({"axis": axis} for axis in "TNS")


@dataclass(frozen=True)
class Batch:
    """A forest of T tokens in S segments, holding N sequences. Never mutated: use `with_`.

    Where `mask` is True, `sequence` names one sequence. `logps`-like fields hold, at index t, the
    log-prob of `tokens[t]`; they are 0 where the mask is False.
    """

    tokens: torch.Tensor = field(metadata=_T)  # [T] int64
    positions: torch.Tensor = field(metadata=_T)  # [T] int64
    segment: torch.Tensor = field(metadata=_T)  # [T] int64, contiguous, ascending from 0
    source: torch.Tensor = field(metadata=_T)  # [T] int64, -1 for the first token of a tree
    mask: torch.Tensor = field(metadata=_T)  # [T] bool, True where the loss may act
    sequence: torch.Tensor = field(metadata=_T)  # [T] int64 in -1..N-1
    parent: torch.Tensor = field(metadata=_S)  # [S] int64, -1 for a root; a parent precedes its children
    group: torch.Tensor = field(metadata=_N)  # [N] int64, contiguous, ascending from 0
    rewards: torch.Tensor | None = field(default=None, metadata=_N)  # [N] float32
    truncated: torch.Tensor | None = field(default=None, metadata=_N)  # [N] bool, ran into the length limit
    version: torch.Tensor | None = field(default=None, metadata=_T)  # [T] int64, -1 where not sampled
    turn: torch.Tensor | None = field(default=None, metadata=_T)  # [T] int64, -1 where not sampled
    demonstrated: torch.Tensor | None = field(default=None, metadata=_T)  # [T] bool, from a demonstration
    sampler_logps: torch.Tensor | None = field(default=None, metadata=_T)  # [T] float32
    old_logps: torch.Tensor | None = field(default=None, metadata=_T)  # [T] float32, policy before the step
    ref_logps: torch.Tensor | None = field(default=None, metadata=_T)  # [T] float32, frozen reference
    teacher_ids: torch.Tensor | None = field(default=None, metadata=_T)  # [T, K] int64, -1: none
    teacher_logps: torch.Tensor | None = field(default=None, metadata=_T)  # [T, K] float32
    old_entropy: torch.Tensor | None = field(default=None, metadata=_T)  # [T] float32, before the step
    values: torch.Tensor | None = field(default=None, metadata=_T)  # [T] float32, critic before the step
    end_values: torch.Tensor | None = field(default=None, metadata=_T)  # [T] float32, see `PolicyOutput`
    returns: torch.Tensor | None = field(default=None, metadata=_T)  # [T] float32
    advantages: torch.Tensor | None = field(default=None, metadata=_T)  # [T] float32
    labels: torch.Tensor | None = field(default=None, metadata=_T)  # [T] float32, steps: right 1, wrong 0
    support: torch.Tensor | None = field(default=None, metadata=_T)  # [T, V/8] uint8, see `kept_tokens`
    weight: torch.Tensor | None = field(default=None, metadata=_T)  # [T] float32, share of the objective
    columns: Mapping[str, torch.Tensor] = field(default_factory=dict)  # each [N, ...]
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
    def tree(self) -> torch.Tensor:
        """[S] int64: the tree that each segment belongs to, counted from 0."""
        return (self.parent < 0).cumsum(0) - 1

    @property
    def lengths(self) -> torch.Tensor:
        """[N] float32: the number of masked-in tokens of each sequence."""
        return self.sum_by_sequence(torch.ones_like(self.tokens, dtype=torch.float32))

    # -- between tokens and sequences --------------------------------------------------------------

    def sum_by_sequence(self, x: torch.Tensor) -> torch.Tensor:
        """Sum a per-token tensor [T] over each sequence's masked-in tokens: [N]."""
        index = self.sequence[self.mask]
        return x.new_zeros(self.num_sequences).index_add(0, index, x[self.mask])

    def mean_by_sequence(self, x: torch.Tensor) -> torch.Tensor:
        """Mean of a per-token tensor [T] over each sequence's masked-in tokens: [N]; 0 if it has none."""
        return self.sum_by_sequence(x) / self.lengths.clamp(min=1)

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Spread a per-sequence tensor [N] over the sequences' masked-in tokens: [T], 0 elsewhere."""
        out = x.new_zeros(self.num_tokens)
        return out.masked_scatter(self.mask, x[self.sequence[self.mask]])

    def old_logps_or(self, logps: torch.Tensor) -> torch.Tensor:
        """Return the behaviour policy's log-probs [T]: `old_logps`, or `logps`, detached, if the batch is
        used for a single update and the two are equal."""
        return logps.detach() if self.old_logps is None else self.old_logps

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sequence indices ([P], [P]) of (preferred, other): within each group, sequences ordered by
        reward, each with the next lower one. Equal rewards do not form a pair. Raises ValueError if the batch
        has no rewards."""
        if self.rewards is None:
            raise ValueError("preference pairs need rewards; this batch has none")
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
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **changes, columns={k: v.to(device) for k, v in self.columns.items()})

    def select(self, trees: Iterable[int]) -> Batch:
        """Return the batch of the given trees, in ascending order, with all ids renumbered."""
        wanted = torch.zeros(int((self.parent < 0).sum()), dtype=torch.bool)
        wanted[torch.as_tensor(list(trees), dtype=torch.int64)] = True
        return self._of_segments(wanted.to(self.tokens.device)[self.tree])

    def pruned(self, keep: torch.Tensor) -> tuple[Batch, torch.Tensor]:
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

    def _of_segments(self, keep_s: torch.Tensor) -> Batch:
        """Return the batch of the segments [S] bool; the parent of each one must be selected too."""
        keep_t = keep_s[self.segment]
        kept = self.sequence[keep_t & (self.sequence >= 0)]
        keep_n = torch.zeros(self.num_sequences, dtype=torch.bool, device=self.tokens.device)
        keep_n[kept] = True
        keep = {"T": keep_t, "N": keep_n, "S": keep_s}
        changes: dict[str, Any] = {
            f.name: value[keep[f.metadata["axis"]]]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        for name, mask in (("segment", keep_s), ("parent", keep_s), ("source", keep_t), ("sequence", keep_n)):
            changes[name] = _renumber(changes[name], mask)
        changes["group"] = torch.unique(changes["group"], return_inverse=True)[1]
        return replace(self, **changes, columns={k: v[keep_n] for k, v in self.columns.items()})

    def select_groups(self, groups: torch.Tensor) -> Batch:
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
        return Batch(**fields_of(groups, share_prefix=share_prefix))


def _renumber(ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Renumber ids over the kept entries; negative ids are unchanged."""
    new = keep.to(torch.int64).cumsum(0) - 1
    return torch.where(ids >= 0, new[ids.clamp(min=0)], ids)
