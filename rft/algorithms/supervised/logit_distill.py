"""Distillation on a dataset: the teacher's distribution at each token of a response."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput, required, setting
from rft.algorithms.divergence import TeacherDivergence
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class LogitDistill(TeacherDivergence, SFT):
    """loss = (1 - alpha) (-log p) + alpha D(teacher, policy) per token; Kim and Rush, "Sequence-level
    knowledge distillation" (2016), sections 2.2 and 3.1, after Hinton et al. (2015).

    D is the forward KL (`beta` 0), as in these papers, or another divergence of `distill`: the generalised
    Jensen-Shannon divergence of GKD, or a skewed KL (DistiLLM). The teacher is the reference model, or the
    config's `teacher` behind an endpoint. That one is asked once, for the K most likely tokens of each place
    of the dataset, which are kept on disk; FIRST (arXiv:2408.12168) distils from five. `alpha: 0` is `sft`.

    With `by_rank`, D is the distance of the sorted probabilities, and the teacher may have another tokenizer:
    it is compared where a token begins in both. The loss of ULD, -log p + 1.5 D, is that of alpha 0.6.
    """

    beta: float = setting(0.0, "interpolation between forward (0) and reverse (1) KL", ge=0, le=1)
    alpha: float = setting(1.0, "weight of the divergence; 1 - alpha is that of -log p", ge=0, le=1)

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset({"kl"} if self.alpha else ())

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        loss = (1 - self.alpha) * super().loss(policy, batch)
        if not self.alpha:
            return loss
        return loss + self.alpha * required(policy.kl, "policy.kl").masked_fill(~batch.mask, 0)

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return policy/divergence, the minimised divergence, in nats per token, and policy/aligned."""
        return {} if policy.kl is None else {"policy/divergence": policy.kl.detach(), **self.aligned(batch)}
