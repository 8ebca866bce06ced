"""Iterative DPO on whole completions and on continuations of the same beginning."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import required, setting
from rft.algorithms.extras import Steps
from rft.algorithms.math.preferences import best_and_worst
from rft.algorithms.preference.iterative_dpo import IterativeDPO
from rft.batch import Batch


@dataclass(frozen=True)
class PrefixDPO(IterativeDPO):
    """`iterative_dpo` with further pairs: a good and a bad continuation of one beginning.

    Completions are split into steps at `separator`, and `branches` continuations are sampled at each boundary
    (the rollouts of Setlur et al., "RL on incorrect synthetic data", 2024, and of `per_step`). The best and
    the worst one of a boundary are a pair if their rewards differ: both begin with the same tokens, which are
    left out of the loss, so that it compares what was written after them. The loss is that of
    `iterative_dpo`, averaged over all pairs. A boundary that every continuation solves, or none, has no pair.
    """

    branches: int = setting(4, "continuations sampled at each step boundary", ge=2)
    separator: str = setting("\n", "text that ends a step")

    @property
    def steps(self) -> Steps:
        return Steps(self.separator, self.branches, pairs=True)

    def pairs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Pair the best and the worst of each beginning. Read `columns["prefix"]`, see `Steps`."""
        rewards = required(batch.rewards, "rewards")
        prefix = batch.columns.get("prefix")
        if prefix is None:  # no boundary had a pair
            return super().pairs(batch)
        number = prefix.nan_to_num(nan=0.0).to(torch.int64)
        key = batch.group * (int(number.max()) + 1) + number
        return best_and_worst(rewards, torch.unique(key, return_inverse=True)[1])
