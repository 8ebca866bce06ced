"""Simple preference optimisation: no reference, likelihood per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rft.algorithms.base import PolicyOutput, setting
from rft.algorithms.math.preferences import LossParams, sigmoid
from rft.algorithms.preference.base import OfflinePreference
from rft.batch import Batch


@dataclass(frozen=True)
class SimPO(OfflinePreference):
    """loss = -log sigmoid(beta * (s(chosen) - s(rejected)) - gamma), s = mean log p per token; Meng et al.,
    "SimPO" (2024), eq. 6.

    Against `dpo`: what is compared is what generation maximises, so no reference is needed, and
    long responses win nothing. `gamma` is how far chosen has to lead. With `alpha`, AlphaPO (Gupta et al.
    2025): s = (1 - p^-alpha) / alpha for p = exp(mean log p), which tends to log p as alpha goes to 0.
    """

    beta: float = setting(2.0, "scale of the margin", gt=0)
    gamma: float = setting(1.0, "margin by which the chosen has to lead", ge=0)
    alpha: float = setting(0.0, "AlphaPO: shape of the reward; 0: log-likelihood")
    label_smoothing: float = setting(0.0, "share of pairs whose labels are taken to be flipped", ge=0, lt=0.5)

    def implicit_rewards(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        mean = batch.mean_by_sequence(policy.logps)
        if self.alpha:
            mean = -torch.expm1((-self.alpha * mean).clamp(max=80.0)) / self.alpha
        return self.beta * mean

    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        first, second = self.pairs(batch)
        reward = self.implicit_rewards(policy, batch)
        return sigmoid(reward[first] - self.gamma, reward[second], LossParams(1.0, self.label_smoothing))
