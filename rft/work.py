"""Predict the work of a batch's trees, and what sharing prefixes saves.

A layer of width H does about 24 H^2 multiply-adds per token in its matrix products (attention projections
and a 4 H wide MLP) and 4 H per pair of tokens that attend to each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from rft.batch import Batch, Group

MERGE_COST = 0.05  # of a token's matrix products, for merging a completion's token with its prompt's keys

Sharing = Literal["auto", "on", "off"]


def tree_tokens(batch: Batch) -> Tensor:
    """[trees] int64: the number of tokens of each tree."""
    return torch.bincount(batch.tree[batch.segment], minlength=int((batch.parent < 0).sum()))


def tree_costs(batch: Batch, hidden_size: int) -> Tensor:
    """[trees] float64: the work of each tree, in units of one token's matrix products."""
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
