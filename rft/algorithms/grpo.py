"""GRPO: a group of completions of one prompt is its own baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rft.algorithms.base import PolicyOutput, setting
from rft.algorithms.math.groups import degenerate, group_mean, group_std
from rft.algorithms.math.kl import safe_exp
from rft.algorithms.math.ratios import clipped, clipped_surrogate
from rft.algorithms.policy_gradient import PolicyGradient, log_ratio, required
from rft.batch import Batch


@dataclass(frozen=True)
class GRPO(PolicyGradient):
    """Shao et al., "DeepSeekMath" (2024), eq. 3 and 4, with GRPO's parts as settings.

    Every token of completion i has the advantage A_i = (r_i - mean(r)) / std(r) over its group, and
    the objective is PPO's min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A).

    Against PPO there is no critic: the group's mean stands for the value. It degenerates where a
    group's rewards are all equal: A = 0, the group adds nothing but its KL term. A group of one is
    always so. The paper averages per sequence (`normalization: sequence`), which favours short right
    and long wrong answers; the default here averages over tokens.
    """

    min_generations: ClassVar[int] = 2

    epsilon: float = setting(0.2, "clip range of the ratio below 1", ge=0, le=1)
    epsilon_high: float | None = setting(None, "clip range above 1; none: the same as epsilon", ge=0)
    dual_clip: float | None = setting(None, "bound on the ratio where the advantage is negative", gt=1)
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "group", "divide advantages by the standard deviation of the group, of the batch, or not"
    )

    @property
    def high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def advantages(self, batch: Batch) -> Tensor:
        rewards = required(batch.rewards, "rewards")
        centred = rewards - group_mean(rewards, batch.group)
        if self.scale_rewards == "group":
            centred = centred / (group_std(rewards, batch.group) + 1e-4)
        elif self.scale_rewards == "batch" and rewards.numel() > 1:
            centred = centred / (rewards.std() + 1e-4)
        return batch.to_tokens(centred.masked_fill(degenerate(rewards, batch.group), 0))

    def ratio(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        """[T]: current over old policy."""
        return safe_exp(log_ratio(policy, batch))

    def objective(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        advantages = required(batch.advantages, "advantages")
        return clipped_surrogate(
            self.ratio(policy, batch), advantages, self.epsilon, self.high, self.dual_clip
        )

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, Tensor]:
        found = super().metrics(policy, batch)
        with torch.no_grad():
            ratio, advantages = self.ratio(policy, batch), required(batch.advantages, "advantages")
            found["policy/clip_fraction"] = clipped(ratio, advantages, self.epsilon, self.high)
        return found
