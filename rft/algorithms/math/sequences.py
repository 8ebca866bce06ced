"""Where tokens stand within their sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from rft.batch import Batch


def token_index(batch: Batch) -> Tensor:
    """[T] int64: at masked-in tokens, how many masked-in tokens of the same sequence stand before; else 0."""
    index = batch.sequence[batch.mask]
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=batch.num_sequences)
    starts = (counts.cumsum(0) - counts)[index[order]]
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device) - starts)
    return torch.zeros_like(batch.tokens).masked_scatter(batch.mask, rank)


def last_tokens(batch: Batch) -> Tensor:
    """[N] int64: the index of each sequence's last masked-in token; -1 where it has none."""
    where = batch.mask.nonzero()[:, 0]
    last = torch.full((batch.num_sequences,), -1, dtype=torch.int64, device=where.device)
    return last.scatter_reduce(0, batch.sequence[where], where, "amax")


def top_share(score: Tensor, mask: Tensor, share: float) -> Tensor:
    """[T] bool: the share of masked-in tokens with the highest scores (at least one; ties by order)."""
    where = mask.nonzero()[:, 0]
    keep = max(1, round(share * len(where))) if len(where) else 0
    best = torch.argsort(score[where], descending=True, stable=True)[:keep]
    return torch.zeros_like(mask).index_fill(0, where[best], True)


def to_grid(batch: Batch) -> tuple[Tensor, Tensor]:
    """([N, L] int64, [N, L] bool): each sequence's masked-in token indices in order, and which cells
    are real. L is the largest number of masked-in tokens, and at least 1. Turns in which the policy did
    not speak vanish: the token after them follows the one before."""
    index = batch.mask.nonzero().squeeze(1)
    row = batch.sequence[index]
    order = torch.argsort(row, stable=True)
    index, row = index[order], row[order]
    lengths = torch.bincount(row, minlength=batch.num_sequences)
    column = torch.arange(index.numel(), device=index.device) - (lengths.cumsum(0) - lengths)[row]
    width = max(int(lengths.max()), 1) if lengths.numel() else 1
    grid = index.new_zeros(batch.num_sequences, width)
    real = torch.zeros(batch.num_sequences, width, dtype=torch.bool, device=index.device)
    grid[row, column] = index
    real[row, column] = True
    return grid, real


def at_last_token(x: Tensor, batch: Batch) -> Tensor:
    """[N] -> [T]: each sequence's value at its last masked-in token, 0 elsewhere."""
    grid, real = to_grid(batch)
    has = real.any(1)
    last = grid.gather(1, (real.sum(1, keepdim=True) - 1).clamp(min=0)).squeeze(1)[has]
    return x.new_zeros(batch.num_tokens).index_put((last,), x[has])
