"""Clip-Cov and KL-Cov: restrain the tokens that lower the entropy most."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput, required, setting
from rft.algorithms.math.policy_gradient import safe_exp
from rft.algorithms.policy_gradient.base import log_ratio
from rft.algorithms.policy_gradient.grpo import GRPO, GroupRelative
from rft.batch import Batch


@dataclass(frozen=True)
class Covariance(GroupRelative):
    """Base: the covariance of log-prob and advantage, on the policy before the step."""

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"old_logps"}

    @property
    def prescored(self) -> bool:
        return True

    def prepare(self, batch: Batch) -> Batch:
        batch = super().prepare(batch)
        logps, advantages = required(batch.old_logps, "old_logps"), required(batch.advantages, "advantages")
        means = {
            "mean_logp": float(logps[batch.mask].double().mean()),
            "mean_advantage": float(advantages[batch.mask].double().mean()),
        }
        return batch.with_(state={**batch.state, **means})

    def covariance(self, batch: Batch) -> torch.Tensor:
        """Return (log p - mean) * (A - mean) of each token of a prepared batch, with the means over the whole
        step, [T]."""
        logps, advantages = required(batch.old_logps, "old_logps"), required(batch.advantages, "advantages")
        return (logps - batch.state["mean_logp"]) * (advantages - batch.state["mean_advantage"])


@dataclass(frozen=True)
class ClipCov(Covariance, GRPO):
    """Clip-Cov: no gradient for a part of the tokens that lower the entropy most.

    Cui et al., "The entropy mechanism of reinforcement learning" (2025), eq. 10 and 11. `grpo`, where
    a random `share` of all tokens has no gradient, drawn from those with a covariance between
    `covariance_low` and `covariance_high`: likely tokens with a high advantage, which lower the entropy most.
    They still count in averages. The covariance is taken once per step, before it; with several updates the
    authors compute it again.
    """

    share: float = setting(2e-4, "fraction of all tokens without a gradient, at least one token", gt=0, le=1)
    covariance_low: float = setting(1.0, "lower bound of the covariance of tokens that may be chosen")
    covariance_high: float = setting(5.0, "upper bound of the covariance of tokens that may be chosen")

    def prepare(self, batch: Batch) -> Batch:
        batch = super().prepare(batch)
        covariance = self.covariance(batch)
        candidates = (
            batch.mask & (covariance > self.covariance_low) & (covariance < self.covariance_high)
        ).nonzero()[:, 0]
        seed = torch.Generator().manual_seed(int(batch.state.get("version", 0)))
        count = max(int(self.share * int(batch.mask.sum())), 1)
        drawn = candidates[torch.randperm(len(candidates), generator=seed)[:count].to(candidates.device)]
        advantages = required(batch.advantages, "advantages")
        return batch.with_(advantages=advantages.index_fill(0, drawn, 0.0))

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.covariance_low >= self.covariance_high:
            problems.append(
                f"covariance_low: {self.covariance_low:g} is not below covariance_high: "
                f"{self.covariance_high:g}, so no token can be chosen"
            )
        return problems


@dataclass(frozen=True)
class KLCov(Covariance):
    """KL-Cov: a KL penalty on the tokens that lower the entropy most.

    Cui et al., "The entropy mechanism of reinforcement learning" (2025), eq. 12 and 13. The
    objective is ratio * A, and for the `share` of tokens with the highest covariance minus
    `kl_coef` * |log-ratio to the old policy|. At ratio 1 the penalty has no gradient: it acts with several
    updates per batch (train.minibatches, train.num_iterations) or on stale data. The covariance is taken once
    per step, before it.
    """

    share: float = setting(2e-3, "fraction of tokens that are penalised, at least one token", gt=0, le=1)
    kl_coef: float = setting(1.0, "weight of the penalty", gt=0)

    def prepare(self, batch: Batch) -> Batch:
        batch = super().prepare(batch)
        covariance = self.covariance(batch)[batch.mask]
        if not covariance.numel():
            return batch
        count = max(int(self.share * len(covariance)), 1)
        return batch.with_(
            state={**batch.state, "least_covariance": float(covariance.topk(count).values[-1])}
        )

    def objective(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        moved = log_ratio(policy, batch)
        penalised = self.covariance(batch) >= batch.state.get("least_covariance", torch.inf)
        objective = safe_exp(moved) * required(batch.advantages, "advantages")
        return objective - self.kl_coef * penalised * moved.abs()

    def acts_on(self, batch: Batch) -> torch.Tensor:
        return batch.mask  # a token without an advantage may be penalised

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.proximal != "recomputed":
            problems.append(
                f"the penalty compares with the policy before the step, and proximal: {self.proximal} "
                "names another policy; write proximal: recomputed"
            )
        return problems
