"""Contrastive preference optimisation: DPO without a reference, with a likelihood term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rft.algorithms.base import PolicyOutput, setting
from rft.algorithms.math.preferences import PAIR_LOSSES, LossParams
from rft.algorithms.preference.base import OfflinePreference
from rft.batch import Batch


@dataclass(frozen=True)
class CPO(OfflinePreference):
    """loss = -log sigmoid(beta * (log p(chosen) - log p(rejected))) - nll * mean log p(chosen); Xu et al.,
    "Contrastive preference optimization" (2024), eqs. 3 to 5.

    It is `dpo` with a uniform reference; the likelihood term, here per token and averaged over pairs,
    prevents the likelihood of chosen responses from decreasing. `loss_type` as in `dpo`; `ipo` uses log p
    per token.
    """

    beta: float = setting(0.1, "scale of the margin", gt=0)
    nll: float = setting(1.0, "weight of the chosen response's negative log-likelihood per token", ge=0)
    loss_type: Literal["sigmoid", "hinge", "ipo"] = setting("sigmoid", "loss function of the margin")
    label_smoothing: float = setting(0.0, "assumed fraction of flipped labels", ge=0, lt=0.5)

    def implicit_rewards(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return self.beta * batch.sum_by_sequence(policy.logps)

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        first, second = self.pairs(batch)
        mean = batch.mean_by_sequence(policy.logps)
        logp = mean if self.loss_type == "ipo" else batch.sum_by_sequence(policy.logps)
        params = LossParams(self.beta, self.label_smoothing)
        loss = PAIR_LOSSES[self.loss_type](logp[first], logp[second], params)
        return loss - self.nll * mean[first]
