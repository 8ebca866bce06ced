"""Iterative DPO: online DPO with a reference refreshed every round and a likelihood term."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput, setting
from rft.algorithms.preference.online_dpo import OnlineDPO
from rft.batch import Batch


@dataclass(frozen=True)
class IterativeDPO(OnlineDPO):
    """Pang et al., "Iterative reasoning preference optimization" (2024), eq. 1; Xu et al. 2023.

    Unlike in `online_dpo`, the policy is copied to the reference after each round, and the best completion's
    negative log-likelihood per token is added, which prevents its likelihood from decreasing with that of the
    worst. With `refresh_reference: 0` and `nll: 0` it is `online_dpo`.
    """

    nll: float = setting(1.0, "weight of the best completion's negative log-likelihood per token", ge=0)
    refresh_reference: int = setting(
        20, "steps per round, after which the policy is copied to the reference; 0: never", ge=0
    )

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        best, _ = self.pairs(batch)
        return super().loss(policy, batch) - self.nll * batch.mean_by_sequence(policy.logps)[best]
