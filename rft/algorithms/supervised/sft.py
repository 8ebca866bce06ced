"""Supervised fine-tuning: maximum likelihood of the demonstrated tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.base import Algorithm, PolicyOutput
from rft.batch import Batch


@dataclass(frozen=True)
class SFT(Algorithm):
    """loss = -log p(token), averaged over the tokens of all responses."""

    online: ClassVar[bool] = False
    needs_demonstrations: ClassVar[bool] = True

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return -policy.logps.masked_fill(~batch.mask, 0)
