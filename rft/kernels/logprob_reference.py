"""Plain implementation of log-probs of targets under a linear head: the baseline for the faster ones."""

from __future__ import annotations

import torch
from torch import Tensor

from rft.kernels.logprob_common import LogitMap, accumulate_dtype

Lora = tuple[Tensor, Tensor, float]


def logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    logit_map: LogitMap | None = None,
) -> Tensor:
    """Return logits [T, V] in float32 (float64 for float64 inputs).

    `lora` is (A [r, H], B [V, r], scale): the head is W + scale * B A.
    """
    dtype = accumulate_dtype(hidden.dtype)
    x = hidden.to(dtype) @ weight.to(dtype).t()
    if lora is not None:
        a, b, scale = lora
        x = x + scale * (hidden.to(dtype) @ a.to(dtype).t()) @ b.to(dtype).t()
    if bias is not None:
        x = x + bias.to(dtype)
    return x if logit_map is None else logit_map(x)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Lora | None = None,
    support: Tensor | None = None,
    logit_map: LogitMap | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probs of targets [T] and entropies [T]. `support` is [T, V] bool."""
    z = logits(hidden, weight, bias=bias, lora=lora, logit_map=logit_map)
    if support is not None:
        kept = support.scatter(1, targets[:, None], True)
        z = z.masked_fill(~kept, -torch.inf)
    all_logps = torch.log_softmax(z, dim=-1)
    p = all_logps.exp()
    # 0 * -inf counts as 0: a token of probability 0 adds nothing to the entropy
    surprise = torch.where(p > 0, all_logps, 0.0)
    return all_logps.gather(1, targets[:, None])[:, 0], -(p * surprise).sum(-1)
