"""MaxRL: policy gradient of the log success rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.math.policy_gradient import degenerate, group_mean
from rft.algorithms.policy_gradient.base import ClippedPolicyGradient
from rft.batch import Batch


@dataclass(frozen=True)
class MaxRL(ClippedPolicyGradient):
    """Tajwar et al., "Maximum likelihood reinforcement learning" (2026).

    A_i = (r_i - mean(r)) / mean(r), for non-negative rewards. Dividing by the mean, instead of the standard
    deviation as in `grpo`, turns the gradient of the success rate p into that of log p, up to the order
    that G samples can estimate, so hard prompts get more weight. With G = 2 and rewards 0 and 1 it is
    `dr_grpo` times 2. A = 0 for groups whose rewards are all 0 or all equal.
    """

    min_generations: ClassVar[int] = 2
    turn_level: ClassVar[bool] = True

    def advantages(self, batch: Batch) -> torch.Tensor:
        rewards = self.sequence_rewards(batch)
        mean = group_mean(rewards, batch.group)
        usable = (mean > 0) & ~degenerate(self.task_rewards(batch), batch.group)
        return batch.to_tokens(torch.where(usable, (rewards - mean) / mean.clamp(min=1e-8), 0))
