"""Policy-gradient math: group statistics, KL estimators, advantages and probability ratios.

`group` is [N] int64, counted from 0, as in `Batch.group`; the corresponding `x` is [N], or [N, K] by column.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from rft.algorithms.math.sequences import to_grid
from rft.batch import Batch

KLEstimator = Literal["k1", "k2", "k3", "full"]
Correction = Literal[
    "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"
]
Proximal = Literal["recomputed", "interpolated", "sampler"]

MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: larger ratios carry no information, and their squares overflow

# -- groups --------------------------------------------------------------------------------------------


def group_size(group: torch.Tensor) -> torch.Tensor:
    """Return the size of each sequence's group, [N] int64."""
    return torch.bincount(group)[group]


def group_sum(x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return the sum over each sequence's group, shape of `x`."""
    groups = int(group.max()) + 1 if group.numel() else 0
    return x.new_zeros(groups, *x.shape[1:]).index_add(0, group, x)[group]


def group_mean(x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return the mean over each sequence's group, shape of `x`."""
    return group_sum(x, group) / _like(group_size(group), x)


def group_std(x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return the sample standard deviation over each sequence's group (n - 1; 0 for a group of one)."""
    squares = group_sum((x - group_mean(x, group)).square(), group)
    return (squares / _like(group_size(group) - 1, x).clamp(min=1)).sqrt()


def group_max(x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return the maximum over each sequence's group, for `x` [N]."""
    groups = int(group.max()) + 1 if group.numel() else 0
    return x.new_full((groups,), -torch.inf).scatter_reduce(0, group, x, "amax")[group]


def leave_one_out(x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return the mean over the other sequences of the group; in a group of one, `x` itself."""
    size = _like(group_size(group), x)
    others = (group_sum(x, group) - x) / (size - 1).clamp(min=1)
    return torch.where(size > 1, others, x)


def degenerate(x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return whether all values `x` [N] of each sequence's group are equal, [N] bool. Compares extremes
    instead of the standard deviation, which for three values of 0.1 is a rounding error that a division would
    turn into an advantage."""
    return group_max(x, group) == -group_max(-x, group)


def count_degenerate(rewards: torch.Tensor, group: torch.Tensor) -> int:
    """Count the groups whose rewards are all equal, so that their advantages are 0."""
    return int(torch.unique(group[degenerate(rewards, group)]).numel())


def rank_in_group(x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Return ranks within groups, [N] int64: 0 for the highest `x`; ties in order of appearance."""
    order = torch.argsort(x, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    size = torch.bincount(group)
    starts = (size.cumsum(0) - size)[group[order]]
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device) - starts)


def certain_tokens(entropy: torch.Tensor, mask: torch.Tensor, top: float) -> torch.Tensor:
    """Return the indices of the masked-in tokens that are not in the fraction `top` with the highest entropy
    (rounded up), [K] int64."""
    index = mask.nonzero()[:, 0]
    left_out = math.floor((1 - top) * len(index) + 1e-9)
    return index[torch.argsort(entropy[index], stable=True)[:left_out]]


def _like(n: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return n.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


# -- KL ------------------------------------------------------------------------------------------------


def safe_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    """Return exp with the exponent clamped to [-20, 20], so that value and gradient are finite."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sampled_kl(logps: torch.Tensor, other: torch.Tensor, estimator: KLEstimator = "k3") -> torch.Tensor:
    """Estimate KL(policy || other) at each sampled token, in nats, shape of `logps`.

    Schulman, "Approximating KL divergence" (2020). With x sampled from the policy p and r = q(x) / p(x) for
    the other model q, KL(p || q) is the mean over samples of

        k1 = -log r             unbiased, high variance, may be negative
        k2 = (log r)^2 / 2      biased, low variance
        k3 = (r - 1) - log r    unbiased, never negative

    These properties are of the values. As an on-policy *loss*, the gradient of k1 has mean zero (only noise),
    that of k2 is the gradient of KL(p || q), and that of k3 is the gradient of KL(q || p).

    Raises ValueError for "full", which needs distributions over the vocabulary.
    """
    log_r = other - logps
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r.square() / 2
    if estimator == "k3":
        return safe_exp(log_r) - 1 - log_r
    raise ValueError("a full KL needs distributions over the vocabulary; use full_kl")


def full_kl(logps: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return KL(policy || other), [...], from log-probs over the vocabulary, [..., V] each."""
    return (logps.exp() * (logps - other)).sum(-1)


# -- advantages ----------------------------------------------------------------------------------------


def discounted(rewards: torch.Tensor, batch: Batch, discount: float | torch.Tensor) -> torch.Tensor:
    """Return discounted returns [T] of `rewards` [T] within each sequence.

    discount: factor per token, a number or [N].
    """
    grid, real = to_grid(batch)
    x = rewards[grid].masked_fill(~real, 0)
    total, out = x.new_zeros(batch.num_sequences), torch.zeros_like(x)
    for t in reversed(range(x.shape[1])):
        total = x[:, t] + discount * total
        out[:, t] = total
    return rewards.new_zeros(batch.num_tokens).index_put((grid[real],), out[real])


def next_values(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the value at the sequence's next masked-in token, [T]; 0 at the last, a terminal state."""
    grid, real = to_grid(batch)
    x = values[grid].masked_fill(~real, 0)
    shifted = torch.cat([x[:, 1:], x.new_zeros(len(x), 1)], dim=1)
    return values.new_zeros(batch.num_tokens).index_put((grid[real],), shifted[real])


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    gamma: float,
    lam: float | torch.Tensor,
    ends: torch.Tensor | float = 0.0,
) -> torch.Tensor:
    """Return generalised advantage estimates [T] (Schulman et al. 2016, eq. 16).

    rewards, values: [T] float32; values[t] is the critic's value of the state before tokens[t].
    lam: a number, or [N]. ends: [T], the value of the state after the last token of a truncated sequence; 0
    elsewhere. With delta_t = r_t + gamma V_{t+1} - V_t, the advantage is the sum of
    (gamma lam)^k delta_{t+k}.
    """
    delta = rewards + gamma * (next_values(values, batch) + ends) - values
    return discounted(delta.masked_fill(~batch.mask, 0), batch, gamma * lam)


def whiten(x: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
    """Normalise `x` [T] to standard deviation 1, and optionally mean 0, over masked-in tokens; 0 elsewhere.
    Fewer than two tokens are left unchanged."""
    chosen = x[mask]
    if chosen.numel() < 2:
        return x.masked_fill(~mask, 0)
    mean, std = chosen.mean(), chosen.std()
    scaled = (x - mean) / (std + 1e-8)
    return (scaled if shift_mean else scaled + mean).masked_fill(~mask, 0)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns) over masked-in tokens; nan for constant returns.

    1: perfect critic; 0: no better than a constant; negative: worse than a constant.
    """
    v, r = values[mask].double(), returns[mask].double()
    spread = r.var(correction=0) if r.numel() else r.sum()
    return float(1 - (r - v).var(correction=0) / spread) if float(spread) > 0 else float("nan")


# -- ratios --------------------------------------------------------------------------------------------
#
# Three policies are distinguished. The *sampler* generated the tokens (the engine: other kernels, possibly
# older weights). *Old* is the learner's policy before the step. The *current* policy is being optimised.
# Clipping bounds current / old; the correction weights by old / sampler. Separating the two is decoupled PPO
# (Hilton et al., "Batch size-invariance", 2021; AReaL 2025, eq. 5). Old is then the *proximal* policy:
# `recomputed` by a separate forward for several steps per batch, `interpolated` between sampler and current,
# or equal to the `sampler` (not decoupled).


def proximal_logps(logps: torch.Tensor, batch: Batch, *, interpolate: bool) -> torch.Tensor:
    """Return the proximal policy's log-probs [T], detached, without a forward.

    Without `interpolate`, those of the sampler; with it, log-linear between sampler and current policy,

        log p = a * log sampler + (1 - a) * log current,   a = 1 / d for d > 0, else 0,

    where d is the number of versions that the token's sampler lags behind `batch.state["version"]` (A-3PO,
    Li et al. 2025), since a stale sampler is a poor trust-region centre. Demonstrated tokens keep `logps`.
    """
    assert batch.sampler_logps is not None
    sampled = batch.mask if batch.demonstrated is None else batch.mask & ~batch.demonstrated
    share = torch.ones_like(logps)
    if interpolate:
        if batch.version is None or "version" not in batch.state:
            raise ValueError("proximal: interpolated needs the policy versions that sampled the tokens")
        age = (batch.state["version"] - batch.version).to(logps.dtype)
        share = torch.where(age > 0, 1 / age.clamp(min=1), 0)
    return torch.where(sampled, share * batch.sampler_logps + (1 - share) * logps, logps)


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float, dual: float | None = None
) -> torch.Tensor:
    """Return the PPO objective, to be maximised, shape of `ratio`:
    min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), Schulman et al. 2017, eq. 7. dual: bound c > 1 + high
    of dual-clip PPO (Ye et al. 2020, eq. 5): for A < 0 the objective is at least c * A."""
    near = ratio.clamp(1 - low, 1 + high)
    if dual is not None:
        ratio = torch.where(advantages < 0, ratio.clamp(max=dual), ratio)
    return torch.minimum(ratio * advantages, near * advantages)


def clipped(ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Return 1.0 where the clip of `clipped_surrogate` is active (no gradient), else 0.0."""
    above, below = (ratio > 1 + high) & (advantages > 0), (ratio < 1 - low) & (advantages < 0)
    return (above | below).to(ratio.dtype)


def sequence_ratio(log_ratio: torch.Tensor, batch: Batch, *, geometric: bool) -> torch.Tensor:
    """Return each masked-in token's sequence ratio, [T]; 1 elsewhere. It is the product of the sequence's
    token ratios or, with `geometric`, their geometric mean (GSPO, eq. 7)."""
    over = batch.mean_by_sequence if geometric else batch.sum_by_sequence
    return safe_exp(batch.to_tokens(over(log_ratio)))


def correction_weights(
    old: torch.Tensor, batch: Batch, mode: Correction, cap: float, floor: float = 0.0
) -> torch.Tensor:
    """Return importance weights old / sampler of the off-policy correction, [T], detached.

    token_truncate      min(w_t, cap)                  (TIS, Yao et al. 2025)
    token_mask          w_t where in [floor, cap], else 0   (IcePop, 2025)
    sequence_truncate   min(product of w_t, cap)
    sequence_mask       product where in [floor, cap], else 0
    geometric_mask      1 where the geometric mean is in [floor, cap], else 0

    The weight is 1 for demonstrated tokens, and for all tokens of a batch without sampler_logps.
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
