"""Trajectory balance: sample in proportion to the exponential of the reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.base import PolicyOutput, Unit, column, required, setting
from rft.algorithms.math.policy_gradient import group_mean
from rft.algorithms.math.preferences import sequence_log_ratio
from rft.algorithms.preference.base import OnlinePreference
from rft.batch import Batch


@dataclass(frozen=True)
class TrajectoryBalance(OnlinePreference):
    """Bartoldson et al., "Trajectory balance with asynchrony" (2025), eq. 3 and 4 (VarGrad).

    Per completion, (log Z + log p - log ref - r / beta)^2 with log Z(prompt) the mean over the group of
    r / beta - (log p - log ref), at the policy before the step. The optimum samples in proportion to
    ref * exp(r / beta): the optimum of KL-regularised reward maximisation, so all good answers keep a share.
    It holds for samples of any policy, hence no importance weights. At the first update of a batch the
    gradient is that of REINFORCE with the group's mean as baseline and a KL in the reward, times 2 / beta.
    `reward_difference` is its form without Z.
    """

    unit: ClassVar[Unit] = "sequence"

    beta: float = setting(0.1, "reward per nat of log-ratio to the reference", gt=0)
    refresh_reference: int = setting(
        0, "interval, in steps, of copying the policy to the reference; 0: never", ge=0
    )

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"old_logps"}

    @property
    def prescored(self) -> bool:
        return True

    def _target(self, batch: Batch) -> torch.Tensor:
        """Return r / beta, [N]."""
        return required(batch.rewards, "rewards") / self.beta

    def prepare(self, batch: Batch) -> Batch:
        old, reference = required(batch.old_logps, "old_logps"), required(batch.ref_logps, "ref_logps")
        moved = sequence_log_ratio(old, reference, batch)
        log_z = group_mean(self._target(batch) - moved, batch.group)
        return batch.with_(columns={**batch.columns, "log_z": log_z})

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return (column(batch, "log_z") + self.log_ratio(policy, batch) - self._target(batch)).square()
