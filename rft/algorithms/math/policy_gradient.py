"""The math of policy gradients: statistics of groups, KL estimators, advantages, and probability ratios.

`group` is [N] int64 counted from 0, as in `Batch.group`; `x` beside it is [N] (or [N, K], by column).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rft.algorithms.math.sequences import to_grid
from rft.batch import Batch

KLEstimator = Literal["k1", "k2", "k3", "full"]
Correction = Literal[
    "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"
]
Proximal = Literal["recomputed", "interpolated", "sampler"]

MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: past this a ratio says "another model", and squares overflow

# -- groups --------------------------------------------------------------------------------------------


def group_size(group: Tensor) -> Tensor:
    """[N] int64: how many sequences each sequence's group has."""
    return torch.bincount(group)[group]


def group_sum(x: Tensor, group: Tensor) -> Tensor:
    """Each sequence's group sum, shape of `x`."""
    groups = int(group.max()) + 1 if group.numel() else 0
    return x.new_zeros(groups, *x.shape[1:]).index_add(0, group, x)[group]


def group_mean(x: Tensor, group: Tensor) -> Tensor:
    """Each sequence's group mean, shape of `x`."""
    return group_sum(x, group) / _like(group_size(group), x)


def group_std(x: Tensor, group: Tensor) -> Tensor:
    """Each sequence's group standard deviation (n - 1 in the denominator; 0 for a group of one)."""
    squares = group_sum((x - group_mean(x, group)).square(), group)
    return (squares / _like(group_size(group) - 1, x).clamp(min=1)).sqrt()


def group_max(x: Tensor, group: Tensor) -> Tensor:
    """Each sequence's group maximum, for x [N]."""
    groups = int(group.max()) + 1 if group.numel() else 0
    return x.new_full((groups,), -torch.inf).scatter_reduce(0, group, x, "amax")[group]


def leave_one_out(x: Tensor, group: Tensor) -> Tensor:
    """Mean of the other sequences of the group; in a group of one, the sequence's own value."""
    size = _like(group_size(group), x)
    others = (group_sum(x, group) - x) / (size - 1).clamp(min=1)
    return torch.where(size > 1, others, x)


def degenerate(x: Tensor, group: Tensor) -> Tensor:
    """[N] bool: True where all of a sequence's group have exactly the same value in `x` [N].

    Compared by extremes, not by a standard deviation: three times 0.1 has a rounding error for a
    standard deviation, which a division would blow up into an advantage.
    """
    return group_max(x, group) == -group_max(-x, group)


def count_degenerate(rewards: Tensor, group: Tensor) -> int:
    """The number of groups with all rewards equal, which have no gradient."""
    return int(torch.unique(group[degenerate(rewards, group)]).numel())


def rank_in_group(x: Tensor, group: Tensor) -> Tensor:
    """[N] int64: 0 for the best of each group, then 1, ...; ties in order of appearance."""
    order = torch.argsort(x, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    size = torch.bincount(group)
    starts = (size.cumsum(0) - size)[group[order]]
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=x.device) - starts)


def _like(n: Tensor, x: Tensor) -> Tensor:
    return n.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


# -- KL ------------------------------------------------------------------------------------------------


def safe_exp(log_ratio: Tensor) -> Tensor:
    """exp, with the exponent held in [-20, 20] so that neither value nor gradient is ever inf or nan."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sampled_kl(logps: Tensor, other: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """KL(policy || other), one term per sampled token: same shape as `logps`, in nats.

    Schulman, "Approximating KL divergence" (2020). With x sampled from the policy p and r = q(x) / p(x) for
    the other model q, KL(p || q) is the mean over samples of

        k1 = -log r             unbiased, high variance, may be negative
        k2 = (log r)^2 / 2      biased, low variance
        k3 = (r - 1) - log r    unbiased, never negative

    That is about values. As a *loss*, on-policy: the gradient of k1 has mean zero (it moves nothing but
    noise), that of k2 is the gradient of KL(p || q), that of k3 is the gradient of KL(q || p).

    Raises ValueError for "full": that one needs the whole vocabulary, not sampled log-probs.
    """
    log_r = other - logps
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r.square() / 2
    if estimator == "k3":
        return safe_exp(log_r) - 1 - log_r
    raise ValueError("a full KL needs distributions over the vocabulary; use full_kl")


def full_kl(logps: Tensor, other: Tensor) -> Tensor:
    """KL(policy || other) from log-probs over the vocabulary, [..., V] each: [...]."""
    return (logps.exp() * (logps - other)).sum(-1)


def jensen_shannon(logps: Tensor, other: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence of a student `logps` and a teacher `other`, [..., V]: [...].

    Agarwal et al., "On-policy distillation" (2023), eq. 1: with M = beta * teacher + (1-beta) * student,

        beta * KL(teacher || M) + (1 - beta) * KL(student || M)

    and in the limits, as is the custom, beta = 0 is KL(teacher || student) and beta = 1 is
    KL(student || teacher).
    """
    if beta == 0.0:
        return full_kl(other, logps)
    if beta == 1.0:
        return full_kl(logps, other)
    weights = logps.new_tensor([beta, 1 - beta]).log()
    mixture = torch.logsumexp(torch.stack([other + weights[0], logps + weights[1]]), dim=0)
    return beta * full_kl(other, mixture) + (1 - beta) * full_kl(logps, mixture)


# -- advantages ----------------------------------------------------------------------------------------


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


# -- ratios --------------------------------------------------------------------------------------------
#
# Three policies meet here. The *sampler* made the tokens (the engine: other kernels, perhaps older weights).
# *Old* is the learner's policy before the step. The *current* policy is being changed. The clip holds current
# near old; the correction weighs by old / sampler. Keeping the two apart is decoupled PPO (Hilton et al.,
# "Batch size-invariance", 2021; AReaL 2025, eq. 5). Old is then the *proximal* policy:
# `recomputed` by a forward of its own where a batch is stepped on more than once, `interpolated` between
# sampler and current, or the `sampler` itself (not decoupled).


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
