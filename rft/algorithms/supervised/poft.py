"""Preference-oriented supervised fine-tuning: prefer the policy's likelihood to that of aligned models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.base import Algorithm, PolicyOutput, Unit, required, setting
from rft.algorithms.math.preferences import log_sigmoid
from rft.batch import Batch


@dataclass(frozen=True)
class PoFT(Algorithm):
    """loss = -log sigmoid(beta * (l(policy) - l(aligned))), l the mean log p per token of the demonstration;
    Fan et al., "Preference-oriented supervised fine-tuning" (2024).

    A Bradley-Terry preference between models instead of responses: the policy should assign the
    demonstration a higher likelihood than an aligned model. Demonstrations that are unlikely under the
    aligned model soon have a small gradient, which dampens noise. The aligned model is the reference; for
    several models, or models with another tokenizer, provide their mean log p per token in
    `columns["aligned_logps"]` [N] (`data.numbers`), used instead of the reference.
    """

    online: ClassVar[bool] = False
    unit: ClassVar[Unit] = "sequence"
    needs_demonstrations: ClassVar[bool] = True

    beta: float = setting(1.0, "scale of the log-prob difference", gt=0)
    from_column: bool = setting(False, "read the aligned models' log-probs from the column aligned_logps")
    length_normalized: bool = setting(
        True, "use the mean log-prob per token; false: the sum over the response"
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.from_column else frozenset({"ref_logps"})

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        over = batch.mean_by_sequence if self.length_normalized else batch.sum_by_sequence
        if self.from_column:
            aligned = required(batch.columns.get("aligned_logps"), "the column aligned_logps")
        else:
            aligned = over(required(batch.ref_logps, "ref_logps"))
        return -log_sigmoid(self.beta * (over(policy.logps) - aligned))
