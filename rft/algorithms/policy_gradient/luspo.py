"""LUSPO: GSPO without its preference for short completions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput
from rft.algorithms.policy_gradient.gspo import GSPO
from rft.batch import Batch


@dataclass(frozen=True)
class LUSPO(GSPO):
    """Liu et al., "Length-unbiased sequence policy optimization" (2026).

    The objective of a sequence is that of `gspo` times its length, as in the authors' implementation in TRL.
    The gradient of GSPO's ratio, a mean over the sequence, is small for long sequences; with the length as a
    factor every token counts the same.
    """

    def objective(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return super().objective(policy, batch) * batch.to_tokens(batch.lengths)
