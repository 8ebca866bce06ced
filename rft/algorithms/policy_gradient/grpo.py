"""GRPO: PPO without a critic, with the mean reward of a group as baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rft.algorithms.base import setting
from rft.algorithms.math.policy_gradient import degenerate, group_mean, group_std
from rft.algorithms.policy_gradient.base import ClippedPolicyGradient, PolicyGradient
from rft.batch import Batch


@dataclass(frozen=True)
class GroupRelative(PolicyGradient):
    """Advantages of GRPO, for any objective: A_i = (r_i - mean(r)) / (std(r) + 1e-4) over the group."""

    min_generations: ClassVar[int] = 2
    turn_level: ClassVar[bool] = True

    scale_rewards: Literal["group", "batch", "none"] = setting(
        "group", "divide advantages by the standard deviation of the group, of the batch, or not"
    )

    def advantages(self, batch: Batch) -> torch.Tensor:
        return batch.to_tokens(
            self.relative(self.sequence_rewards(batch), self.task_rewards(batch), batch.group)
        )

    def relative(self, rewards: torch.Tensor, task: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        """Return rewards relative to their group, [N]; 0 in groups whose `task` rewards are all equal."""
        centred = rewards - group_mean(rewards, group)
        if self.scale_rewards == "group":
            centred = centred / (group_std(rewards, group) + 1e-4)
        elif self.scale_rewards == "batch" and rewards.numel() > 1:
            centred = centred / (rewards.std() + 1e-4)
        return centred.masked_fill(degenerate(task, group), 0)


@dataclass(frozen=True)
class GRPO(GroupRelative, ClippedPolicyGradient):
    """Shao et al., "DeepSeekMath" (2024), eq. 3 and 4, with its components as settings.

    Every token of completion i has the advantage A_i = (r_i - mean(r)) / (std(r) + 1e-4) over its
    group, in PPO's clipped objective.

    Unlike `ppo`, it does not need a critic: the group's mean replaces the value. If a group's rewards are all
    equal (before any KL), A = 0 and the group contributes only the KL term of the loss. The paper averages
    per sequence (`normalization: sequence`), which favours short right and long wrong answers; the default
    here averages over tokens.
    """
