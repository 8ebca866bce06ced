"""Predict the work of a batch's trees, and how much of it shared prefixes save.

A layer of width H does about 24 H^2 multiply-adds per token in its matrix products (attention projections
and a 4 H wide MLP) and 4 H per pair of tokens that attend to each other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from rft.batch import Batch, Completion, Group

MERGE_COST = 0.05  # of a token's matrix products, for merging a completion's token with its prompt's keys

Sharing = Literal["auto", "on", "off"]


def tree_tokens(batch: Batch) -> torch.Tensor:
    """[trees] int64: the number of tokens of each tree."""
    return torch.bincount(batch.tree[batch.segment], minlength=int((batch.parent < 0).sum()))


def tree_costs(batch: Batch, hidden_size: int) -> torch.Tensor:
    """[trees] float64: the work of each tree, in units of one token's matrix products."""
    tokens = tree_tokens(batch)
    pairs = torch.zeros(tokens.numel(), dtype=torch.float64)
    pairs.index_add_(0, batch.tree.cpu(), segment_pairs(batch.segment, batch.parent).double().cpu())
    return tokens.cpu().double() + pairs / (6 * hidden_size)


def sharing_gain(prompt: int, completions: Sequence[int], hidden_size: int = 1024) -> float:
    """Return by which factor sharing a prompt among its completions reduces the work, from their numbers of
    tokens: at least 1."""
    separate, shared = _group_work([[(0, prompt), (prompt, n)] for n in completions], hidden_size)
    return separate / shared if shared else 1.0


def worth_sharing(
    groups: Iterable[tuple[int, Sequence[int]]], hidden_size: int = 1024, threshold: float = 1.05
) -> bool:
    """Predict whether shared prefixes pay off for `(prompt, completions)` token counts: whether the total
    work saved, minus the cost of merging, reaches `threshold`."""
    rows = ([[(0, prompt), (prompt, n)] for n in completions] for prompt, completions in groups)
    return _worth_sharing(rows, hidden_size, threshold)


def shares_prefix(groups: Iterable[Group], mode: Sharing, hidden_size: int) -> bool:
    """Whether to pack groups with shared prompts: as `learner.prefix_sharing` says or, on `auto`, if the
    predicted saving in a model of that width is large enough. Branches of sessions are shared in any case."""
    if mode != "auto":
        return mode == "on"
    rows = ([_runs(len(g.prompt.tokens), c) for c in g.completions] for g in groups)
    return _worth_sharing(rows, hidden_size, threshold=1.05)


Runs = list[tuple[int, int]]  # (tokens before, tokens) of the prompt and each branch of a completion


def _runs(prompt: int, completion: Completion) -> Runs:
    if not completion.branches:
        return [(0, prompt), (prompt, len(completion.tokens))]
    branches = completion.branches
    starts = [b.start for b in branches]
    runs = [(0, max(0, *(b.after + 1 for b in branches if b.after < prompt)))]
    for branch, end in zip(branches, [*starts[1:], len(completion.tokens)], strict=True):
        before, place = branch.after + 1, branch.after - prompt
        if place >= 0:
            parent = bisect_right(starts, place) - 1
            before = runs[parent + 1][0] + place - starts[parent] + 1
        runs.append((before, end - branch.start))
    return runs


def _worth_sharing(groups: Iterable[Sequence[Runs]], hidden_size: int, threshold: float) -> bool:
    separate = shared = 0.0
    for completions in groups:
        work = _group_work(completions, hidden_size)
        separate += work[0]
        shared += work[1]
        if len(completions) > 1:
            shared += MERGE_COST * sum(tokens for runs in completions for _, tokens in runs[1:])
    return separate >= threshold * shared


def _group_work(completions: Sequence[Runs], hidden_size: int) -> tuple[float, float]:
    """Return the work of a group's completions with a prompt each, and with one for all of them."""
    prompts = [_work(*runs[0], hidden_size) for runs in completions]
    others = sum(_work(*run, hidden_size) for runs in completions for run in runs[1:])
    return sum(prompts) + others, max(prompts, default=0.0) + others


def _work(before: int, tokens: int, hidden_size: int) -> float:
    return tokens + (tokens * before + tokens * (tokens + 1) / 2) / (6 * hidden_size)


def segment_pairs(segment: torch.Tensor, parent: torch.Tensor) -> torch.Tensor:
    """[S] int64: the number of (query, key) pairs in the attention of each segment's tokens."""
    length = torch.bincount(segment, minlength=parent.numel()).cpu()
    before = [0] * parent.numel()
    sizes = length.tolist()
    for s, p in enumerate(parent.tolist()):
        if p >= 0:
            before[s] = before[p] + sizes[p]
    return length * torch.tensor(before, dtype=torch.int64) + length * (length + 1) // 2
