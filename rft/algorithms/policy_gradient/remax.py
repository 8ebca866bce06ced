"""ReMax: the greedy answer's reward is the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rft.algorithms.base import Normalization, Rollout, column, setting
from rft.algorithms.policy_gradient.base import Reinforce
from rft.batch import Batch


@dataclass(frozen=True)
class ReMax(Reinforce):
    """Li et al., "ReMax" (2023), eq. 4 and algorithm 2.

    A = r(sampled) - r(greedy answer to the same prompt), in REINFORCE over the whole sequence. Against
    `rloo`, one sampled completion is enough: the baseline costs one greedy one, which is not trained on.
    Where the policy has become deterministic both answers are the same and A = 0.
    """

    kl_in: Literal["loss", "reward"] = setting(
        "reward", "where that KL goes: a term of the loss, or of the reward"
    )
    normalization: Normalization = setting("constant", "average over tokens, sequences, or a constant length")

    def rollouts(self, num_generations: int, *, progress: float, demonstration: bool) -> Sequence[Rollout]:
        return (*[Rollout()] * num_generations, Rollout(greedy=True, train=False))

    def advantages(self, batch: Batch) -> Tensor:
        return batch.to_tokens(self.sequence_rewards(batch) - column(batch, "baseline"))
