"""GPG: REINFORCE with a group baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.base import setting
from rft.algorithms.math.policy_gradient import count_degenerate, degenerate, group_mean, group_std
from rft.algorithms.policy_gradient.base import Reinforce
from rft.batch import Batch


@dataclass(frozen=True)
class GPG(Reinforce):
    """Chu et al., "GPG: group policy gradient" (2025), eq. 5 to 8.

    The objective is alpha * A * log p with A_i = r_i - mean(r): no ratio, no clip, no reference. Groups
    whose rewards are all equal add nothing to the sum but are counted in the mean; alpha = groups /
    non-degenerate groups compensates for that. It differs from on-policy `grpo` by alpha, and by not
    dividing by the standard deviation. If all groups are degenerate, all advantages are 0.
    """

    min_generations: ClassVar[int] = 2

    scale_rewards: bool = setting(False, "divide advantages by the standard deviation of the group")

    def advantages(self, batch: Batch) -> torch.Tensor:
        rewards = self.sequence_rewards(batch)
        centred = rewards - group_mean(rewards, batch.group)
        if self.scale_rewards:
            centred = centred / (group_std(rewards, batch.group) + 1e-4)
        task = self.task_rewards(batch)
        valid = batch.num_groups - count_degenerate(task, batch.group)
        alpha = batch.num_groups / max(valid, 1)
        return batch.to_tokens(alpha * centred.masked_fill(degenerate(task, batch.group), 0))
