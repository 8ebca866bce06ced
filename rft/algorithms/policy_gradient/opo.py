"""OPO: on-policy REINFORCE with the variance-minimising baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.math.policy_gradient import degenerate, group_sum
from rft.algorithms.policy_gradient.base import Reinforce
from rft.batch import Batch


@dataclass(frozen=True)
class OPO(Reinforce):
    """Hao et al., "On-policy RL with optimal reward baseline" (2025), eq. 7.

    The baseline that minimises the gradient's variance weights each reward by its squared gradient norm,
    approximated by the length: b = sum(l_i r_i) / sum(l_i) over the group, A_i = r_i - b. Strictly
    on-policy: one optimizer step per batch. For answers of equal length it is `dr_grpo`.
    """

    min_generations: ClassVar[int] = 2
    turn_level: ClassVar[bool] = True

    def advantages(self, batch: Batch) -> torch.Tensor:
        rewards, lengths = self.sequence_rewards(batch), batch.lengths
        total = group_sum(lengths, batch.group).clamp(min=1)
        baseline = group_sum(lengths * rewards, batch.group) / total
        return batch.to_tokens(
            (rewards - baseline).masked_fill(degenerate(self.task_rewards(batch), batch.group), 0)
        )
