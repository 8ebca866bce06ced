"""SPPO: self-play preference optimisation by regressing the log-ratio on the win rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.base import PolicyOutput, Unit, column, required, setting
from rft.algorithms.math.preferences import Preference, win_rate
from rft.algorithms.preference.base import OnlinePreference, without_unknown
from rft.batch import Batch


@dataclass(frozen=True)
class SPPO(OnlinePreference):
    """Wu et al., "Self-play preference optimization" (2024), eq. 4.5.

    loss_i = (log pi(y_i) / pi_t(y_i) - eta (P(y_i wins) - 1/2))^2, with pi_t the policy of the last
    iteration (the reference, refreshed every `refresh_reference` steps) and P(win) the mean preference
    over the group's other completions: from rewards, or from a pairwise judge as `columns["win_rate"]`.
    Completions on which the judge abstains are not trained on.
    The paper's iteration is a pass over the data with a fixed pi_t; if pi_t equals the policy at every
    update, the log-ratio is 0 and the gradient is that of REINFORCE on the win rate.

    Unlike `online_dpo` it trains each completion independently, by its win rate, so the likelihood of
    winners does not decrease with that of losers. If all rewards are equal it keeps the policy at pi_t.
    """

    unit: ClassVar[Unit] = "sequence"

    eta: float = setting(1000.0, "scale of the target log-ratio eta * (P(win) - 1/2), in nats", gt=0)
    preference: Preference = setting("compare", "P(win) from rewards: compare (1, 1/2, 0) or bradley_terry")
    refresh_reference: int = setting(
        20, "steps per iteration, after which the policy is copied to pi_t; 0: never", ge=0
    )

    def prepare(self, batch: Batch) -> Batch:
        if "win_rate" in batch.columns:
            return without_unknown(batch, "win_rate")
        wins = win_rate(required(batch.rewards, "rewards"), batch.group, self.preference)
        return batch.with_(columns={**batch.columns, "win_rate": wins})

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        target = self.eta * (column(batch, "win_rate") - 0.5)
        return torch.where(batch.lengths > 0, (self.log_ratio(policy, batch) - target).square(), 0)
