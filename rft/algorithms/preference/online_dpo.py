"""Online DPO: DPO on pairs sampled from the policy and scored during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rft.algorithms.base import PolicyOutput, Unit, required, setting
from rft.algorithms.math.preferences import PAIR_LOSSES, LossParams, best_and_worst
from rft.algorithms.preference.base import OnlinePreference
from rft.batch import Batch


@dataclass(frozen=True)
class OnlineDPO(OnlinePreference):
    """Guo et al., "Direct language model alignment from online AI feedback" (2024), eq. 1 and algorithm 1.

    -log sigmoid(beta * (log-ratio of the best - log-ratio of the worst)) on the best and the worst
    completion of each group. Unlike in `dpo`, the data are sampled from the policy. Groups whose rewards are
    all equal are skipped.
    """

    unit: ClassVar[Unit] = "pair"

    beta: float = setting(0.1, "strength of the regularisation towards the reference, in 1 / nats", gt=0)
    loss_type: Literal["sigmoid", "ipo"] = setting("sigmoid", "loss function: sigmoid (DPO) or ipo")

    def pairs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return best_and_worst(required(batch.rewards, "rewards"), batch.group)

    def acts_on(self, batch: Batch) -> torch.Tensor:
        """Return the tokens of each group's best and worst completion, [T] bool.

        Without the other completions, the best and the worst are the same.
        """
        paired = torch.zeros(batch.num_sequences, dtype=torch.bool, device=batch.tokens.device)
        paired[torch.cat(self.pairs(batch))] = True
        return batch.to_tokens(paired)

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        best, worst = self.pairs(batch)
        log_ratio = self.log_ratio(policy, batch)
        return PAIR_LOSSES[self.loss_type](log_ratio[best], log_ratio[worst], LossParams(self.beta))
