"""TOPR: tapered off-policy REINFORCE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.base import Normalization, PolicyOutput, required, setting
from rft.algorithms.math.policy_gradient import Correction, group_mean, safe_exp
from rft.algorithms.policy_gradient.base import PolicyGradient, log_ratio_to_sampler, refuse_correction
from rft.batch import Batch


@dataclass(frozen=True)
class TOPR(PolicyGradient):
    """Le Roux et al., "Tapered off-policy REINFORCE" (2025), eq. 8.

    The objective is w * A * log p with A = r - c. Completions with A >= 0 are imitated unchanged (w = 1);
    for the others, w is the ratio of the whole completion to the policy that sampled it, at most 1 and a
    constant in the gradient, so a completion that the policy no longer produces is not pushed further down.
    This allows many updates per batch, and stale batches, without a KL. The baseline c sets the balance of
    the two kinds. It contains the correction for the sampler, hence `correction: none`.
    """

    turn_level: ClassVar[bool] = False

    baseline: float | None = setting(None, "the baseline c of the rewards; null: the mean of the group")
    correction: Correction = setting("none", "importance weights of learner to sampler log-probs")
    normalization: Normalization = setting(
        "constant", "average the loss over tokens, sequences or a constant length"
    )

    def advantages(self, batch: Batch) -> torch.Tensor:
        rewards = self.sequence_rewards(batch)
        baseline = group_mean(rewards, batch.group) if self.baseline is None else self.baseline
        return batch.to_tokens(rewards - baseline)

    def objective(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        advantages = required(batch.advantages, "advantages")
        with torch.no_grad():
            ratio = safe_exp(batch.sum_by_sequence(log_ratio_to_sampler(policy, batch))).clamp(max=1)
            weight = torch.where(advantages < 0, batch.to_tokens(ratio), 1)
        return weight * advantages * policy.logps

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations) + refuse_correction(self)
        if self.baseline is None and num_generations == 1:
            problems.append(
                "the baseline is the mean of the group, which has one completion only; write "
                "num_generations: 8, or for rewards of 0 and 1 baseline: 0.5"
            )
        return problems
