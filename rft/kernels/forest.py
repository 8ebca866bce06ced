"""The structure of a packed forest for attention: which tokens attend to which, in few large blocks.

A token attends to the earlier tokens of its segment and to all tokens of its segment's ancestors.
A segment that has a single child is joined with it into one *run*, which is plain causal attention
over its tokens. Each run then needs one causal block for its tokens and one dense block per ancestor
run. Blocks of similar size are rows of one padded batch, so that 256 short sequences are a handful of
calls. Queries may be padded (their results are dropped), and so may keys of causal blocks (they come
after every real query); keys of dense blocks never are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

MASK_BUDGET = 1 << 24  # elements of one boolean mask [B, L, L]; larger groups of trees are split


@dataclass(frozen=True)
class Rows:
    """B rows of up to L tokens, as indices into the packed batch.

    index: [B * L] int64, the token at each position; padding repeats the row's last token.
    kept: [n] int64, the positions that are not padding, or None if all are real.
    start: the first token if the rows are a contiguous stretch, which needs no copy.
    """

    count: int
    width: int
    index: Tensor
    kept: Tensor | None
    start: int | None

    @staticmethod
    def of(rows: Sequence[Sequence[int]], device: torch.device) -> Rows:
        width = max(len(row) for row in rows)
        padded = [i for row in rows for i in (*row, *[row[-1]] * (width - len(row)))]
        index = torch.tensor(padded, dtype=torch.int64)
        kept = None
        if any(len(row) < width for row in rows):
            lengths = torch.tensor([len(row) for row in rows])
            kept = (torch.arange(width) < lengths[:, None]).flatten().nonzero().flatten().to(device)
        contiguous = kept is None and padded == list(range(padded[0], padded[0] + len(padded)))
        return Rows(len(rows), width, index.to(device), kept, padded[0] if contiguous else None)

    @cached_property
    def tokens(self) -> Tensor:
        """[n] int64: the tokens at the real positions, in order."""
        return self.index if self.kept is None else self.index[self.kept]

    @cached_property
    def valid(self) -> Tensor | None:
        """[B, L, 1, 1] bool: the real positions, or None if all are real."""
        if self.kept is None:
            return None
        valid = torch.zeros(self.count * self.width, dtype=torch.bool, device=self.index.device)
        return valid.index_fill_(0, self.kept, True).view(self.count, self.width, 1, 1)

    def covers(self, num_tokens: int) -> bool:
        """True if the rows are the whole packed batch in its order."""
        return self.start == 0 and self.index.numel() == num_tokens

    def take(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, L, ...]."""
        if self.start is not None:
            flat = x.narrow(0, self.start, self.index.numel())
        else:
            flat = x.index_select(0, self.index)
        return flat.unflatten(0, (self.count, self.width))

    def flat(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [n, ...]: drop the padding."""
        x = x.flatten(0, 1)
        return x if self.kept is None else x.index_select(0, self.kept)

    def read(self, x: Tensor) -> Tensor:
        """[T, ...] -> [n, ...]: a view where the tokens are contiguous."""
        if self.start is not None:
            return x.narrow(0, self.start, self.index.numel())
        return x.index_select(0, self.tokens)

    def write(self, x: Tensor, value: Tensor) -> None:
        """x[tokens] = value, in place, for `value` [n, ...]."""
        if self.start is not None:
            x.narrow(0, self.start, self.index.numel()).copy_(value)
        else:
            x.index_copy_(0, self.tokens, value.to(x.dtype))

    def add(self, x: Tensor, value: Tensor) -> None:
        """x[tokens] += value, in place; tokens are distinct within a block."""
        if self.start is not None:
            x.narrow(0, self.start, self.index.numel()).add_(value)
        else:
            x.index_copy_(0, self.tokens, x.index_select(0, self.tokens).add_(value))


@dataclass(frozen=True)
class Block:
    """One batched attention call, causal or dense."""

    queries: Rows
    keys: Rows
    causal: bool


@dataclass(frozen=True)
class Stretch:
    """A block for a variable-length kernel: [n] tokens with cumulative lengths [R + 1] int32.

    `queries` and `keys` are None if they are all tokens in order.
    """

    queries: Tensor | None
    keys: Tensor | None
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    causal: bool


@dataclass(frozen=True)
class Trees:
    """Whole trees as padded rows, for attention with an explicit mask."""

    rows: Rows
    segment: Tensor  # [B, L] int64
    position: Tensor  # [B, L] int64


@dataclass
class Forest:
    """The layout of one packed batch: segment, positions: [T] int64; parent: [S] int64, as in
    `rft.batch.Batch`. Blocks, stretches and masks are computed once, on first use.

    Raises ValueError unless a segment's parent precedes it within the same tree.
    """

    segment: Tensor
    parent: Tensor
    positions: Tensor
    _masks: dict[tuple[int, int | None, int | None], Tensor] = field(default_factory=dict)
    block_masks: dict[tuple[int, int | None, int | None], Any] = field(default_factory=dict)  # attention_flex

    def __post_init__(self) -> None:
        root = -1
        for s, p in enumerate(self._parents):
            root = s if p < 0 else root
            if p >= 0 and not root <= p < s:
                raise ValueError(f"segment {s} continues segment {p}, outside the tree that starts at {root}")

    @cached_property
    def _parents(self) -> list[int]:
        return self.parent.tolist()

    @property
    def num_tokens(self) -> int:
        return self.segment.numel()

    @property
    def device(self) -> torch.device:
        return self.segment.device

    @cached_property
    def longest(self) -> int:
        """Largest position plus one: a window or chunk at least that wide never binds."""
        return int(self.positions.max()) + 1 if self.num_tokens else 0

    @cached_property
    def shared(self) -> bool:
        """True if any segment continues another."""
        return bool((self.parent >= 0).any())

    @cached_property
    def _runs(self) -> tuple[list[list[int]], list[int]]:
        """Return the tokens of each run, and the parent run (-1: none). Parents precede children."""
        parents = self._parents
        ends = torch.bincount(self.segment.cpu(), minlength=len(parents)).cumsum(0).tolist()
        children = [0] * len(parents)
        for p in parents:
            if p >= 0:
                children[p] += 1
        runs: list[list[int]] = []
        above: list[int] = []
        run_of: list[int] = []
        for s, p in enumerate(parents):
            tokens = range(ends[s - 1] if s else 0, ends[s])
            if p >= 0 and children[p] == 1:
                run_of.append(run_of[p])
                runs[run_of[p]].extend(tokens)
            else:
                run_of.append(len(runs))
                runs.append(list(tokens))
                above.append(run_of[p] if p >= 0 else -1)
        return runs, above

    @cached_property
    def _below(self) -> list[tuple[int, list[int], list[int]]]:
        """List (depth, tokens of the descendants, tokens of the run) of every run with descendants."""
        runs, above = self._runs
        below: list[list[int]] = [[] for _ in runs]
        depth = [0] * len(runs)
        for r, p in enumerate(above):
            depth[r] = depth[p] + 1 if p >= 0 else 0
            while p >= 0:
                below[p].extend(runs[r])
                p = above[p]
        return [(depth[r], sorted(b), runs[r]) for r, b in enumerate(below) if b and runs[r]]

    @cached_property
    def blocks(self) -> list[Block]:
        """Causal blocks that cover every token once, then dense blocks between runs and their ancestors."""
        runs, _ = self._runs
        out = []
        for row in _similar([run for run in runs if run]):
            rows = Rows.of(row, self.device)
            out.append(Block(rows, rows, causal=True))
        dense: dict[tuple[int, int], list[tuple[list[int], list[int]]]] = {}
        for depth, below, lengths in self._below:
            dense.setdefault((depth, len(lengths)), []).append((below, lengths))
        for pairs in dense.values():
            key_of = {below[0]: lengths for below, lengths in pairs}
            for row in _similar([below for below, _ in pairs]):
                keys = Rows.of([key_of[below[0]] for below in row], self.device)
                out.append(Block(Rows.of(row, self.device), keys, causal=False))
        return out

    @cached_property
    def stretches(self) -> list[Stretch]:
        """The same attention for variable-length kernels: one causal call, and one dense call per depth."""
        runs = [run for run in self._runs[0] if run]
        out = [self._stretch(runs, runs, causal=True)]
        levels: dict[int, tuple[list[list[int]], list[list[int]]]] = {}
        for depth, below, lengths in self._below:
            queries, keys = levels.setdefault(depth, ([], []))
            queries.append(below)
            keys.append(lengths)
        return out + [self._stretch(q, k, causal=False) for q, k in levels.values()]

    def _stretch(self, queries: list[list[int]], keys: list[list[int]], causal: bool) -> Stretch:
        def parts(rows: list[list[int]]) -> tuple[Tensor | None, Tensor, int]:
            lengths = torch.tensor([0] + [len(row) for row in rows], dtype=torch.int32)
            tokens = [i for row in rows for i in row]
            whole = tokens == list(range(self.num_tokens))
            index = None if whole else torch.tensor(tokens, dtype=torch.int64, device=self.device)
            return index, lengths.cumsum(0, dtype=torch.int32).to(self.device), int(lengths.max())

        q, cu_q, max_q = parts(queries)
        k, cu_k, max_k = parts(keys)
        return Stretch(q, k, cu_q, cu_k, max_q, max_k, causal)

    # -- explicit masks ----------------------------------------------------------------------------

    @cached_property
    def trees(self) -> list[Trees]:
        """Every tree once, grouped by similar size."""
        tree = ((self.parent < 0).cumsum(0) - 1)[self.segment].cpu()
        ends = torch.bincount(tree).cumsum(0).tolist()
        rows = [list(range(a, b)) for a, b in zip([0, *ends], ends, strict=False) if b > a]
        out = []
        for row in _similar(rows):
            per_call = max(1, MASK_BUDGET // max(len(row[0]), len(row[-1])) ** 2)
            for start in range(0, len(row), per_call):
                part = Rows.of(row[start : start + per_call], self.device)
                shape = (part.count, part.width)
                segment, position = (x[part.index].view(shape) for x in (self.segment, self.positions))
                out.append(Trees(part, segment, position))
        return out

    @cached_property
    def sees(self) -> Tensor:
        """[S, S] bool: `sees[a, b]` is True if segment `a` is `b` or a descendant of it."""
        parents = self._parents
        sees = torch.eye(len(parents), dtype=torch.bool)
        for s, p in enumerate(parents):
            if p >= 0:
                sees[s] |= sees[p]
        return sees.to(self.device)

    def mask(self, which: int, window: int | None = None, chunk: int | None = None) -> Tensor:
        """[B, 1, L, L] bool for `trees[which]`: True where a query (row) attends to a key (column).

        window: only keys fewer than `window` positions back. chunk: only keys in the query's chunk, i.e. with
        the same position // chunk. Both count position ids, not indices into the packed batch.
        """
        key = (which, window, chunk)
        if key not in self._masks:
            trees = self.trees[which]
            pos, width = trees.position, trees.rows.width
            place = torch.arange(width, device=self.device)
            mask = self.sees[trees.segment[:, :, None], trees.segment[:, None, :]]
            mask = mask & (place[:, None] >= place)
            if window is not None:
                mask = mask & (pos[:, :, None] - pos[:, None, :] < window)
            if chunk is not None:
                mask = mask & (pos[:, :, None] // chunk == pos[:, None, :] // chunk)
            self._masks[key] = mask[:, None]
        return self._masks[key]

    def paths(self) -> list[list[int]]:
        """The tokens of every sequence from root to leaf: the forest without sharing."""
        parents = self._parents
        ends = torch.bincount(self.segment.cpu(), minlength=len(parents)).cumsum(0).tolist()
        inner = set(parents)
        tokens: list[list[int]] = []
        for s, p in enumerate(parents):
            indices = list(range(ends[s - 1] if s else 0, ends[s]))
            tokens.append((tokens[p] if p >= 0 else []) + indices)
        return [path for s, path in enumerate(tokens) if s not in inner and path]

    @cached_property
    def path_rows(self) -> list[Rows]:
        """The paths as padded rows, grouped by similar length."""
        return [Rows.of(rows, self.device) for rows in _similar(self.paths())]


def _similar(rows: Sequence[list[int]]) -> list[list[list[int]]]:
    """Group rows of similar length to limit padding; rows of equal length keep their order."""
    out: list[list[list[int]]] = []
    for row in sorted(rows, key=len):
        if out and len(row) <= 1.2 * len(out[-1][0]) + 8:
            out[-1].append(row)
        else:
            out.append([row])
    return out
