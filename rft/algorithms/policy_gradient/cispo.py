"""CISPO: clip the importance weight, not the gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput, required, setting
from rft.algorithms.policy_gradient.grpo import GRPO
from rft.batch import Batch


@dataclass(frozen=True)
class CISPO(GRPO):
    """MiniMax, "MiniMax-M1" (2025), eq. 4 and 5.

    The objective is clip(ratio, 1 - epsilon, 1 + epsilon_high).detach() * A * log p: a token far from
    the old policy keeps a bounded gradient, whereas PPO's clip would set it to 0 (including rare "wait"
    tokens that start reflections). The defaults only bound the ratio from above, at 5. On-policy the ratio
    is 1 and the gradient is that of `grpo`.
    """

    epsilon: float = setting(1.0, "clip range of the ratio below 1", ge=0, le=1)
    epsilon_high: float | None = setting(4.0, "clip range above 1; null: the same as epsilon", ge=0)

    def objective(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        weight = self.ratio(policy, batch).detach().clamp(1 - self.epsilon, 1 + self.high)
        return weight * required(batch.advantages, "advantages") * policy.logps
