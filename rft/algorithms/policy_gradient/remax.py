"""ReMax: REINFORCE with the reward of the greedy completion as baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rft.algorithms.base import Normalization, Rollout, column, setting
from rft.algorithms.policy_gradient.base import Reinforce
from rft.batch import Batch


@dataclass(frozen=True)
class ReMax(Reinforce):
    """Li et al., "ReMax" (2023), eq. 4 and algorithm 2.

    A = r(sampled) - r(greedy completion of the same prompt), in REINFORCE over the whole sequence. Unlike
    `rloo`, it works with one sampled completion per prompt; the baseline costs one greedy completion, which
    is not trained on. For a deterministic policy both completions are equal and A = 0.
    """

    kl_in: Literal["loss", "reward"] = setting("reward", "apply the KL as a loss term or as a reward penalty")
    normalization: Normalization = setting(
        "constant", "average the loss over tokens, sequences or a constant length"
    )

    def rollouts(self, num_generations: int, *, progress: float, demonstration: bool) -> Sequence[Rollout]:
        return (*[Rollout()] * num_generations, Rollout(greedy=True, train=False))

    def advantages(self, batch: Batch) -> torch.Tensor:
        return batch.to_tokens(self.sequence_rewards(batch) - column(batch, "baseline"))
