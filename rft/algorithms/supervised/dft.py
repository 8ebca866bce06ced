"""Dynamic fine-tuning: each token's loss weighted by the policy's probability of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class DFT(SFT):
    """loss = -sg(p) log p per token; Wu et al., "On the generalization of SFT" (2025).

    SFT is a policy gradient with implicit reward 1 / p, so unlikely tokens have a large weight. The factor p,
    without gradient, cancels it. Tokens of very low probability then have almost no gradient, which helps
    with wrong demonstrations but prevents learning new knowledge.
    """

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return super().loss(policy, batch) * policy.logps.detach().exp()
