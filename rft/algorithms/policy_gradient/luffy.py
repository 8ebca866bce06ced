"""LUFFY: groups of sampled completions and whole demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.base import PolicyOutput, Rollout, required, setting
from rft.algorithms.policy_gradient.dr_grpo import DrGRPO
from rft.algorithms.policy_gradient.prefix_rft import demonstration_report
from rft.batch import Batch


@dataclass(frozen=True)
class LUFFY(DrGRPO):
    """Yan et al., "Learning to reason under off-policy guidance" (2025), eq. 5 to 7.

    A group consists of sampled completions and one demonstration, with advantages over all of them. On
    demonstrated tokens the ratio is p / (p + gamma), with p the policy's probability (that of the
    demonstration's author is taken as 1), without clipping: unlikely tokens get a larger gradient than with p
    itself. With several demonstrations, one is drawn at random per place; `train.curriculum` does not count
    them as solved by the policy. Variant of `prefix_rft` with whole demonstrations; without demonstrations it
    is `dr_grpo`.
    """

    needs_demonstrations: ClassVar[bool] = True
    turn_level: ClassVar[bool] = False

    gamma: float = setting(0.1, "shape of the off-policy ratio p / (p + gamma)", gt=0)
    demonstrations: int = setting(1, "number of demonstrations per group", ge=0)

    def rollouts(self, num_generations: int, *, progress: float, demonstration: bool) -> Sequence[Rollout]:
        given = min(self.demonstrations, num_generations) if demonstration else 0
        return (*[Rollout(prefix_share=1.0)] * given, *[Rollout()] * (num_generations - given))

    def objective(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        clipped = super().objective(policy, batch)
        if batch.demonstrated is None:
            return clipped
        p = policy.logps.exp()
        shaped = p / (p + self.gamma) * required(batch.advantages, "advantages")
        return torch.where(batch.demonstrated, shaped, clipped)

    def report(self, batch: Batch) -> dict[str, float]:
        return {**super().report(batch), **demonstration_report(batch)}

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.demonstrations >= num_generations:
            problems.append(
                f"demonstrations: {self.demonstrations} leaves no rollout; write at most "
                f"{num_generations - 1}"
            )
        return problems
