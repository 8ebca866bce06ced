"""Prefix-RFT: some rollouts start with the beginning of a demonstration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rft.algorithms.base import Rollout, setting
from rft.algorithms.dr_grpo import DrGRPO
from rft.algorithms.math.groups import group_size, rank_in_group
from rft.algorithms.policy_gradient import required
from rft.batch import Batch


@dataclass(frozen=True)
class PrefixRFT(DrGRPO):
    """Huang et al., "Blending supervised and reinforcement fine-tuning with prefix sampling" (2025).

    For prompts with a demonstration, the first `hybrids` of the group's rollouts are a prefix of it
    with the policy's own continuation. They stand in one group with ordinary rollouts, and
    `dr_grpo`'s update acts on all: if the prefix leads to the right answer, its tokens are imitated.
    Of the prefix only the tokens where the policy was least sure (the top `entropy_share` by entropy)
    take part. The prefix shrinks from `share_from` to `share_to` by a cosine over the run.

    Prompts without a demonstration, and with `hybrids: 0` all, are plain `dr_grpo`.
    """

    needs_demonstrations: ClassVar[bool] = True

    hybrids: int = setting(1, "rollouts of a group that start with a prefix", ge=0)
    share_from: float = setting(0.95, "share of the demonstration given at the start of the run", ge=0, le=1)
    share_to: float = setting(0.05, "share given at the end", ge=0, le=1)
    entropy_share: float = setting(0.2, "share of prefix tokens, by entropy, that take part", ge=0, le=1)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"old_entropy"}

    def prefix_share(self, progress: float) -> float:
        """The share of the demonstration that is given, `progress` in [0, 1]."""
        return self.share_to + (self.share_from - self.share_to) * (1 + math.cos(math.pi * progress)) / 2

    def rollouts(self, num_generations: int, *, progress: float, demonstration: bool) -> Sequence[Rollout]:
        hybrids = min(self.hybrids, num_generations) if demonstration else 0
        hybrid = Rollout(prefix_share=self.prefix_share(progress))
        return (*[hybrid] * hybrids, *[Rollout()] * (num_generations - hybrids))

    def prepare(self, batch: Batch) -> Batch:
        batch = super().prepare(batch)
        if batch.demonstrated is None:
            return batch
        index = (batch.mask & batch.demonstrated).nonzero().squeeze(1)
        entropy, row = required(batch.old_entropy, "old_entropy")[index], batch.sequence[index]
        sure = rank_in_group(entropy, row) >= torch.ceil(self.entropy_share * group_size(row))
        return batch.with_(mask=batch.mask.index_put((index[sure],), torch.zeros_like(sure[sure])))

    def report(self, batch: Batch) -> dict[str, float]:
        return {**super().report(batch), **demonstration_report(batch)}

    def conflicts(self, num_generations: int) -> list[str]:
        found = super().conflicts(num_generations)
        if self.hybrids >= num_generations:
            found.append(
                f"hybrids: {self.hybrids} leaves no ordinary rollout; write at most {num_generations - 1}"
            )
        return found


def demonstration_report(batch: Batch) -> dict[str, float]:
    """Mean reward of the sequences that start with a demonstration, and of the others."""
    if batch.demonstrated is None or batch.rewards is None:
        return {}
    given = torch.zeros(batch.num_sequences, dtype=torch.bool, device=batch.tokens.device)
    given[batch.sequence[batch.demonstrated]] = True
    found: dict[str, Tensor] = {
        "reward/demonstrated": batch.rewards[given],
        "reward/own": batch.rewards[~given],
    }
    return {name: float(x.mean()) for name, x in found.items() if x.numel()}
