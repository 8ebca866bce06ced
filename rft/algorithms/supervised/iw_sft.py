"""Supervised fine-tuning with importance weights per response."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput, required, setting
from rft.algorithms.math.policy_gradient import safe_exp
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class IWSFT(SFT):
    """loss = -w(y) log p per token, w(y) = min(exp(sum_t clip(log p_t - log ref_t)), cap), without gradient;
    Qin and Springenberg, "Supervised fine-tuning on curated data is reinforcement learning" (2025).

    SFT on filtered data maximises a lower bound of the reward; weighting each response by its ratio of policy
    to reference makes the bound tight. Each token's log-ratio is clipped to +- `clip`, since a product over
    hundreds of tokens is otherwise close to 0 or overflows. At the first step, where policy and reference are
    equal, it is `sft`.
    """

    clip: float = setting(0.1, "clip range of each token's log-ratio to the reference", gt=0)
    cap: float = setting(5.0, "upper bound of a response's weight", gt=0)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logps"})

    def weights(self, logps: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the importance weight of each response, [N]."""
        ratio = (logps.detach() - required(batch.ref_logps, "ref_logps")).clamp(-self.clip, self.clip)
        return safe_exp(batch.sum_by_sequence(ratio)).clamp(max=self.cap)

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return super().loss(policy, batch) * batch.to_tokens(self.weights(policy.logps, batch))
