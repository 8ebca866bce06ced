"""Token positions within sequences."""

from __future__ import annotations

import torch

from rft.batch import Batch

BRANCHES = (
    "a session branches (a call's prompt did not extend the call before), so its tokens have no single "
    "order, which the algorithm reads"
)


def token_index(batch: Batch) -> torch.Tensor:
    """Return the index of each masked-in token among those of its sequence, [T] int64; 0 elsewhere."""
    index = batch.sequence[batch.mask]
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=batch.num_sequences)
    starts = (counts.cumsum(0) - counts)[index[order]]
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device) - starts)
    return torch.zeros_like(batch.tokens).masked_scatter(batch.mask, rank)


def masked_in(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Spread `values` [N, L], of the masked-in tokens of each sequence in order, over the batch, [T]."""
    spread = values.new_zeros(batch.num_tokens)
    spread[batch.mask] = values[batch.sequence[batch.mask], token_index(batch)[batch.mask]]
    return spread


def last_tokens(batch: Batch) -> torch.Tensor:
    """Return the index of each sequence's last masked-in token, [N] int64; -1 if it has none."""
    where = batch.mask.nonzero()[:, 0]
    last = torch.full((batch.num_sequences,), -1, dtype=torch.int64, device=where.device)
    return last.scatter_reduce(0, batch.sequence[where], where, "amax")


def top_share(score: torch.Tensor, mask: torch.Tensor, share: float) -> torch.Tensor:
    """Select the fraction `share` of masked-in tokens with the highest scores, [T] bool.

    At least one token is selected; ties by order.
    """
    where = mask.nonzero()[:, 0]
    keep = max(1, round(share * len(where))) if len(where) else 0
    best = torch.argsort(score[where], descending=True, stable=True)[:keep]
    return torch.zeros_like(mask).index_fill(0, where[best], True)


def branching(batch: Batch) -> torch.Tensor:
    """Return whether the tokens of each sequence have no single order, because a call of its session did not
    extend the one before, [N] bool."""
    index = (batch.sequence >= 0).nonzero()[:, 0]
    index = index[torch.argsort(batch.sequence[index], stable=True)]
    before, after = index[:-1], index[1:]
    of, to = batch.sequence[before], batch.sequence[after]
    out = torch.zeros(batch.num_sequences, dtype=torch.bool, device=index.device)
    out[to[(of == to) & (batch.source[after] != before)]] = True
    return out


def to_grid(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each sequence's masked-in token indices, padded, [N, L] int64, and their mask, [N, L] bool.

    L is the largest number of masked-in tokens, at least 1. The mask is True at real entries. Tokens outside
    the mask, such as user turns, are removed. Raises ValueError for a session that branches.
    """
    if bool(branching(batch).any()):
        raise ValueError(BRANCHES)
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


def at_last_token(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Place per-sequence values `x` [N] at the last masked-in token of each sequence, [T]; 0 elsewhere."""
    grid, real = to_grid(batch)
    has = real.any(1)
    last = grid.gather(1, (real.sum(1, keepdim=True) - 1).clamp(min=0)).squeeze(1)[has]
    return x.new_zeros(batch.num_tokens).index_put((last,), x[has])
