"""Probability ratios: the clipped surrogate, and the correction for samples of another policy.

Three policies meet here. The *sampler* made the tokens (the engine: other kernels, perhaps older
weights). *Old* is the learner's policy before the step. The *current* policy is being changed. The
clip holds current near old; the correction weighs by old / sampler. Keeping the two apart is
decoupled PPO (Hilton et al. 2021, "Batch size-invariance for policy optimization"; AReaL 2025, eq. 5).
Old is then the *proximal* policy: `recomputed` by a forward of its own where a batch is stepped on more
than once, `interpolated` between sampler and current, or the `sampler` itself (not decoupled).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rft.algorithms.math.kl import safe_exp
from rft.batch import Batch

Correction = Literal[
    "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"
]

Proximal = Literal["recomputed", "interpolated", "sampler"]


def proximal_logps(logps: Tensor, batch: Batch, *, interpolate: bool) -> Tensor:
    """The proximal policy's log-probs [T] without a forward, from the current ones (detached).

    The sampler's; or, with `interpolate`, log-linearly between sampler and current policy,

        log p = a * log sampler + (1 - a) * log current,   a = 1 / d for d > 0, else 0,

    where d is how many versions the token's sampler is behind `batch.state["version"]` (A-3PO, Li et al.
    2025): an old sampler is a poor centre to stay near. Tokens that nobody sampled keep `logps`.
    """
    assert batch.sampler_logps is not None
    sampled = batch.mask if batch.demonstrated is None else batch.mask & ~batch.demonstrated
    share = torch.ones_like(logps)
    if interpolate:
        if batch.version is None or "version" not in batch.state:
            raise ValueError("proximal: interpolated needs the versions that sampled the tokens")
        age = (batch.state["version"] - batch.version).to(logps.dtype)
        share = torch.where(age > 0, 1 / age.clamp(min=1), 0)
    return torch.where(sampled, share * batch.sampler_logps + (1 - share) * logps, logps)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float | None = None
) -> Tensor:
    """The PPO objective, to be maximised, shape of `ratio`.

    min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), Schulman et al. 2017, eq. 7. `dual` is the
    bound c > 1 + high of dual clip (Ye et al. 2020, eq. 5): where A < 0 the objective is at least c * A.
    """
    near = ratio.clamp(1 - low, 1 + high)
    if dual is not None:
        ratio = torch.where(advantages < 0, ratio.clamp(max=dual), ratio)
    return torch.minimum(ratio * advantages, near * advantages)


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """1.0 where the clip of `clipped_surrogate` is active (no gradient), else 0.0."""
    above, below = (ratio > 1 + high) & (advantages > 0), (ratio < 1 - low) & (advantages < 0)
    return (above | below).to(ratio.dtype)


def sequence_ratio(log_ratio: Tensor, batch: Batch, *, geometric: bool) -> Tensor:
    """[T]: at each masked-in token, its sequence's ratio: the product over its tokens, or, with
    `geometric`, its length-th root (GSPO, eq. 7). 1 elsewhere."""
    over = batch.mean_by_sequence if geometric else batch.sum_by_sequence
    return safe_exp(batch.to_tokens(over(log_ratio)))


def correction_weights(old: Tensor, batch: Batch, mode: Correction, cap: float, floor: float = 0.0) -> Tensor:
    """Weights old / sampler that correct for tokens drawn by the sampler: [T], detached.

    token_truncate      min(w_t, cap)                  (TIS, Yao et al. 2025)
    token_mask          w_t where in [floor, cap], else 0   (IcePop, 2025)
    sequence_truncate   min(product of w_t, cap)
    sequence_mask       product where in [floor, cap], else 0
    geometric_mask      1 where the geometric mean is in [floor, cap], else 0

    Tokens of demonstrations have no sampler: weight 1. So does all of a batch without sampler_logps.
    """
    if mode == "none" or batch.sampler_logps is None:
        return torch.ones_like(old)
    log_w = torch.where(batch.mask, old.detach() - batch.sampler_logps, 0)
    if batch.demonstrated is not None:
        log_w = log_w.masked_fill(batch.demonstrated, 0)
    if mode.startswith("token"):
        weights = safe_exp(log_w)
    else:
        weights = sequence_ratio(log_w, batch, geometric=mode == "geometric_mask")
    inside = ((weights >= floor) & (weights <= cap)).to(weights.dtype)
    if mode == "geometric_mask":
        weights = inside
    elif mode.endswith("mask"):
        weights = weights * inside
    else:
        weights = weights.clamp(max=cap)
    return weights if batch.demonstrated is None else weights.masked_fill(batch.demonstrated, 1)
