"""Reward-difference regression (REBEL, PRDP): regress differences of log-ratios on those of rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.base import PolicyOutput, Unit, required, setting
from rft.algorithms.math.preferences import all_pairs, sequence_log_ratio
from rft.algorithms.preference.base import OnlinePreference
from rft.batch import Batch


@dataclass(frozen=True)
class RewardDifference(OnlinePreference):
    """Gao et al., "REBEL" (2024), eq. 2; Deng et al., "PRDP" (2024), eq. 8 and 12.

    (beta * (log-ratio_i - log-ratio_j) - (r_i - r_j))^2 over all pairs of a group; the optimum is that of
    KL-regularised reward maximisation. REBEL refreshes the reference at each iteration of many updates (beta
    is its 1 / eta); PRDP keeps it fixed (`refresh_reference: 0`). If the reference equals the policy at every
    update, the gradient is that of `rloo`, and `clip` has no effect. Proximal clipping (PRDP): log-ratios
    are clipped to within `clip` nats of the sampling policy; the loss is the larger of the squared errors
    with and without clipping.

    Unlike `online_dpo` it uses the size of reward differences. Equal rewards draw the log-ratios together.
    """

    unit: ClassVar[Unit] = "pair"

    beta: float = setting(0.1, "reward per nat of log-ratio", gt=0)
    clip: float | None = setting(
        None, "clip range of a completion's log-ratio per step, in nats; null: no clipping", gt=0
    )
    refresh_reference: int = setting(
        20, "interval, in steps, of copying the policy to the reference; 0: never (PRDP)", ge=0
    )

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"old_logps"}

    def pairs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return all_pairs(batch.group)

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        i, j = self.pairs(batch)
        rewards, log_ratio = required(batch.rewards, "rewards"), self.log_ratio(policy, batch)
        target = rewards[i] - rewards[j]
        loss = (self.beta * (log_ratio[i] - log_ratio[j]) - target).square()
        if self.clip is None:
            return loss
        moved = sequence_log_ratio(policy.logps, batch.old_logps_or(policy.logps), batch)
        near = log_ratio - moved + moved.clamp(-self.clip, self.clip)
        return torch.maximum(loss, (self.beta * (near[i] - near[j]) - target).square())
