"""SAPO: a soft gate on the ratio instead of a clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import Normalization, PolicyOutput, required, setting
from rft.algorithms.math.policy_gradient import safe_exp
from rft.algorithms.policy_gradient.base import log_ratio
from rft.algorithms.policy_gradient.grpo import GroupRelative
from rft.batch import Batch


@dataclass(frozen=True)
class SAPO(GroupRelative):
    """Gao et al., "Soft adaptive policy optimization" (2025), eq. 5 and 6.

    The objective is f(ratio) * A with f(x) = 4 / tau * sigmoid(tau * (x - 1)) and tau by the sign of A. Its
    gradient is that of `grpo` at ratio 1 and decreases smoothly on both sides, whereas a clip sets it to 0 at
    an edge. Negative advantages, which raise the logits of many unrelated tokens, decrease faster.
    """

    tau_positive: float = setting(1.0, "temperature of the gate where the advantage is positive", gt=0)
    tau_negative: float = setting(1.05, "temperature of the gate where the advantage is not positive", gt=0)
    normalization: Normalization = setting(
        "sequence", "average the loss over tokens, sequences or a constant length"
    )

    def objective(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        advantages = required(batch.advantages, "advantages")
        positive, negative = (advantages.new_tensor(t) for t in (self.tau_positive, self.tau_negative))
        tau = torch.where(advantages > 0, positive, negative)
        ratio = safe_exp(log_ratio(policy, batch))
        return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
