"""Preference-oriented supervised fine-tuning: be likelier than models that are aligned already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from rft.algorithms.base import Algorithm, PolicyOutput, Unit, required, setting
from rft.batch import Batch


@dataclass(frozen=True)
class PoFT(Algorithm):
    """loss = -log sigmoid(beta * (l(policy) - l(aligned))), l the mean log p per token of the demonstration;
    Fan et al., "Preference-oriented supervised fine-tuning" (2024).

    A Bradley-Terry preference not between responses but between models: the policy is to find the
    demonstration likelier than an aligned model does. A demonstration that the aligned model
    finds unlikely is soon won, and pulls little: noise is damped. The aligned model is the reference;
    for several, or ones with another tokenizer, give their mean log p per token in
    `columns["aligned_logps"]` [N] (`data.numbers`), which then takes the reference's place.
    """

    online: ClassVar[bool] = False
    unit: ClassVar[Unit] = "sequence"
    needs_demonstrations: ClassVar[bool] = True

    beta: float = setting(1.0, "scale of the difference", gt=0)
    from_column: bool = setting(False, "read the aligned models' log-probs from the data")
    length_normalized: bool = setting(True, "mean log-prob per token; false: of the whole response")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.from_column else frozenset({"ref_logps"})

    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        over = batch.mean_by_sequence if self.length_normalized else batch.sum_by_sequence
        if self.from_column:
            aligned = required(batch.columns.get("aligned_logps"), "the column aligned_logps")
        else:
            aligned = over(required(batch.ref_logps, "ref_logps"))
        return -F.logsigmoid(self.beta * (over(policy.logps) - aligned))
