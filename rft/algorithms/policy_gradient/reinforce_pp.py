"""REINFORCE++: PPO without a critic, with advantages normalised over the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rft.algorithms.base import required, setting
from rft.algorithms.math.policy_gradient import discounted, group_mean, whiten
from rft.algorithms.math.sequences import at_last_token
from rft.algorithms.policy_gradient.base import ClippedPolicyGradient
from rft.batch import Batch


@dataclass(frozen=True)
class ReinforcePP(ClippedPolicyGradient):
    """Hu et al., "REINFORCE++" (2025), eq. 7 to 10.

    Each token's return is the final reward minus the KL of this and all later tokens; advantages are the
    returns normalised over all tokens of the batch, in PPO's clipped objective. With `baseline: group`
    (REINFORCE++-baseline, for several completions per prompt) the group's mean is first subtracted from the
    rewards, and the KL is a k2 loss term (`kl_in: loss`, `kl_estimator: k2`).

    Unlike in `grpo`, the scale is that of the batch, not of the group, so easy prompts are not amplified. If
    all rewards of the batch are equal and there is no KL, advantages are 0.
    """

    turn_level: ClassVar[bool] = True

    kl_in: Literal["loss", "reward"] = setting("reward", "apply the KL as a loss term or as a reward penalty")
    baseline: Literal["none", "group"] = setting("none", "subtract the group's mean from the rewards first")
    gamma: float = setting(1.0, "discount per token", ge=0, le=1)

    @property
    def reads_order(self) -> bool:
        return self.gamma != 1 or bool(self.beta and self.kl_in == "reward")

    def advantages(self, batch: Batch) -> torch.Tensor:
        rewards = required(batch.rewards, "rewards")
        if self.baseline == "group":
            rewards = rewards - group_mean(rewards, batch.group)
        returns = batch.to_tokens(rewards)
        if self.reads_order:
            returns = discounted(at_last_token(rewards, batch) - self.kl_penalty(batch), batch, self.gamma)
        return whiten(returns, self.trained(batch))

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.baseline == "group" and num_generations < 2:
            problems.append(
                "baseline: group needs num_generations of at least 2; write baseline: none for one"
            )
        return problems
