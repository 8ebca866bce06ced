"""Prefix-RFT: some rollouts start with a prefix of a demonstration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.base import PolicyOutput, Rollout, required, setting
from rft.algorithms.math.policy_gradient import certain_tokens, clipped, clipped_surrogate
from rft.algorithms.policy_gradient.dr_grpo import DrGRPO
from rft.batch import Batch


@dataclass(frozen=True)
class PrefixRFT(DrGRPO):
    """Huang et al., "Blending supervised and reinforcement fine-tuning with prefix sampling" (2025), sec. 3.

    For prompts with a demonstration, the first `hybrids` rollouts of a group start with a prefix of it (of a
    random one if there are several), continued by the policy. They form one group with ordinary rollouts, and
    `dr_grpo`'s update applies to all: if the prefix leads to the right answer, its tokens are imitated. The
    prefix is a fraction of the demonstration, drawn for each hybrid from U(low, share_from), where low
    decreases from `share_from` to `share_to` by a cosine schedule over the run, so long prefixes still occur.

    Of all prefix tokens of a step, only those where the policy is most uncertain (the top `entropy_share` by
    entropy, before the step) have an advantage; that of the others is 0, but they count in averages. On
    prefix tokens the ratio is clipped as elsewhere, in a separate range (`prefix_epsilon`), or not at all
    (`prefix_clip: false`).

    Prompts without a demonstration, and all prompts with `hybrids: 0`, are trained by `dr_grpo`. Hybrids do
    not measure the policy's pass rate, so `train.curriculum` does not count them.
    """

    needs_demonstrations: ClassVar[bool] = True
    turn_level: ClassVar[bool] = False

    hybrids: int = setting(1, "rollouts per group that start with a prefix", ge=0)
    share_from: float = setting(
        0.95, "upper bound of the prefix fraction, and initial lower bound", ge=0, lt=1
    )
    share_to: float = setting(0.05, "lower bound of the prefix fraction at the end of the run", ge=0, lt=1)
    entropy_share: float = setting(
        0.2, "fraction of prefix tokens, by highest entropy, that are trained on", ge=0, le=1
    )
    prefix_clip: bool = setting(True, "clip the ratio on prefix tokens too")
    prefix_epsilon: float | None = setting(
        None, "clip range below 1 on prefix tokens; null: epsilon", ge=0, le=1
    )
    prefix_epsilon_high: float | None = setting(
        None, "clip range above 1 on prefix tokens; null: prefix_epsilon, or else epsilon_high", ge=0
    )

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"old_entropy"}

    def least_share(self, progress: float) -> float:
        """Return the lower bound of the prefix fraction at `progress` in [0, 1]."""
        return self.share_to + (self.share_from - self.share_to) * (1 + math.cos(math.pi * progress)) / 2

    def rollouts(self, num_generations: int, *, progress: float, demonstration: bool) -> Sequence[Rollout]:
        hybrids = min(self.hybrids, num_generations) if demonstration else 0
        hybrid = Rollout(prefix_share=self.share_from, prefix_least=self.least_share(progress))
        return (*[hybrid] * hybrids, *[Rollout()] * (num_generations - hybrids))

    def prepare(self, batch: Batch) -> Batch:
        batch = super().prepare(batch)
        if batch.demonstrated is None:
            return batch
        entropy = required(batch.old_entropy, "old_entropy")
        sure = certain_tokens(entropy, batch.mask & batch.demonstrated, self.entropy_share)
        advantages = required(batch.advantages, "advantages")
        return batch.with_(advantages=advantages.index_fill(0, sure, 0.0))

    def _prefix_range(self) -> tuple[float, float]:
        """Return the clip range on prefix tokens, below and above 1."""
        low = self.epsilon if self.prefix_epsilon is None else self.prefix_epsilon
        same = self.high if self.prefix_epsilon is None else self.prefix_epsilon
        return low, same if self.prefix_epsilon_high is None else self.prefix_epsilon_high

    def objective(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        clipped = super().objective(policy, batch)
        if batch.demonstrated is None:
            return clipped
        ratio, advantages = self.ratio(policy, batch), required(batch.advantages, "advantages")
        prefix = ratio * advantages
        if self.prefix_clip:
            prefix = clipped_surrogate(ratio, advantages, *self._prefix_range(), self.dual_clip)
        return torch.where(batch.demonstrated, prefix, clipped)

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        metrics = super().metrics(policy, batch)
        if batch.demonstrated is None:
            return metrics
        with torch.no_grad():
            near = self.around(policy, batch)
            ratio, advantages = self.ratio(policy, near), required(near.advantages, "advantages")
            prefix = torch.zeros_like(ratio)
            if self.prefix_clip:
                prefix = clipped(ratio, advantages, *self._prefix_range())
            clip_fraction = metrics["policy/clip_fraction"]
            metrics["policy/clip_fraction"] = torch.where(batch.demonstrated, prefix, clip_fraction)
        return metrics

    def report(self, batch: Batch) -> dict[str, float]:
        return {**super().report(batch), **demonstration_report(batch)}

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.share_to > self.share_from:
            problems.append(
                f"share_to: {self.share_to:g} lies above share_from: {self.share_from:g}, the largest share; "
                f"write at most {self.share_from:g}"
            )
        if not self.prefix_clip and (self.prefix_epsilon, self.prefix_epsilon_high) != (None, None):
            problems.append("prefix_epsilon is a clip range, and prefix_clip is false; leave one of them out")
        if self.hybrids >= num_generations:
            problems.append(
                f"hybrids: {self.hybrids} leaves no ordinary rollout; write at most {num_generations - 1}"
            )
        return problems


def demonstration_report(batch: Batch) -> dict[str, float]:
    """Return the mean reward of sequences that start with a demonstration, and of the others."""
    if batch.demonstrated is None or batch.rewards is None:
        return {}
    given = torch.zeros(batch.num_sequences, dtype=torch.bool, device=batch.tokens.device)
    given[batch.sequence[batch.demonstrated]] = True
    metrics: dict[str, torch.Tensor] = {
        "reward/demonstrated": batch.rewards[given],
        "reward/own": batch.rewards[~given],
    }
    return {name: float(x.mean()) for name, x in metrics.items() if x.numel()}
