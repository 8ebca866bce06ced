"""Dr.GRPO: GRPO without its length and difficulty biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rft.algorithms.base import Normalization, setting
from rft.algorithms.policy_gradient.grpo import GRPO


@dataclass(frozen=True)
class DrGRPO(GRPO):
    """Liu et al., "Understanding R1-Zero-like training" (2025), section 3.2.

    A_i = r_i - mean(r), not divided by the standard deviation (which gives very easy and very hard
    prompts more weight), and token losses divided by a constant length (dividing by each answer's length
    penalises long wrong answers less). Otherwise `grpo`, with the same degenerate case.
    """

    normalization: Normalization = setting(
        "constant", "average the loss over tokens, sequences or a constant length"
    )
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "none", "divide advantages by the standard deviation of the group, of the batch, or not"
    )
