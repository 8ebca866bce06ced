"""Nash-MD: maximise the win rate against a mixture of policy and reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rft.algorithms.base import Rollout, column, required, setting
from rft.algorithms.math.policy_gradient import KLEstimator
from rft.algorithms.math.preferences import Preference, win_probability
from rft.algorithms.policy_gradient.base import Reinforce
from rft.algorithms.preference.base import without_unknown
from rft.batch import Batch


@dataclass(frozen=True)
class NashMD(Reinforce):
    """Munos et al., "Nash learning from human feedback" (2023), eq. 9 and section 7 (Nash-MD-PG).

    A = P(y is preferred to y') - 1/2, with y sampled from the policy and y' from the geometric mixture
    policy^(1 - mixture) * reference^mixture; plus a KL to the reference with weight `beta` (the paper's
    tau). P is computed from rewards, or given by a pairwise judge as `columns["win_rate"]`. It does not
    require a transitive reward: its fixed point is the Nash equilibrium of the regularised preference game.
    Completions on which the judge abstains are not trained on.
    With `mixture: 0` it is self-play; with 1, the best response to the reference.
    """

    mixture: float = setting(0.125, "weight of the reference in the opponent", ge=0, le=1)
    preference: Preference = setting("compare", "P(win) from rewards: compare (1, 1/2, 0) or bradley_terry")
    beta: float = setting(0.01, "weight of the KL to the reference; 0: no reference model", ge=0)
    kl_estimator: KLEstimator = setting("k2", "KL estimator in the loss: k1, k2, k3, or full (vocabulary)")

    def rollouts(self, num_generations: int, *, progress: float, demonstration: bool) -> Sequence[Rollout]:
        return (*[Rollout()] * num_generations, Rollout(mixture=self.mixture, train=False))

    def prepare(self, batch: Batch) -> Batch:
        return super().prepare(without_unknown(batch, "win_rate") if "win_rate" in batch.columns else batch)

    def advantages(self, batch: Batch) -> torch.Tensor:
        if "win_rate" in batch.columns:
            return batch.to_tokens(batch.columns["win_rate"] - 0.5)
        rewards = required(batch.rewards, "rewards")
        return batch.to_tokens(win_probability(rewards, column(batch, "baseline"), self.preference) - 0.5)
