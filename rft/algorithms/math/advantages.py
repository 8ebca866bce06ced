"""From rewards to per-token advantages: generalised advantage estimation, returns, whitening."""

from __future__ import annotations

import torch
from torch import Tensor

from rft.batch import Batch


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


def discounted(rewards: Tensor, batch: Batch, discount: float | Tensor) -> Tensor:
    """[T]: the sum of this token's and all later tokens' `rewards` [T] within the sequence, each later
    one times `discount` (a number, or [N]) once more per token."""
    grid, real = to_grid(batch)
    x = rewards[grid].masked_fill(~real, 0)
    total, out = x.new_zeros(batch.num_sequences), torch.zeros_like(x)
    for t in reversed(range(x.shape[1])):
        total = x[:, t] + discount * total
        out[:, t] = total
    return rewards.new_zeros(batch.num_tokens).index_put((grid[real],), out[real])


def next_values(values: Tensor, batch: Batch) -> Tensor:
    """[T]: the value at the sequence's next masked-in token; 0 at its last (the end is worth nothing)."""
    grid, real = to_grid(batch)
    x = values[grid].masked_fill(~real, 0)
    shifted = torch.cat([x[:, 1:], x.new_zeros(len(x), 1)], dim=1)
    return values.new_zeros(batch.num_tokens).index_put((grid[real],), shifted[real])


def gae(
    rewards: Tensor,
    values: Tensor,
    batch: Batch,
    gamma: float,
    lam: float | Tensor,
    ends: Tensor | float = 0.0,
) -> Tensor:
    """Generalised advantage estimates [T] (Schulman et al. 2016, eq. 16).

    rewards, values: [T] float32; values[t] is the critic's value of the state before tokens[t].
    lam: a number, or one per sequence [N]. ends [T]: at the last token of a sequence that was cut off, the
    value of the state after it, where it would have gone on; 0 elsewhere. With
    delta_t = r_t + gamma V_{t+1} - V_t, the advantage is the sum of (gamma lam)^k delta_{t+k}.
    """
    delta = rewards + gamma * (next_values(values, batch) + ends) - values
    return discounted(delta.masked_fill(~batch.mask, 0), batch, gamma * lam)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """`x` [T] scaled to standard deviation 1 over masked-in tokens (and to mean 0); 0 elsewhere.
    Fewer than two tokens stay as they are."""
    chosen = x[mask]
    if chosen.numel() < 2:
        return x.masked_fill(~mask, 0)
    mean, std = chosen.mean(), chosen.std()
    scaled = (x - mean) / (std + 1e-8)
    return (scaled if shift_mean else scaled + mean).masked_fill(~mask, 0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over masked-in tokens: 1 for a perfect critic, 0 for
    a constant one, below 0 for a harmful one. nan where returns do not vary."""
    v, r = values[mask].double(), returns[mask].double()
    spread = r.var(correction=0) if r.numel() else r.sum()
    return float(1 - (r - v).var(correction=0) / spread) if float(spread) > 0 else float("nan")
