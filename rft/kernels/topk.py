"""The head's most likely tokens, and the sets that top-k and top-p sampling draw from.

Distillation: the teacher's `topk_logps` give ids [T, k] and its log-probs; the student's, with
gradient, are `token_logps(hidden, weight, ids)`. No [T, V] logits exist on either side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rft.kernels import logprob_chunked as chunked
from rft.kernels.logprob import pack_support
from rft.kernels.logprob_common import LogitMap, check_head
from rft.kernels.logprob_linear import Head


@torch.no_grad()
def topk_logps(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k most likely tokens of each row, without gradient.

    Returns their log-probs [T, k] float32, descending, normalised over the whole vocabulary; their
    ids [T, k] int64; and logsumexp [T] float32 of all logits, so that `logps + lse` are logits.
    Raises ValueError unless 1 <= k <= V, or for shapes that do not fit.
    """
    check_head(hidden, weight, bias)
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k must lie in 1..{weight.shape[0]} (weight has {weight.shape[0]} rows), got {k}")
    chunks = _chunks(hidden, weight, bias, LogitMap(temperature, softcap, logit_scale))
    t = hidden.shape[0]
    logps = hidden.new_empty((t, k), dtype=chunks.acc)
    ids = hidden.new_empty((t, k), dtype=torch.int64)
    lse = hidden.new_empty(t, dtype=chunks.acc)
    for chunk, _, _, products in chunks:
        for rows, _, z, _ in chunks.tiles(chunk, products):
            top, ids[rows] = z.topk(k, dim=1)
            lse[rows] = z.sub_(top[:, :1]).exp_().sum(1).log_().add_(top[:, 0])
            logps[rows] = top - lse[rows, None]
    return logps, ids, lse


@torch.no_grad()
def sampled_support(
    hidden: Tensor,
    weight: Tensor,
    *,
    top_k: int | None = None,
    top_p: float = 1.0,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """The tokens that a sampler with this top-k, then top-p, may draw: [T, ceil(V/8)] uint8, packed.

    Taken from the policy that sampled and handed to `token_logps(support=...)`, it makes log-probs those
    of the distribution that was really sampled from. As in vLLM: of the top_k (ties included), the
    fewest most likely tokens whose probabilities sum to at least top_p; never fewer than one.
    Raises ValueError unless top_k >= 1 and 0 < top_p <= 1, or for shapes that do not fit.
    """
    check_head(hidden, weight, bias)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for no limit, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in 0 < top_p <= 1, got {top_p}")
    chunks = _chunks(hidden, weight, bias, LogitMap(temperature, softcap, logit_scale))
    out = hidden.new_empty((hidden.shape[0], -(-weight.shape[0] // 8)), dtype=torch.uint8)
    for chunk, _, _, products in chunks:
        for rows, _, z, _ in chunks.tiles(chunk, products):
            out[rows] = pack_support(_kept(z, top_k, top_p))
    return out


def _kept(z: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """[r, V] bool from logits [r, V], which are overwritten."""
    if top_k is not None and top_k < z.shape[1]:
        smallest = z.topk(top_k, dim=1).values[:, -1:]
        z.masked_fill_(z < smallest, -torch.inf)
    kept = z > -torch.inf
    if top_p < 1:
        p, order = z.softmax(1).sort(dim=1, descending=True, stable=True)
        before = p.cumsum(1) - p
        kept &= torch.empty_like(kept).scatter_(1, order, before < top_p)
    return kept


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, f: LogitMap) -> chunked.Chunks:
    none = hidden.new_empty((hidden.shape[0], 0), dtype=torch.int64)
    return chunked.Chunks(Head(weight, None), hidden, None, bias, chunked.Rows(none), f)
