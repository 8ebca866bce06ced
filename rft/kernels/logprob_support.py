"""The token sets of top-k and top-p sampling, packed into bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rft.kernels import logprob_chunked as chunked
from rft.kernels.logprob_common import LogitMap, check_head, shape
from rft.kernels.logprob_linear import HeadProducts


def pack_support(kept: Tensor) -> Tensor:
    """[T, V] bool -> [T, ceil(V/8)] uint8: bit j of byte i is token 8 i + j."""
    if kept.dim() != 2 or kept.dtype != torch.bool:
        raise ValueError(f"kept must be [T, V] bool, got {shape(kept)}")
    t, v = kept.shape
    padded = torch.nn.functional.pad(kept, (0, -v % 8)).view(t, -(-v // 8), 8)
    bits = torch.arange(8, device=kept.device, dtype=torch.uint8)
    return (padded.to(torch.uint8) << bits).sum(-1, dtype=torch.uint8)


@torch.no_grad()
def sampled_support(
    hidden: Tensor,
    weight: Tensor,
    *,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Return the tokens that a sampler with min-p, then top-k, then top-p, may draw, packed.

    Shape [T, ceil(V/8)] uint8, see `pack_support`.

    Computed from the sampling policy and passed to `token_logps(support=...)`, it makes log-probs those
    of the distribution that was actually sampled from. As in vLLM: tokens with at least min_p times the
    largest probability; of these the top_k (ties included); of these the fewest most likely ones whose
    probabilities sum to at least top_p; never fewer than one.
    Raises ValueError unless top_k >= 1, 0 < top_p <= 1 and 0 <= min_p < 1, or for inconsistent shapes.
    """
    check_head(hidden, weight, bias)
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for no limit, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in 0 < top_p <= 1, got {top_p}")
    if not 0 <= min_p < 1:
        raise ValueError(f"min_p must lie in 0 <= min_p < 1, got {min_p}")
    none = chunked.Targets(hidden.new_empty(0, dtype=torch.int64))
    f = LogitMap(temperature, softcap, logit_scale)
    chunks = chunked.Chunks(HeadProducts(weight, None), hidden, None, bias, none, f)
    out = hidden.new_empty((hidden.shape[0], -(-weight.shape[0] // 8)), dtype=torch.uint8)
    for chunk, _, _, products in chunks:
        for rows, _, z, _ in chunks.tiles(chunk, products):
            out[rows] = pack_support(_kept(z, top_k, top_p, min_p))
    return out


def _kept(z: Tensor, top_k: int | None, top_p: float, min_p: float) -> Tensor:
    """Return [r, V] bool from logits [r, V], which are overwritten."""
    if min_p:
        z.masked_fill_(z < z.amax(dim=1, keepdim=True) + math.log(min_p), -torch.inf)
    if top_k is not None and top_k < z.shape[1]:
        smallest = z.topk(top_k, dim=1).values[:, -1:]
        z.masked_fill_(z < smallest, -torch.inf)
    kept = z > -torch.inf
    if top_p < 1:
        p, order = z.softmax(1).sort(dim=1, descending=True, stable=True)
        before = p.cumsum(1) - p
        kept &= torch.empty_like(kept).scatter_(1, order, before < top_p)
    return kept
