"""Estimators of the KL divergence between the policy and another model.

Schulman, "Approximating KL divergence" (2020). With x sampled from the policy p and
r = q(x) / p(x) for the other model q, KL(p || q) is the mean over samples of

    k1 = -log r             unbiased, high variance, may be negative
    k2 = (log r)^2 / 2      biased, low variance
    k3 = (r - 1) - log r    unbiased, never negative

That is about values. As a *loss*, on-policy: the gradient of k1 has mean zero (it moves nothing but
noise), that of k2 is the gradient of KL(p || q), that of k3 is the gradient of KL(q || p).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "full"]
MAX_LOG_RATIO = 20.0  # exp(20) is 5e8: past this a ratio says "another model", and squares overflow


def safe_exp(log_ratio: Tensor) -> Tensor:
    """exp, with the exponent held in [-20, 20] so that neither value nor gradient is ever inf or nan."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sampled_kl(logps: Tensor, other: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """KL(policy || other), one term per sampled token: same shape as `logps`, in nats.

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
