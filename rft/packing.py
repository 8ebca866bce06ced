"""Packing: assign the trees of a batch to micro-batches and ranks.

Pure functions over plain numbers. A tree (a prompt with its continuations) is never split, so that a
shared prefix is computed once on any rank. Micro-batches are filled best-fit decreasing
up to a number of tokens; over several ranks they are balanced by floating-point work, in rows: the
j-th micro-batches of all ranks cost about the same, because ranks wait for each other in each one.

    for trees in micro_batches(batch, max_tokens=16384)[rank]:
        part = batch.select(trees)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rft.batch import Batch
from rft.work import tree_costs, tree_tokens


def micro_batches(
    batch: Batch,
    max_tokens: int,
    ranks: int = 1,
    *,
    keep_groups: bool = False,
    hidden_size: int = 1024,
) -> list[list[list[int]]]:
    """Split a batch into micro-batches of whole trees: `[rank][micro-batch] -> tree ids, ascending`.

    Every tree is in exactly one micro-batch, and all trees of a sequence are in the same. Every rank gets the
    same number of micro-batches; if there are fewer trees than that, some are empty, and such a rank must
    still take part in the step's collectives. The same batch always gives the same split.

    keep_groups: all trees of a group share a micro-batch (pairwise losses need both sides).
    The trees of a sequence, or of a kept group, get a separate micro-batch if they exceed `max_tokens`.
    hidden_size: the model's width; it weighs attention against matrix products.

    Raises ValueError for a non-positive `max_tokens` or `ranks`.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    tokens = tree_tokens(batch).tolist()
    costs = tree_costs(batch, hidden_size).tolist()
    units = _units(batch, batch.group[batch.sequence.clamp(min=0)] if keep_groups else batch.sequence)
    bins = _best_fit(units, tokens, costs, max_tokens)
    per_rank = max(1, -(-len(bins) // ranks))
    bins = _split_to(bins, per_rank * ranks)
    return _deal(bins, ranks)


@dataclass
class _Bin:
    tokens: int = 0
    cost: float = 0.0
    units: list[tuple[float, int, list[int]]] = field(default_factory=list)  # (cost, tokens, trees)

    def add(self, cost: float, tokens: int, trees: list[int]) -> None:
        self.tokens += tokens
        self.cost += cost
        self.units.append((cost, tokens, trees))

    def trees(self) -> list[int]:
        return sorted(tree for _, _, trees in self.units for tree in trees)


def _units(batch: Batch, owner: Tensor) -> list[list[int]]:
    """Merge trees that must stay together because they have tokens of the same `owner` [T], a group or a
    sequence; tokens without a sequence belong to none."""
    count = int((batch.parent < 0).sum())
    known = batch.sequence >= 0
    links = torch.unique(owner[known] * count + batch.tree[batch.segment[known]])
    root = list(range(count))

    def find(x: int) -> int:
        while root[x] != x:
            root[x] = root[root[x]]
            x = root[x]
        return x

    first: dict[int, int] = {}
    for link in links.tolist():
        label, member = divmod(link, count)
        a, b = find(first.setdefault(label, member)), find(member)
        root[max(a, b)] = min(a, b)
    units: dict[int, list[int]] = {}
    for member in range(len(root)):
        units.setdefault(find(member), []).append(member)
    return list(units.values())


def _best_fit(
    units: Sequence[list[int]],
    tokens: Sequence[int],
    costs: Sequence[float],
    max_tokens: int,
) -> list[_Bin]:
    """Pack best-fit decreasing: the largest unit first, each into the fullest bin with room for it."""
    sized = [(sum(tokens[t] for t in unit), unit) for unit in units]
    sized.sort(key=lambda item: (-item[0], item[1]))
    bins: list[_Bin] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for size, unit in sized:
        cost = sum(costs[t] for t in unit)
        if size > max_tokens:
            bins.append(_Bin())
            bins[-1].add(cost, size, unit)
            continue
        at = bisect_left(room, (size, -1))
        if at == len(room):
            bins.append(_Bin())
            index, free = len(bins) - 1, max_tokens
        else:
            free, index = room.pop(at)
        bins[index].add(cost, size, unit)
        insort(room, (free - size, index))
    return bins


def _split_to(bins: list[_Bin], count: int) -> list[_Bin]:
    """Halve the costliest bins until there are `count`; add empty ones if nothing can be split."""
    bins = list(bins)
    while len(bins) < count:
        splittable = [b for b in bins if len(b.units) > 1]
        if not splittable:
            bins.append(_Bin())
            continue
        big = max(splittable, key=lambda b: b.cost)
        bins.remove(big)
        halves = (_Bin(), _Bin())
        for unit in sorted(big.units, key=lambda u: (-u[0], u[2])):
            min(halves, key=lambda b: b.cost).add(*unit)
        bins.extend(halves)
    return bins


def _deal(bins: list[_Bin], ranks: int) -> list[list[list[int]]]:
    """Assign bins to ranks, in rows of similar cost; a row's costliest goes to the least loaded rank."""
    bins = sorted(bins, key=lambda b: (-b.cost, b.trees()))
    out: list[list[list[int]]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for start in range(0, len(bins), ranks):
        row = bins[start : start + ranks]
        for rank, taken in zip(sorted(range(ranks), key=lambda r: load[r]), row, strict=True):
            out[rank].append(taken.trees())
            load[rank] += taken.cost
    return out
