"""Dynamic fine-tuning: each token's loss weighed by the policy's own probability of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rft.algorithms.base import PolicyOutput
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class DFT(SFT):
    """loss = -sg(p) log p per token; Wu et al., "On the generalization of SFT" (2025).

    SFT is a policy gradient whose implicit reward is 1 / p: the less likely a token, the harder it
    pulls. The factor p, without gradient, takes that out. A token that the policy finds impossible
    then teaches nothing, which is good for wrong demonstrations and bad for new knowledge.
    """

    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        return super().loss(policy, batch) * policy.logps.detach().exp()
