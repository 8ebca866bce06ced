"""VESPO: a smooth weight of whole sequences by their importance ratio."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput, required, setting
from rft.algorithms.math.policy_gradient import MAX_LOG_RATIO, Correction
from rft.algorithms.policy_gradient.base import log_ratio_to_sampler, refuse_correction
from rft.algorithms.policy_gradient.grpo import GroupRelative
from rft.batch import Batch


@dataclass(frozen=True)
class VESPO(GroupRelative):
    """Shen et al., "VESPO: variational sequence-level soft policy optimization" (2026).

    The objective is phi(w) * A * log p, where w is the product of the sequence's ratios to the policy that
    sampled it and phi(w) = w^k * exp(lambda * (1 - w)), a constant in the gradient. phi is 1 at w = 1 and
    decreases on both sides, so stale sequences fade out as a whole; k and lambda depend on the sign of A.
    The kernel is the one of the authors' implementation in TRL. It contains the correction for the sampler,
    hence `correction: none`.
    """

    k_positive: float = setting(2.0, "exponent of the ratio where A is not negative", ge=0)
    lambda_positive: float = setting(3.0, "rate of the exponential where A is not negative", gt=0)
    k_negative: float = setting(3.0, "exponent of the ratio where A is negative", ge=0)
    lambda_negative: float = setting(2.0, "rate of the exponential where A is negative", gt=0)
    correction: Correction = setting("none", "importance weights of learner to sampler log-probs")

    def objective(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        advantages = required(batch.advantages, "advantages")
        with torch.no_grad():
            log_w = batch.sum_by_sequence(log_ratio_to_sampler(policy, batch))
            log_w = batch.to_tokens(log_w.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
            positive = self.k_positive * log_w + self.lambda_positive * (1 - log_w.exp())
            negative = self.k_negative * log_w + self.lambda_negative * (1 - log_w.exp())
            weight = torch.where(advantages < 0, negative, positive).exp()
        return weight * advantages * policy.logps

    def conflicts(self, num_generations: int) -> list[str]:
        return super().conflicts(num_generations) + refuse_correction(self)
