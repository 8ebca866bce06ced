"""Simple preference optimisation: length-normalised likelihood and a target margin, without reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput, setting
from rft.algorithms.math.preferences import LossParams, sigmoid
from rft.algorithms.preference.base import OfflinePreference
from rft.batch import Batch


@dataclass(frozen=True)
class SimPO(OfflinePreference):
    """loss = -log sigmoid(beta * (s(chosen) - s(rejected)) - gamma), s = mean log p per token; Meng et al.,
    "SimPO" (2024), eq. 6.

    Unlike `dpo`, it compares the quantity that generation maximises, so it does not need a reference and does
    not favour long responses. `gamma` is the target margin. With `alpha`, AlphaPO (Gupta et al. 2025):
    s = (1 - p^-alpha) / alpha for p = exp(mean log p), which tends to log p as alpha goes to 0.
    """

    beta: float = setting(2.0, "scale of the margin", gt=0)
    gamma: float = setting(1.0, "target margin of the chosen response", ge=0)
    alpha: float = setting(0.0, "AlphaPO: shape of the reward; 0: log-likelihood")
    label_smoothing: float = setting(0.0, "assumed fraction of flipped labels", ge=0, lt=0.5)

    def implicit_rewards(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        mean = batch.mean_by_sequence(policy.logps)
        if self.alpha:
            mean = -torch.expm1((-self.alpha * mean).clamp(max=80.0)) / self.alpha
        return self.beta * mean

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        first, second = self.pairs(batch)
        reward = self.implicit_rewards(policy, batch)
        return sigmoid(reward[first] - self.gamma, reward[second], LossParams(1.0, self.label_smoothing))
