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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rft.batch import Batch, Group

MERGE_COST = 0.05  # of a token's matrix products, for merging a completion's token with its prompt's keys

Sharing = Literal["auto", "on", "off"]


def micro_batches(
    batch: Batch,
    max_tokens: int,
    ranks: int = 1,
    *,
    keep_groups: bool = False,
    hidden_size: int = 1024,
) -> list[list[list[int]]]:
    """Split a batch into micro-batches of whole trees: `[rank][micro-batch] -> tree ids, ascending`.

    Every tree is in exactly one micro-batch. Every rank gets the same number of micro-batches;
    if there are fewer trees than that, some are empty, and such a rank must still take part in
    the step's collectives. The same batch always gives the same split.

    keep_groups: all trees of a group share a micro-batch (pairwise losses need both sides).
    A tree (or kept group) above `max_tokens` gets a separate micro-batch.
    hidden_size: the model's width; it weighs attention against matrix products.

    Raises ValueError for a non-positive `max_tokens` or `ranks`.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    tokens = tree_tokens(batch).tolist()
    costs = tree_costs(batch, hidden_size).tolist()
    units = _group_units(batch) if keep_groups else [[tree] for tree in range(len(tokens))]
    bins = _best_fit(units, tokens, costs, max_tokens)
    per_rank = max(1, -(-len(bins) // ranks))
    bins = _split_to(bins, per_rank * ranks)
    return _deal(bins, ranks)


def tree_tokens(batch: Batch) -> Tensor:
    """[trees] int64: the number of tokens of each tree."""
    return torch.bincount(batch.tree[batch.segment], minlength=int((batch.parent < 0).sum()))


def tree_costs(batch: Batch, hidden_size: int) -> Tensor:
    """[trees] float64: the work of each tree, in units of one token's matrix products. A layer of width H
    does about 24 H^2 multiply-adds per token in its matrix products (attention projections and a 4 H wide
    MLP) and 4 H per pair of tokens that attend to each other."""
    tokens = tree_tokens(batch)
    pairs = torch.zeros(tokens.numel(), dtype=torch.float64)
    pairs.index_add_(0, batch.tree.cpu(), segment_pairs(batch.segment, batch.parent).double().cpu())
    return tokens.cpu().double() + pairs / (6 * hidden_size)


def sharing_gain(prompt: int, completions: Sequence[int], hidden_size: int = 1024) -> float:
    """Return by which factor sharing a prompt among its completions reduces the work, from their numbers of
    tokens: at least 1."""
    separate = sum(_sequence_cost(prompt + n, hidden_size) for n in completions)
    tokens = prompt + sum(completions)
    pairs = prompt * (prompt + 1) / 2 + sum(n * prompt + n * (n + 1) / 2 for n in completions)
    return separate / (tokens + pairs / (6 * hidden_size)) if tokens else 1.0


def worth_sharing(
    groups: Iterable[tuple[int, Sequence[int]]], hidden_size: int = 1024, threshold: float = 1.05
) -> bool:
    """Predict whether shared prefixes pay off for `(prompt, completions)` token counts: whether the total
    work saved, minus the cost of merging, reaches `threshold`."""
    separate = shared = 0.0
    for prompt, completions in groups:
        cost = sum(_sequence_cost(prompt + n, hidden_size) for n in completions)
        separate += cost
        shared += cost / sharing_gain(prompt, completions, hidden_size)
        shared += MERGE_COST * sum(completions) if len(completions) > 1 else 0.0
    return separate >= threshold * shared


def shares_prefix(groups: Iterable[Group], mode: Sharing, hidden_size: int) -> bool:
    """Whether to pack groups with shared prompts: as `learner.prefix_sharing` says or, on `auto`, if the
    predicted saving in a model of that width is large enough."""
    if mode != "auto":
        return mode == "on"
    sizes = ((len(g.prompt.tokens), [len(c.tokens) for c in g.completions]) for g in groups)
    return worth_sharing(sizes, hidden_size)


def _sequence_cost(tokens: int, hidden_size: int) -> float:
    return tokens + tokens * (tokens + 1) / 2 / (6 * hidden_size)


def segment_pairs(segment: Tensor, parent: Tensor) -> Tensor:
    """[S] int64: the number of (query, key) pairs in the attention of each segment's tokens."""
    length = torch.bincount(segment, minlength=parent.numel()).cpu()
    before = [0] * parent.numel()
    sizes = length.tolist()
    for s, p in enumerate(parent.tolist()):
        if p >= 0:
            before[s] = before[p] + sizes[p]
    return length * torch.tensor(before, dtype=torch.int64) + length * (length + 1) // 2


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


def _group_units(batch: Batch) -> list[list[int]]:
    """Merge trees that must stay together because they contain sequences of the same group."""
    tree = batch.tree[batch.segment]
    known = batch.sequence >= 0
    links = torch.stack([batch.group[batch.sequence[known]], tree[known]])
    root = list(range(int((batch.parent < 0).sum())))

    def find(x: int) -> int:
        while root[x] != x:
            root[x] = root[root[x]]
            x = root[x]
        return x

    first: dict[int, int] = {}
    for group, member in torch.unique(links, dim=1).t().tolist():
        a, b = find(first.setdefault(group, member)), find(member)
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
