"""REINFORCE++: PPO's stability without its critic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rft.algorithms.base import required, setting
from rft.algorithms.math.policy_gradient import discounted, group_mean, whiten
from rft.algorithms.math.sequences import at_last_token
from rft.algorithms.policy_gradient.base import ClippedPolicyGradient
from rft.batch import Batch


@dataclass(frozen=True)
class ReinforcePP(ClippedPolicyGradient):
    """Hu et al., "REINFORCE++" (2025), eq. 7 to 10.

    Each token's return is the reward at the end less the KL of this and all later tokens; advantages
    are the returns normalised over all tokens of the whole batch, in PPO's clipped objective. With
    `baseline: group` (REINFORCE++-baseline, for several completions a prompt) the group's mean is taken off
    the rewards first, and the KL is a k2 term of the loss (`kl_in: loss`, `kl_estimator: k2`).

    Against `grpo`, the scale is the batch's, not the group's: easy prompts are not blown up. Where
    all rewards of the batch are equal and there is no KL, advantages are 0.
    """

    kl_in: Literal["loss", "reward"] = setting(
        "reward", "where that KL goes: a term of the loss, or of the reward"
    )
    baseline: Literal["none", "group"] = setting("none", "take the group's mean off the rewards first")
    gamma: float = setting(1.0, "discount per token", ge=0, le=1)

    def advantages(self, batch: Batch) -> Tensor:
        rewards = required(batch.rewards, "rewards")
        if self.baseline == "group":
            rewards = rewards - group_mean(rewards, batch.group)
        returns = discounted(at_last_token(rewards, batch) - self.kl_penalty(batch), batch, self.gamma)
        return whiten(returns, self.trained(batch))

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.baseline == "group" and num_generations < 2:
            problems.append(
                "baseline: group needs num_generations of at least 2; write baseline: none for one"
            )
        return problems
