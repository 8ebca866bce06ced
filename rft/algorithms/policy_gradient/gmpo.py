"""GMPO: the geometric mean of clipped token ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.base import Normalization, PolicyOutput, required, setting
from rft.algorithms.math.policy_gradient import safe_exp
from rft.algorithms.policy_gradient.base import log_ratio
from rft.algorithms.policy_gradient.grpo import GroupRelative
from rft.batch import Batch


@dataclass(frozen=True)
class GMPO(GroupRelative):
    """Zhao et al., "Geometric-mean policy optimization" (2025), eq. 3 and 4.

    The objective of a sequence is A times the geometric mean of its token ratios. Each token's log-ratio is
    clipped to [-epsilon, epsilon_high] in the direction of A before the mean, so a single outlier moves the
    objective less than the arithmetic mean of `grpo`, which allows a wider range: e^-0.4 to e^0.4. Unlike in
    `gspo`, tokens are clipped, not the sequence.
    """

    turn_level: ClassVar[bool] = False

    epsilon: float = setting(0.4, "clip range of a token's log-ratio below 0", ge=0)
    epsilon_high: float | None = setting(None, "clip range above 0; null: the same as epsilon", ge=0)
    normalization: Normalization = setting(
        "sequence", "average the loss over tokens, sequences or a constant length"
    )

    def _clipped(self, policy: PolicyOutput, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token log-ratios before and after the clip, each [T]."""
        moved, sign = log_ratio(policy, batch), required(batch.advantages, "advantages").sign()
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return moved, sign * torch.minimum(sign * moved, sign * moved.clamp(-self.epsilon, high))

    def objective(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        mean = batch.mean_by_sequence(self._clipped(policy, batch)[1])
        return batch.to_tokens(safe_exp(mean)) * required(batch.advantages, "advantages")

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        metrics = super().metrics(policy, batch)
        with torch.no_grad():
            moved, kept = self._clipped(policy, self.around(policy, batch))
            active = required(batch.advantages, "advantages") != 0
            metrics["policy/clip_fraction"] = ((moved != kept) & active).float()
        return metrics
