"""On-policy distillation: minimise the divergence to a teacher on the student's samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rft.algorithms.base import PolicyOutput, Rollout, required, setting
from rft.algorithms.divergence import TeacherDivergence
from rft.algorithms.math.policy_gradient import group_mean, safe_exp, sampled_kl
from rft.algorithms.policy_gradient.base import log_ratio
from rft.batch import Batch


@dataclass(frozen=True)
class Distill(TeacherDivergence):
    """Agarwal et al., "On-policy distillation of language models" (GKD, 2023), eq. 1 and algorithm 1.

    full: the generalised Jensen-Shannon divergence of student and teacher over the vocabulary at each
    token; `beta` 0 is the forward KL(teacher || student), 1 the reverse KL. With `skew` a and teacher p,
    student q, these are KL(p || a p + (1 - a) q) and KL(q || a q + (1 - a) p) (Ko et al., "DistiLLM", 2024).
    sampled: the reverse KL on sampled tokens only, by REINFORCE (weighted by the ratio to the sampling
    policy) with reward log teacher - log student, which does not need the teacher's distribution in memory.

    The teacher is the reference model, or the config's `teacher` behind an endpoint: `full` is then over its
    K most likely tokens and one outcome for all others. Completions are sampled from the student, except a
    fraction `demonstration_share` that are demonstrations (GKD's 1 - lambda).

    With `reward_weight`, the loss is divergence_weight * divergence - reward_weight * ratio * A * log p on
    sampled tokens, with A = r - mean(r) over the group (GKD with RL fine-tuning, there with
    weights alpha and 1 - alpha).

    With `by_rank`, the divergence is the distance of the sorted probabilities (ULD, arXiv:2402.12030), and
    the teacher may have another tokenizer: it is compared where a token begins in both.

    If student and teacher are equal, the divergence's loss and gradient are 0.
    """

    estimator: Literal["full", "sampled"] = setting(
        "full", "divergence over the vocabulary, or on sampled tokens"
    )
    demonstration_share: float = setting(
        0.0, "fraction of completions replaced by demonstrations", ge=0, le=1
    )
    divergence_weight: float = setting(1.0, "weight of the divergence", gt=0)
    reward_weight: float = setting(0.0, "weight of the policy gradient of the rewards", ge=0)

    @property
    def needs(self) -> frozenset[str]:
        rewarded = {"rewards", "old_logps"} if self.reward_weight else set()
        return frozenset(rewarded | ({"ref_logps", "old_logps"} if self.estimator == "sampled" else set()))

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset({"kl"} if self.estimator == "full" else set())

    @property
    def uses_demonstrations(self) -> bool:
        return self.demonstration_share > 0

    def rollouts(self, num_generations: int, *, progress: float, demonstration: bool) -> Sequence[Rollout]:
        given = round(self.demonstration_share * num_generations) if demonstration else 0
        return (*[Rollout(prefix_share=1.0)] * given, *[Rollout()] * (num_generations - given))

    def prepare(self, batch: Batch) -> Batch:
        if not self.reward_weight:
            return batch
        rewards = required(batch.rewards, "rewards")
        advantages = batch.to_tokens(rewards - group_mean(rewards, batch.group))
        if batch.demonstrated is not None:
            advantages = advantages.masked_fill(batch.demonstrated, 0)
        return batch.with_(advantages=advantages)

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        reward = torch.zeros_like(policy.logps)
        if self.reward_weight:
            reward = self.reward_weight * required(batch.advantages, "advantages")
        loss = torch.zeros_like(policy.logps)
        if self.estimator == "full":
            loss = self.divergence_weight * required(policy.kl, "policy.kl")
        else:
            gap = required(batch.ref_logps, "ref_logps") - policy.logps.detach()
            reward = reward + self.divergence_weight * gap
        if self.estimator == "sampled" or self.reward_weight:
            loss = loss - safe_exp(log_ratio(policy, batch)).detach() * reward * policy.logps
        return loss.masked_fill(~batch.mask, 0)

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        for name in ("skew", "by_rank"):
            if getattr(self, name) and self.estimator == "sampled":
                problems.append(f"{name} needs whole distributions; write estimator: full, or remove it")
        if self.reward_weight and num_generations < 2:
            problems.append("reward_weight compares completions; write num_generations: 2 or more")
        return problems

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return policy/divergence, the minimised divergence (full), and policy/kl_ref.

        policy/kl_ref is k3 to the teacher (sampled), or the divergence if that is the reverse KL.
        """
        if self.estimator == "sampled":
            teacher = required(batch.ref_logps, "ref_logps")
            return {"policy/kl_ref": sampled_kl(policy.logps.detach(), teacher)}
        divergence = required(policy.kl, "policy.kl").detach()
        reverse = {"policy/kl_ref": divergence} if self.beta == 1 and not (self.skew or self.by_rank) else {}
        return {"policy/divergence": divergence, **reverse, **self.aligned(batch)}
