"""RAFT and its kin: train on the good completions, leave out the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rft.algorithms.base import required, setting
from rft.algorithms.math.policy_gradient import Correction, degenerate, group_size, rank_in_group
from rft.algorithms.policy_gradient.base import ClippedPolicyGradient, PolicyGradient, Reinforce
from rft.batch import Batch


@dataclass(frozen=True)
class Chosen(PolicyGradient):
    """Keeps the top of each group, or of the batch, in the mask, with advantage 1. What is left out counts in
    no average, and is not run through the model."""

    top_share: float = setting(0.0, "share that is chosen, rounded up; 0: the best one of each", ge=0, le=1)
    rank: Literal["group", "batch"] = setting(
        "group", "what top_share is a share of: each prompt's completions, or all of the step's"
    )
    threshold: float | None = setting(0.0, "rewards at or below are never chosen; null: no bound")

    def chosen(self, batch: Batch) -> Tensor:
        """[N] bool. Among equal rewards of a group, the first in order; among equal rewards of the batch, the
        one that fewer of its group are better than, so that all prompts come before a second of one."""
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

    def trained(self, batch: Batch) -> Tensor:
        return super().trained(batch) & batch.to_tokens(self.chosen(batch))

    def advantages(self, batch: Batch) -> Tensor:
        return batch.to_tokens(self.chosen(batch).float())

    def keep_group(self, rewards: Sequence[float]) -> bool:
        return self.threshold is None or any(r > self.threshold for r in rewards)


@dataclass(frozen=True)
class RAFT(Chosen, Reinforce):
    """Train on the best of each group, leave out the rest.

    Dong et al., "RAFT: reward ranked fine-tuning" (2023), algorithm 1, streamed: each step samples, ranks
    and trains.

    Maximum likelihood of the best of K of each prompt's completions, whatever its reward (eq. 5), or of the
    top share of each group or of the whole batch (the authors' code: the best 20 % of all). Against `grpo`
    the bad ones say nothing, so entropy falls faster. With a `threshold` a group with nothing above it is
    left out: for rewards that say right or wrong, where the best of K may be wrong. The scores of a reward
    model have no zero to put one at. With one completion a prompt and a threshold it is rejection sampling.
    """

    threshold: float | None = setting(None, "rewards at or below are never chosen; null: no bound")

    on_policy: ClassVar[bool] = False

    correction: Correction = setting("none", "weights for learner against sampler log-probs")


@dataclass(frozen=True)
class RAFTPlusPlus(Chosen, ClippedPolicyGradient):
    """RAFT on all right answers, with ratio and clip.

    Xiong et al., "A minimalist approach to LLM reasoning" (2025), section 3: RAFT++.

    All positive completions, with PPO's ratio and clip, so that a batch can be stepped on several times.
    It is `grpo` with advantage 1 for the right ones and the wrong ones left out.
    """

    top_share: float = setting(1.0, "share that is chosen, rounded up; 0: the best one of each", ge=0, le=1)


@dataclass(frozen=True)
class ReinforceRej(ClippedPolicyGradient):
    """Plus and minus one, without the groups that are all right or all wrong.

    Xiong et al. (2025), section 3: Reinforce-Rej. Groups that are all right or all wrong are left out;
    what remains has advantage +1 above the threshold and -1 below, less the KL where `kl_in` is reward.
    The paper's point: leaving out the all-wrong groups is most of what `grpo`'s normalisation achieves.
    """

    min_generations: ClassVar[int] = 2

    threshold: float = setting(0.0, "rewards above it are right, the others wrong")

    def right(self, batch: Batch) -> Tensor:
        """[N] float32: 1 for right, 0 for wrong."""
        return (self.task_rewards(batch) > self.threshold).float()

    def trained(self, batch: Batch) -> Tensor:
        return super().trained(batch) & batch.to_tokens(~degenerate(self.right(batch), batch.group))

    def advantages(self, batch: Batch) -> Tensor:
        kl = self.task_rewards(batch) - self.sequence_rewards(batch)
        return batch.to_tokens(2 * self.right(batch) - 1 - kl)

    def keep_group(self, rewards: Sequence[float]) -> bool:
        return len({r > self.threshold for r in rewards}) > 1


@dataclass(frozen=True)
class ExpertIteration(RAFT):
    """RAFT on the good answers of many steps.

    Expert iteration over accumulated data (Anthony et al. 2017; for reasoning, STaR, Zelikman et al.
    2022, and Havrilla et al. 2024): `raft` on all good completions of this step and of the `replay` steps
    before it. With `replay: 0` it is `raft` with a top share of 1 and a threshold of 0.
    """

    top_share: float = setting(1.0, "share that is chosen, rounded up; 0: the best one of each", ge=0, le=1)
    threshold: float | None = setting(0.0, "rewards at or below are never chosen; null: no bound")
    replay: int = setting(8, "past steps whose completions are trained on again", ge=0)

    @property
    def hooks(self) -> str:
        return "rft.contrib.replay.start" if self.replay else ""
