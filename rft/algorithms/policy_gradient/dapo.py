"""DAPO: GRPO with clip-higher, dynamic sampling, token-level loss and overlong shaping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rft.algorithms.base import setting
from rft.algorithms.policy_gradient.grpo import GRPO
from rft.batch import Batch


@dataclass(frozen=True)
class DAPO(GRPO):
    """Yu et al., "DAPO" (2025), eq. 8 to 13.

    Clip-higher (allows unlikely tokens to grow), dynamic sampling (`keep_group`: groups whose rewards are all
    equal are replaced), a loss averaged over tokens, and a soft length penalty: for limit L and buffer B, 0
    up to L - B tokens, then decreasing linearly to -1 at L.

    If every prompt is always or never solved, dynamic sampling does not find any group to train on.
    """

    epsilon_high: float | None = setting(0.28, "clip range above 1; null: the same as epsilon", ge=0)
    dynamic_sampling: bool = setting(True, "replace groups whose rewards are all equal")
    overlong_buffer: int = setting(
        0, "length of the penalty ramp before max_completion_length, in tokens; 0: no penalty", ge=0
    )
    overlong_penalty: float = setting(1.0, "penalty at max_completion_length", ge=0)

    def keep_group(self, rewards: Sequence[float]) -> bool:
        return not self.dynamic_sampling or len(set(rewards)) > 1

    def task_rewards(self, batch: Batch) -> torch.Tensor:
        rewards = super().task_rewards(batch)
        if not self.overlong_buffer:
            return rewards
        if "max_completion_length" not in batch.state:
            raise ValueError(
                'overlong shaping needs state["max_completion_length"], which this batch does not have'
            )
        excess = batch.lengths - (batch.state["max_completion_length"] - self.overlong_buffer)
        return rewards - self.overlong_penalty * (excess / self.overlong_buffer).clamp(0, 1)

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.overlong_buffer and self.turn_returns != "none":
            problems.append("overlong_buffer shapes the reward of whole sessions; remove it, or turn_returns")
        return problems
