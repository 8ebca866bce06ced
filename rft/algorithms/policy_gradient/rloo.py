"""RLOO: REINFORCE with a leave-one-out baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rft.algorithms.base import Normalization, PolicyOutput, setting
from rft.algorithms.math.policy_gradient import degenerate, leave_one_out, sequence_ratio
from rft.algorithms.policy_gradient.base import ClippedPolicyGradient, log_ratio
from rft.batch import Batch


@dataclass(frozen=True)
class RLOO(ClippedPolicyGradient):
    """Ahmadian et al., "Back to basics" (2024), eq. 8; Kool et al. 2019.

    A_i = r_i - mean of the other rewards, an unbiased baseline, equal to G / (G - 1) (r_i - mean(r)).
    The whole completion is one action: its ratio is the product over its tokens, and the KL is part of the
    reward. It differs from `dr_grpo` by the factor G / (G - 1), and by the ratio per sequence instead of per
    token. As in `grpo`, A = 0 if all rewards of a group are equal.
    """

    min_generations: ClassVar[int] = 2
    turn_level: ClassVar[bool] = True

    kl_in: Literal["loss", "reward"] = setting("reward", "apply the KL as a loss term or as a reward penalty")
    normalization: Normalization = setting(
        "sequence", "average the loss over tokens, sequences or a constant length"
    )

    def advantages(self, batch: Batch) -> torch.Tensor:
        rewards = self.sequence_rewards(batch)
        centred = rewards - leave_one_out(rewards, batch.group)
        return batch.to_tokens(centred.masked_fill(degenerate(self.task_rewards(batch), batch.group), 0))

    def ratio(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return sequence_ratio(log_ratio(policy, batch), batch, geometric=False)
