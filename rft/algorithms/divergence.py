"""Divergence from a teacher, for algorithms that distil: forward, reverse, Jensen-Shannon, skewed, by
rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rft.algorithms.base import setting
from rft.algorithms.extras import ReadsDistributions
from rft.algorithms.math.policy_gradient import full_kl
from rft.batch import Batch


@dataclass(frozen=True)
class TeacherDivergence(ReadsDistributions):
    """Base of algorithms with a divergence D(teacher, policy) over the vocabulary, or over a teacher's K most
    likely tokens and one outcome for all others."""

    beta: float = setting(0.5, "full: interpolation between forward (0) and reverse (1) KL", ge=0, le=1)
    skew: float = setting(
        0.0, "full, beta 0 or 1: share of the first distribution in the second one, 0: none", ge=0, lt=1
    )

    by_rank: bool = setting(
        False, "full: the distance of the sorted probabilities instead (ULD), for another tokenizer"
    )

    @property
    def compares_ranks(self) -> bool:
        return self.by_rank

    def divergence(self, logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        if self.by_rank:
            return rank_distance(logps, reference.sort(-1, descending=True).values)
        if self.skew and self.beta == 0:
            return skewed_kl(reference, logps, self.skew)
        if self.skew:
            return skewed_kl(logps, reference, self.skew)
        return jensen_shannon(logps, reference, self.beta)

    @property
    def known_divergence(self) -> tuple[Literal["reverse", "forward", "js"], float] | None:
        if self.skew or self.by_rank:
            return None
        if 0 < self.beta < 1:
            return "js", self.beta
        return ("reverse" if self.beta else "forward"), 0.5

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.skew and 0 < self.beta < 1:
            problems.append(
                f"skew is defined for the forward and the reverse KL, and beta is {self.beta:g}; write "
                "beta: 0 or beta: 1, or skew: 0"
            )
        if self.skew and self.by_rank:
            problems.append("skew is defined for KL divergences, and by_rank is another one; write skew: 0")
        return problems

    def aligned(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return policy/aligned: 1 for tokens in whose place a teacher with another tokenizer was asked."""
        if not self.by_rank or batch.teacher_logps is None:
            return {}
        return {"policy/aligned": (batch.teacher_logps[:, 0] > -torch.inf).float()}


def jensen_shannon(logps: torch.Tensor, other: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the generalised Jensen-Shannon divergence, [...], of two log-prob tensors [..., V].

    logps: student; other: teacher.

    Agarwal et al., "On-policy distillation" (2023), eq. 1: with M = beta * teacher + (1-beta) * student,

        beta * KL(teacher || M) + (1 - beta) * KL(student || M)

    By convention, beta = 0 is KL(teacher || student) and beta = 1 is KL(student || teacher).
    """
    if beta == 0.0:
        return full_kl(other, logps)
    if beta == 1.0:
        return full_kl(logps, other)
    weights = logps.new_tensor([beta, 1 - beta]).log()
    mixture = torch.logsumexp(torch.stack([other + weights[0], logps + weights[1]]), dim=0)
    return beta * full_kl(other, mixture) + (1 - beta) * full_kl(logps, mixture)


def rank_distance(logps: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return sum_i |p_(i) - q_(i)|, [...], of the sorted probabilities of two log-prob tensors.

    Boizard et al., "Towards cross-tokenizer distillation: the universal logit distillation loss" (2024,
    arXiv:2402.12030): the Wasserstein distance of two distributions whose outcomes are not matched, at a cost
    of 1 between any two. logps: [..., V]. other: [..., K], sorted, the largest first; what it lacks to a sum
    of 1 is compared with all of p but its K largest, which gives at most the distance of the whole
    distributions. 0 where all of `other` is -inf.
    """
    p = logps.exp().topk(min(other.shape[-1], logps.shape[-1])).values
    p = p.where(other[..., : p.shape[-1]] > -torch.inf, 0.0)
    q = other.exp()
    beyond = q[..., p.shape[-1] :].sum(-1)  # more outcomes than the policy has
    distance = (p - q[..., : p.shape[-1]]).abs().sum(-1) + beyond
    rest = (1 - q.sum(-1)).clamp(min=0) - (1 - p.sum(-1)).clamp(min=0)
    return (distance + rest.abs()).where(other[..., 0] > -torch.inf, 0.0)


def skewed_kl(first: torch.Tensor, second: torch.Tensor, skew: float) -> torch.Tensor:
    """Return KL(first || skew * first + (1 - skew) * second), [...], of two log-prob tensors [..., V].

    Ko et al., "DistiLLM" (2024), section 3.1: with the teacher first it is the skew KL, with the student
    first the skew reverse KL. It is finite where `second` has probability 0: at most -log(skew).
    """
    weights = first.new_tensor([skew, 1 - skew]).log()
    return full_kl(first, torch.logaddexp(first + weights[0], second + weights[1]))
