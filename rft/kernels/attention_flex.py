"""Attention over a forest with FlexAttention block masks, on GPUs: for layers that the merge does not support
(windows and chunks that bind, soft-capped scores, float32, unequal or wide heads), without dense masks.

Segments are numbered in depth-first order, so that "the key's segment is the query's or an ancestor of it"
is two comparisons of per-token numbers; fully masked blocks of 128 x 128 tokens are skipped.
Batches are padded to a few lengths (`bucket`), and FlexAttention (Dong et al. 2024, arXiv:2412.05496) is
compiled once per length. On CPU it runs uncompiled, as a reference, forward only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from rft.kernels.forest import Forest

BLOCK = 128


def bucket(tokens: int) -> int:
    """Return the length to pad a batch to: a multiple of 128 and of an eighth of the next power of two, so
    that padding is at most an eighth above 1,024 tokens and few distinct lengths occur."""
    step = max(BLOCK, (1 << max(0, tokens - 1).bit_length()) // 8)
    return max(step, -(-tokens // step) * step)


def flex_forest_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    scale: float,
    *,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention over the forest: [T, H, Dv]. Arguments as in `masked_attention`.

    Raises ValueError on CPU if a gradient is needed: FlexAttention has no backward pass there.
    """
    if not query.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ValueError("FlexAttention has no backward on CPU: use the kernels auto, merge or masked there")
    length = bucket(forest.num_tokens)
    q, k, v = (_padded(x, length) for x in (query, key, value))
    attend: Callable[..., Any] = flex_attention
    run = _compiled(attend) if query.is_cuda else attend
    out, aux = run(
        q,
        k,
        v,
        score_mod=None if softcap is None else _soft_cap(softcap),
        block_mask=block_mask(forest, length, window, chunk),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None:
        # a sink is one more logit without a value: it only takes a share of the probability
        share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None])
        out = out * share.unsqueeze(-1).to(out.dtype)
    return out[0].transpose(0, 1)[: forest.num_tokens]


def block_mask(forest: Forest, length: int, window: int | None, chunk: int | None) -> BlockMask:
    """Return the forest's block mask for `length` >= T tokens, cached; padding attends to padding only."""
    kept = (length, window, chunk)
    if kept not in forest.block_masks:
        enter, leave = intervals(forest)
        pad = length - forest.num_tokens
        end = forest.parent.numel()
        first = torch.nn.functional.pad(enter[forest.segment], (0, pad), value=end)
        last = torch.nn.functional.pad(leave[forest.segment], (0, pad), value=end + 1)
        positions = torch.nn.functional.pad(forest.positions, (0, pad))
        on_gpu = forest.device.type == "cuda"
        make: Callable[..., Any] = _compiled(create_block_mask) if on_gpu else create_block_mask
        seen = _seen(first, last, positions, window, chunk)
        forest.block_masks[kept] = make(
            seen, None, None, length, length, device=forest.device, BLOCK_SIZE=BLOCK
        )
    mask: BlockMask = forest.block_masks[kept]
    return mask


def intervals(forest: Forest) -> tuple[Tensor, Tensor]:
    """Number the segments depth-first, [S] int64 each: segment a is b or an ancestor of b if and only if
    enter[a] <= enter[b] < leave[a]."""
    parents = forest.parent.tolist()
    size = [1] * len(parents)
    for s in range(len(parents) - 1, -1, -1):  # a parent precedes its children
        if parents[s] >= 0:
            size[parents[s]] += size[s]
    enter, free, roots = [0] * len(parents), [0] * len(parents), 0
    for s, p in enumerate(parents):
        enter[s] = roots if p < 0 else free[p]
        if p < 0:
            roots += size[s]
        else:
            free[p] += size[s]
        free[s] = enter[s] + 1
    first = torch.tensor(enter, device=forest.device)
    return first, first + torch.tensor(size, device=forest.device)


def _seen(
    enter: Tensor, leave: Tensor, positions: Tensor, window: int | None, chunk: int | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mask = (enter[k] <= enter[q]) & (enter[q] < leave[k]) & (q >= k)
        if window is not None:
            mask = mask & (positions[q] - positions[k] < window)
        if chunk is not None:
            mask = mask & (positions[q] // chunk == positions[k] // chunk)
        return mask

    return seen


@functools.cache
def _soft_cap(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _padded(x: Tensor, length: int) -> Tensor:
    """[T, H, D] -> [1, H, length, D]."""
    return torch.nn.functional.pad(x.transpose(0, 1), (0, 0, 0, length - x.shape[0])).unsqueeze(0)
