"""Per-step credit: advantages from process rewards, or from sampled continuations at step boundaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rft.algorithms.base import column, setting
from rft.algorithms.extras import Steps
from rft.algorithms.math.policy_gradient import group_mean
from rft.algorithms.math.sequences import to_grid
from rft.algorithms.policy_gradient.base import ClippedPolicyGradient
from rft.batch import Batch


@dataclass(frozen=True)
class PerStep(ClippedPolicyGradient):
    """Kazemnejad et al., "VinePPO" (2024), eq. 9; Setlur et al., "RL on incorrect synthetic data"
    (2024), eq. 3; process rewards: Shao et al. (2024), section 4.1.3.

    A completion is split into steps at `separator`; all tokens of a step share its advantage.
    continuations: A_k = V(after step k) - V(before it), where V is the mean reward of `branches`
    continuations sampled from that state (before the first step: the group's mean; after the last: the
    completion's reward). process: a judge scores each step; scores are normalised over all steps of the
    group, and a step's advantage is the sum of its score and all later ones.

    Unlike `ppo`, it does not need a critic; unlike `grpo`, it assigns credit to individual steps. With one
    step it is `dr_grpo` (continuations) or `grpo` (process).

    Reads `columns["step_ends"]`, and `columns["step_values"]` or `columns["step_rewards"]`, see `Steps`;
    padded with nan.
    """

    source: Literal["continuations", "process"] = setting("continuations", "source of step values")
    branches: int = setting(4, "continuations sampled at each step boundary", ge=1)
    separator: str = setting("\n", "text that ends a step")

    @property
    def reads_order(self) -> bool:
        return True

    @property
    def steps(self) -> Steps:
        return Steps(self.separator, self.branches if self.source == "continuations" else 0)

    def advantages(self, batch: Batch) -> torch.Tensor:
        ends = column(batch, "step_ends")
        real = ~ends.isnan()
        if self.source == "continuations":
            per_step = self._from_values(column(batch, "step_values"), real, batch)
        else:
            per_step = self._from_scores(column(batch, "step_rewards"), real, batch)
        grid, cells = to_grid(batch)
        place = torch.arange(grid.shape[1], device=grid.device).expand_as(grid).contiguous()
        step = torch.searchsorted(ends.nan_to_num(nan=torch.inf), place.to(ends.dtype), right=True)
        last = (real.sum(1, keepdim=True) - 1).clamp(min=0)
        spread = per_step.gather(1, torch.minimum(step, last))
        return spread.new_zeros(batch.num_tokens).index_put((grid[cells],), spread[cells])

    def _from_values(self, values: torch.Tensor, real: torch.Tensor, batch: Batch) -> torch.Tensor:
        rewards = self.sequence_rewards(batch)
        values = values.clone()
        first = values[:, 0].isnan()
        values[:, 0] = torch.where(first, group_mean(rewards, batch.group), values[:, 0])
        after = torch.cat([values[:, 1:], rewards.new_full((len(values), 1), torch.nan)], dim=1)
        is_last = real & (torch.arange(real.shape[1], device=real.device) == real.sum(1, keepdim=True) - 1)
        return torch.where(is_last, rewards[:, None], after).sub(values).masked_fill(~real, 0)

    def _from_scores(self, scores: torch.Tensor, real: torch.Tensor, batch: Batch) -> torch.Tensor:
        group = batch.group[:, None].expand_as(scores)[real]
        x = scores[real]
        count = torch.bincount(group, minlength=batch.num_groups)
        total = x.new_zeros(batch.num_groups)
        mean = (total.index_add(0, group, x) / count.clamp(min=1))[group]
        variance = total.index_add(0, group, (x - mean).square()) / (count - 1).clamp(min=1)
        scaled = scores.new_zeros(scores.shape)
        scaled[real] = (x - mean) / (variance.sqrt()[group] + 1e-4)
        return scaled.flip(1).cumsum(1).flip(1)
