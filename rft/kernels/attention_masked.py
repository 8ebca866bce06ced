"""Attention over a forest with an explicit mask per tree: the reference, and the route for layers that
the merge does not support: windows and chunks shorter than a sequence, soft-capped scores.

Trees of similar size are rows of one padded batch, so the masks are quadratic in the length of a tree,
not of the packed batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rft.kernels.forest import Forest


def masked_attention(
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
    """Compute attention over the forest, [T, H, Dv], differentiable by autograd.

    query: [T, H, D]; key: [T, Hk, D]; value: [T, Hk, Dv]. window, chunk: see `Forest.mask`.
    softcap: scores become softcap * tanh(scores / softcap). sinks: [H], one more logit per head.
    """
    outputs, tokens = [], []
    for which, trees in enumerate(forest.trees):
        q, k, v = (trees.rows.take(x).transpose(1, 2) for x in (query, key, value))
        mask = forest.mask(which, window, chunk)
        out = dense_attention(q, k, v, mask, scale, softcap, sinks)
        outputs.append(trees.rows.flat(out.transpose(1, 2)))
        tokens.append(trees.rows.tokens)
    if len(outputs) == 1 and forest.trees[0].rows.covers(forest.num_tokens):
        return outputs[0]
    order = torch.cat(tokens)
    return torch.cat(outputs).index_select(0, torch.argsort(order))


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attend with [B, H, L, D] queries to [B, Hk, M, D] keys under a boolean mask [B or 1, 1, L, M]."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    shared = k.shape[1]
    grouped = q.unflatten(1, (shared, -1))  # [B, Hk, H / Hk, L, D]
    scores = (grouped @ k.unsqueeze(2).transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # not -inf: a padded query with every key masked must give finite values, or NaN spreads to later keys
    scores = scores.masked_fill(~mask.unsqueeze(2), torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.float().view(1, shared, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    probs = scores.softmax(-1)[..., : k.shape[2]].to(v.dtype)
    return (probs @ v.unsqueeze(2)).flatten(1, 2)
