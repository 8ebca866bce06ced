"""GSPO: GRPO with ratio and clip per sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import Normalization, PolicyOutput, setting
from rft.algorithms.math.policy_gradient import sequence_ratio
from rft.algorithms.policy_gradient.base import log_ratio
from rft.algorithms.policy_gradient.grpo import GRPO
from rft.batch import Batch


@dataclass(frozen=True)
class GSPO(GRPO):
    """Zheng et al., "Group sequence policy optimization" (2025), eq. 5 to 7.

    Unlike in `grpo`, each token has the ratio of its sequence, the geometric mean of the token ratios.
    Sequences are clipped as a whole, which is robust to outlier tokens (e.g. from different expert routing).
    The mean of many log-ratios is small, hence clip ranges of order 1e-4. For sequences of one token it is
    `grpo` with `normalization: sequence`.
    """

    epsilon: float = setting(3e-4, "clip range of the sequence's ratio below 1", ge=0, le=1)
    epsilon_high: float | None = setting(4e-4, "clip range above 1; null: the same as epsilon", ge=0)
    normalization: Normalization = setting(
        "sequence", "average the loss over tokens, sequences or a constant length"
    )

    def ratio(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return sequence_ratio(log_ratio(policy, batch), batch, geometric=True)
