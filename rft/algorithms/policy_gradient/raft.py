"""RAFT and its variants: train only on the best completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rft.algorithms.base import required, setting
from rft.algorithms.math.policy_gradient import Correction, degenerate, group_size, rank_in_group
from rft.algorithms.policy_gradient.base import ClippedPolicyGradient, PolicyGradient, Reinforce
from rft.batch import Batch


@dataclass(frozen=True)
class Chosen(PolicyGradient):
    """Base of rejection sampling: keep the top of each group, or of the batch, with advantage 1.

    Other completions are removed from the mask: they are excluded from averages and from the forward pass.
    """

    top_share: float = setting(0.0, "fraction to keep, rounded up; 0: only the best one", ge=0, le=1)
    rank: Literal["group", "batch"] = setting(
        "group", "apply top_share to each prompt's completions, or to all completions of the step"
    )
    threshold: float | None = setting(0.0, "discard completions with rewards at or below; null: no threshold")

    def chosen(self, batch: Batch) -> torch.Tensor:
        """Return the selected completions, [N] bool.

        Ties within a group go to the first in order; ties within the batch to the one with the better rank in
        its group, so that every prompt is selected once before any is selected twice.
        """
        rewards = self.sequence_rewards(batch)
        place = rank_in_group(rewards, batch.group)
        size = group_size(batch.group)
        if self.rank == "batch":
            order = torch.argsort(place, stable=True)
            order = order[torch.argsort(rewards[order], descending=True, stable=True)]
            place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
            size = torch.full_like(size, len(rewards))
        top = place < torch.ceil(self.top_share * size.double() - 1e-9).clamp(min=1)
        return top if self.threshold is None else top & (required(batch.rewards, "rewards") > self.threshold)

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.rank == "batch" and not self.top_share:
            problems.append("rank: batch chooses a share of all completions; write top_share: 0.2, for one")
        return problems

    def trained(self, batch: Batch) -> torch.Tensor:
        return super().trained(batch) & batch.to_tokens(self.chosen(batch))

    def advantages(self, batch: Batch) -> torch.Tensor:
        return batch.to_tokens(self.chosen(batch).float())

    def keep_group(self, rewards: Sequence[float]) -> bool:
        return self.threshold is None or any(r > self.threshold for r in rewards)


@dataclass(frozen=True)
class RAFT(Chosen, Reinforce):
    """Train only on the best completions of each group.

    Dong et al., "RAFT: reward ranked fine-tuning" (2023), algorithm 1, streamed: each step samples, ranks
    and trains.

    Maximum likelihood of the best of K completions per prompt, regardless of its reward (eq. 5), or of the
    top fraction of each group or of the whole batch (the authors' code: the best 20 % of all). Unlike `grpo`
    it does not learn from bad completions, so entropy decreases faster. With a `threshold`, groups without a
    reward above it are skipped: for binary rewards, where the best of K may be wrong. Scores of a reward
    model lack a natural threshold. With one completion per prompt and a threshold it is rejection sampling.
    """

    threshold: float | None = setting(
        None, "discard completions with rewards at or below; null: no threshold"
    )

    on_policy: ClassVar[bool] = False

    correction: Correction = setting("none", "importance weights of learner to sampler log-probs")


@dataclass(frozen=True)
class RAFTPlusPlus(Chosen, ClippedPolicyGradient):
    """RAFT on all correct completions, with ratio and clip.

    Xiong et al., "A minimalist approach to LLM reasoning" (2025), section 3: RAFT++.

    All completions above the threshold, with PPO's ratio and clip, which allows several optimizer steps per
    batch. It is `grpo` with advantage 1 for correct completions, without the wrong ones.
    """

    top_share: float = setting(1.0, "fraction to keep, rounded up; 0: only the best one", ge=0, le=1)


@dataclass(frozen=True)
class ReinforceRej(ClippedPolicyGradient):
    """REINFORCE with advantages +1 and -1, without groups that are all correct or all wrong.

    Xiong et al. (2025), section 3: Reinforce-Rej. Groups that are all correct or all wrong are excluded;
    other completions have advantage +1 above the threshold and -1 otherwise, minus the KL for `kl_in:
    reward`. The paper finds that excluding all-wrong groups accounts for most of the effect of `grpo`'s
    normalisation.
    """

    min_generations: ClassVar[int] = 2

    threshold: float = setting(0.0, "rewards above it count as correct, others as wrong")

    def right(self, batch: Batch) -> torch.Tensor:
        """Return 1 for correct and 0 for wrong completions, [N] float32."""
        return (self.task_rewards(batch) > self.threshold).float()

    def trained(self, batch: Batch) -> torch.Tensor:
        return super().trained(batch) & batch.to_tokens(~degenerate(self.right(batch), batch.group))

    def advantages(self, batch: Batch) -> torch.Tensor:
        kl = self.task_rewards(batch) - self.sequence_rewards(batch)
        return batch.to_tokens(2 * self.right(batch) - 1 - kl)

    def keep_group(self, rewards: Sequence[float]) -> bool:
        return len({r > self.threshold for r in rewards}) > 1


@dataclass(frozen=True)
class ExpertIteration(RAFT):
    """RAFT on the correct completions of several steps.

    Expert iteration over accumulated data (Anthony et al. 2017; for reasoning, STaR, Zelikman et al.
    2022, and Havrilla et al. 2024): `raft` on all completions above the threshold of this step and the
    `replay` previous steps. With `replay: 0` it is `raft` with `top_share: 1` and `threshold: 0`.
    """

    top_share: float = setting(1.0, "fraction to keep, rounded up; 0: only the best one", ge=0, le=1)
    threshold: float | None = setting(0.0, "discard completions with rewards at or below; null: no threshold")
    replay: int = setting(8, "previous steps whose completions are replayed", ge=0)

    @property
    def hooks(self) -> str:
        return "rft.contrib.replay.start" if self.replay else ""
