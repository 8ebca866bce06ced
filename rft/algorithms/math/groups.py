"""Statistics of sequences within their prompt's group. `x` is [N] (or [N, K], by column), `group` is
[N] int64 counted from 0, as in `Batch.group`."""

from __future__ import annotations

import torch
from torch import Tensor


def group_size(group: Tensor) -> Tensor:
    """[N] int64: how many sequences each sequence's group has."""
    return torch.bincount(group)[group]


def group_sum(x: Tensor, group: Tensor) -> Tensor:
    """Each sequence's group sum, shape of `x`."""
    groups = int(group.max()) + 1 if group.numel() else 0
    return x.new_zeros(groups, *x.shape[1:]).index_add(0, group, x)[group]


def group_mean(x: Tensor, group: Tensor) -> Tensor:
    """Each sequence's group mean, shape of `x`."""
    return group_sum(x, group) / _like(group_size(group), x)


def group_std(x: Tensor, group: Tensor) -> Tensor:
    """Each sequence's group standard deviation (n - 1 in the denominator; 0 for a group of one)."""
    squares = group_sum((x - group_mean(x, group)).square(), group)
    return (squares / _like(group_size(group) - 1, x).clamp(min=1)).sqrt()


def group_max(x: Tensor, group: Tensor) -> Tensor:
    """Each sequence's group maximum, for x [N]."""
    groups = int(group.max()) + 1 if group.numel() else 0
    return x.new_full((groups,), -torch.inf).scatter_reduce(0, group, x, "amax")[group]


def leave_one_out(x: Tensor, group: Tensor) -> Tensor:
    """Mean of the other sequences of the group; in a group of one, the sequence's own value."""
    size = _like(group_size(group), x)
    others = (group_sum(x, group) - x) / (size - 1).clamp(min=1)
    return torch.where(size > 1, others, x)


def degenerate(x: Tensor, group: Tensor) -> Tensor:
    """[N] bool: True where all of a sequence's group have exactly the same value in `x` [N].

    Compared by extremes, not by a standard deviation: three times 0.1 has a rounding error for a
    standard deviation, which a division would blow up into an advantage.
    """
    return group_max(x, group) == -group_max(-x, group)


def count_degenerate(rewards: Tensor, group: Tensor) -> int:
    """How many groups have all rewards equal, and so no gradient to give."""
    return int(torch.unique(group[degenerate(rewards, group)]).numel())


def rank_in_group(x: Tensor, group: Tensor) -> Tensor:
    """[N] int64: 0 for the best of each group, then 1, ...; ties in order of appearance."""
    order = torch.argsort(x, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    size = torch.bincount(group)
    starts = (size.cumsum(0) - size)[group[order]]
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device) - starts)


def _like(n: Tensor, x: Tensor) -> Tensor:
    return n.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
