"""CORY: cooperative training of two copies, where the second also reads the first one's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.base import Rollout, column, setting
from rft.algorithms.math.policy_gradient import group_sum
from rft.algorithms.policy_gradient.grpo import GRPO
from rft.batch import Batch


@dataclass(frozen=True)
class CORY(GRPO):
    """Ma et al., "Coevolving with the other you" (2024), eq. 5 and 6, algorithm 1.

    A pioneer answers the prompt; an observer answers given the prompt and the pioneer's answer. Both receive
    the sum of both rewards, and every `swap_every` steps the two copies of the model swap roles. The
    advantage is `grpo`'s, separately by role (the paper uses PPO). Half of `num_generations` are pioneers.
    With `copies: 1` one model has both roles. The first copy is evaluated and exported as `model`, the
    second is exported as `model-second`.
    """

    min_generations: ClassVar[int] = 4
    turn_level: ClassVar[bool] = False

    copies: int = setting(2, "number of trained copies of the model; 1: it has both roles", ge=1, le=2)
    swap_every: int = setting(50, "interval, in steps, at which the two copies swap roles", ge=1)

    @property
    def hooks(self) -> str:
        return "rft.contrib.second_policy.start" if self.copies == 2 else ""

    def copy_of(self, step: int, *, observer: bool) -> int:
        return (step // self.swap_every + observer) % 2 if self.copies == 2 else 0

    def rollouts(self, num_generations: int, *, progress: float, demonstration: bool) -> Sequence[Rollout]:
        return (Rollout(role="pioneer"), Rollout(role="observer")) * (num_generations // 2)

    def task_rewards(self, batch: Batch) -> torch.Tensor:
        return self._shared(super().task_rewards(batch), batch)

    def sequence_rewards(self, batch: Batch) -> torch.Tensor:
        kl = batch.sum_by_sequence(self.kl_penalty(batch))
        return self.task_rewards(batch) - self._shared(kl, batch)

    def _shared(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the sum of `x` [N] over each pair of pioneer and observer, [N]."""
        pair = column(batch, "pair").long()
        return group_sum(x, pair + batch.group * (int(pair.max()) + 1 if pair.numel() else 1))

    def advantages(self, batch: Batch) -> torch.Tensor:
        """Return GRPO's advantages, with each role of a group as a separate group."""
        role = 2 * batch.group + column(batch, "observer").long()
        return batch.to_tokens(self.relative(self.sequence_rewards(batch), self.task_rewards(batch), role))

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if num_generations % 2:
            problems.append(
                f"pioneers and observers come in pairs; write num_generations: {num_generations + 1}"
            )
        return problems
