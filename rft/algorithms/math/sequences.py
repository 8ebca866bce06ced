"""Where tokens stand within their sequences, and log-probs of whole sequences."""

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


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without loss of digits near 0 or far from it (Maechler 2012)."""
    near = x > -0.6931471805599453  # -log 2
    safe_near = torch.where(near, x, -1.0)  # each branch sees only what it is good for: no nan in gradients
    safe_far = torch.where(near, -1.0, x)
    return torch.where(near, (-torch.expm1(safe_near)).log(), torch.log1p(-safe_far.exp()))


def top_share(score: Tensor, mask: Tensor, share: float) -> Tensor:
    """[T] bool: the share of masked-in tokens with the highest scores (at least one; ties by order)."""
    where = mask.nonzero()[:, 0]
    keep = max(1, round(share * len(where))) if len(where) else 0
    best = torch.argsort(score[where], descending=True, stable=True)[:keep]
    return torch.zeros_like(mask).index_fill(0, where[best], True)


def paired_sums(
    x: Tensor, batch: Batch, first: Tensor, second: Tensor, tail: float = 1.0
) -> tuple[Tensor, Tensor]:
    """([P], [P]): sums of x [T] over the sequences `first` [P] and `second` [P] of pairs; tokens past the
    length of the pair's shorter sequence are multiplied by `tail`."""
    if tail == 1.0:
        total = batch.sum_by_sequence(x)
        return total[first], total[second]
    shorter = torch.minimum(batch.lengths[first], batch.lengths[second])
    index = token_index(batch)

    def total_of(role: Tensor) -> Tensor:  # a sequence in the middle of a ranking has another length in each
        common = torch.zeros_like(batch.lengths).index_put((role,), shorter)
        weight = torch.where(index < batch.to_tokens(common), 1.0, tail)
        return batch.sum_by_sequence(x * weight)[role]

    return total_of(first), total_of(second)


def of_same_rank(values: Tensor, like: Tensor) -> Tensor:
    """[P]: `values` [P] in the order of `like` [P]: the smallest where that is smallest, and so on."""
    order = torch.argsort(like, stable=True)
    return torch.empty_like(values).scatter(0, order, values.sort().values)
