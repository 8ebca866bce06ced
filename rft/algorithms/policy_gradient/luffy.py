"""LUFFY: whole demonstrations in the group, beside the policy's own completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rft.algorithms.base import PolicyOutput, Rollout, required, setting
from rft.algorithms.policy_gradient.dr_grpo import DrGRPO
from rft.algorithms.policy_gradient.prefix_rft import demonstration_report
from rft.batch import Batch


@dataclass(frozen=True)
class LUFFY(DrGRPO):
    """Yan et al., "Learning to reason under off-policy guidance" (2025), eq. 5 to 7.

    The group is the policy's completions and one demonstration, with advantages over all of them. On
    the demonstration's tokens the ratio is p / (p + gamma) with p the policy's probability (its
    author's is taken as 1), not clipped: tokens that the policy finds unlikely get more of the gradient
    than p alone would give. Of several demonstrations each place takes one at random, and
    `train.curriculum` counts none of them as solved by the policy. The parallel counterpart of
    `prefix_rft`; without demonstrations it is `dr_grpo`.
    """

    needs_demonstrations: ClassVar[bool] = True

    gamma: float = setting(0.1, "shape of the off-policy ratio p / (p + gamma)", gt=0)
    demonstrations: int = setting(1, "places of the group that the demonstration takes", ge=0)

    def rollouts(self, num_generations: int, *, progress: float, demonstration: bool) -> Sequence[Rollout]:
        given = min(self.demonstrations, num_generations) if demonstration else 0
        return (*[Rollout(prefix_share=1.0)] * given, *[Rollout()] * (num_generations - given))

    def objective(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        own = super().objective(policy, batch)
        if batch.demonstrated is None:
            return own
        p = policy.logps.exp()
        shaped = p / (p + self.gamma) * required(batch.advantages, "advantages")
        return torch.where(batch.demonstrated, shaped, own)

    def report(self, batch: Batch) -> dict[str, float]:
        return {**super().report(batch), **demonstration_report(batch)}

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.demonstrations >= num_generations:
            problems.append(
                f"demonstrations: {self.demonstrations} leaves no rollout; at most {num_generations - 1}"
            )
        return problems
