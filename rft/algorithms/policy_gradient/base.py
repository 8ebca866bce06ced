"""Bases of the policy-gradient algorithms: the KL to the reference, the correction for the
sampler, the averaging, the diagnostics. A subclass gives `advantages`, and one of the two objectives
here, or its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rft.algorithms.base import Normalization, PolicyOutput, required, setting
from rft.algorithms.extras import ReadsDistributions
from rft.algorithms.math.policy_gradient import (
    Correction,
    KLEstimator,
    Proximal,
    clipped,
    clipped_surrogate,
    correction_weights,
    count_degenerate,
    full_kl,
    proximal_logps,
    safe_exp,
    sampled_kl,
)
from rft.batch import Batch


@dataclass(frozen=True)
class PolicyGradient(ReadsDistributions):
    """loss = - correction * objective + beta * KL(policy || reference) - entropy_coef * entropy, per token.
    Demonstrated tokens have no entropy term."""

    beta: float = setting(0.0, "weight of the KL to the reference; 0: no reference is needed", ge=0)
    kl_in: Literal["loss", "reward"] = setting(
        "loss", "where that KL goes: a term of the loss, or of the reward"
    )
    kl_estimator: KLEstimator = setting("k3", "its estimator in the loss: k1, k2, k3, or full (vocabulary)")
    normalization: Normalization = setting("token", "average over tokens, sequences, or a constant length")
    correction: Correction = setting("token_truncate", "weights for learner against sampler log-probs")
    correction_cap: float = setting(2.0, "upper bound of these weights", gt=0)
    correction_floor: float = setting(0.0, "lower bound, for the masking corrections", ge=0)
    proximal: Proximal = setting(
        "recomputed", "what the clip is around: recomputed, interpolated, or sampler"
    )
    entropy_coef: float = setting(
        0.0,
        "weight of the policy's entropy, which the loss then raises; costs a second pass of the head",
        ge=0,
    )
    mask_truncated: bool = setting(False, "leave completions that ran into the length limit out of the loss")

    @abstractmethod
    def advantages(self, batch: Batch) -> Tensor:
        """[T] float32, of a whole batch."""

    @abstractmethod
    def objective(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        """[T], to be maximised. A multiple of the advantage: where that is 0 it is 0, with its gradient; an
        objective for which this is not so needs an `acts_on`."""

    @property
    def needs(self) -> frozenset[str]:
        old = {"old_logps"} if self.proximal == "recomputed" else set()
        return frozenset({"rewards"} | old | ({"ref_logps"} if self.beta and not self._full_kl else set()))

    @property
    def before_prepare(self) -> frozenset[str]:
        later = set() if self.beta and self.kl_in == "reward" else {"ref_logps"}
        if not later or self.prescored:
            return self.needs - later
        return self.needs - later - {"old_logps"}

    @property
    def _full_kl(self) -> bool:
        return bool(self.beta) and self.kl_in == "loss" and self.kl_estimator == "full"

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset({"kl"} if self._full_kl or self.entropy_coef else set())

    @property
    def compares_distributions(self) -> bool:
        return self._full_kl

    def divergence(self, logps: Tensor, reference: Tensor) -> Tensor:
        """KL(policy || reference); with an entropy coefficient, minus the entropy: reads no reference."""
        return (logps.exp() * logps).sum(-1) if self.entropy_coef else full_kl(logps, reference)

    @property
    def known_divergence(self) -> tuple[Literal["reverse", "forward", "js"], float] | None:
        plain = type(self).divergence is PolicyGradient.divergence
        return ("reverse", 0.5) if plain and not self.entropy_coef else None

    @property
    def normalizer(self) -> Normalization:
        return self.normalization

    def prepare(self, batch: Batch) -> Batch:
        return batch.with_(advantages=self.advantages(batch), mask=self.trained(batch))

    def trained(self, batch: Batch) -> Tensor:
        """[T] bool: the tokens that stay in the mask. Statistics over tokens (whitening) are over these;
        statistics over rewards are over all completions, as each is a sample of its prompt's reward."""
        if not self.mask_truncated or batch.truncated is None:
            return batch.mask
        return batch.mask & ~batch.to_tokens(batch.truncated)

    def acts_on(self, batch: Batch) -> Tensor:
        if self.entropy_coef or (self.beta and self.kl_in == "loss"):
            return batch.mask
        return batch.mask & (required(batch.advantages, "advantages") != 0)

    def around(self, policy: PolicyOutput, batch: Batch) -> Batch:
        """The batch with the log-probs of the proximal policy as `old_logps`."""
        if self.proximal == "recomputed" or batch.sampler_logps is None:
            return batch
        logps = policy.logps.detach()
        return batch.with_(
            old_logps=proximal_logps(logps, batch, interpolate=self.proximal == "interpolated")
        )

    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        batch = self.around(policy, batch)
        loss = -self.weights(policy, batch) * self.objective(policy, batch)
        if self.beta and self.kl_in == "loss":
            loss = loss + self.kl_weight(batch.state) * self.kl(policy, batch)
        if self.entropy_coef:
            minus_entropy = required(policy.kl, "policy.kl")
            if batch.demonstrated is not None:
                minus_entropy = minus_entropy.masked_fill(batch.demonstrated, 0)
            loss = loss + self.entropy_coef * minus_entropy
        return loss.masked_fill(~batch.mask, 0)

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.entropy_coef and self._full_kl:
            problems.append(
                "entropy_coef and kl_estimator: full both read the vocabulary in the loss, and there is one "
                "such reading; write kl_estimator: k3, or entropy_coef: 0"
            )
        return problems

    def weights(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        """[T], detached: old policy against sampler."""
        old = batch.old_logps_or(policy.logps)
        return correction_weights(old, batch, self.correction, self.correction_cap, self.correction_floor)

    def kl_weight(self, state: Mapping[str, float]) -> float:
        """`beta`, unless an algorithm adapts it."""
        return self.beta

    def kl(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        """[T]: KL(policy || reference)."""
        if self.kl_estimator == "full":
            return required(policy.kl, "policy.kl")
        return sampled_kl(policy.logps, required(batch.ref_logps, "ref_logps"), self.kl_estimator)

    def kl_penalty(self, batch: Batch) -> Tensor:
        """[T]: what the KL takes off each token's reward (k1 at the policy that sampled)."""
        if not self.beta or self.kl_in == "loss":
            return torch.zeros(batch.num_tokens, device=batch.tokens.device)
        kl = behaviour_logps(batch) - required(batch.ref_logps, "ref_logps")
        return self.kl_weight(batch.state) * kl.masked_fill(~batch.mask, 0)

    def task_rewards(self, batch: Batch) -> Tensor:
        """[N]: rewards before any KL. Groups in which they are all equal have nothing to compare: between
        equal rewards, the KL's sampling noise is no signal."""
        return required(batch.rewards, "rewards")

    def sequence_rewards(self, batch: Batch) -> Tensor:
        """[N]: `task_rewards`, less the KL of the whole sequence where `kl_in` is reward."""
        return self.task_rewards(batch) - batch.sum_by_sequence(self.kl_penalty(batch))

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, Tensor]:
        """policy/kl is to the policy that sampled (NaN on a demonstration, which none did), policy/kl_ref to
        the reference: both k3, the latter exact where `kl_estimator` is full."""
        batch, logps = self.around(policy, batch), policy.logps.detach()
        ratio = safe_exp(logps - batch.old_logps_or(logps))
        metrics = {"policy/ratio": ratio, "policy/ratio_spread": (ratio - 1).abs()}
        given = torch.zeros_like(batch.mask) if batch.demonstrated is None else batch.demonstrated
        sampler = batch.old_logps if batch.sampler_logps is None else batch.sampler_logps
        if sampler is not None:
            metrics["policy/kl"] = sampled_kl(logps, sampler).masked_fill(given, torch.nan)
        if batch.sampler_logps is not None:
            mismatch = sampled_kl(batch.old_logps_or(logps), batch.sampler_logps)
            metrics["policy/mismatch_kl"] = mismatch.masked_fill(given, torch.nan)
        if self.correction != "none" and batch.sampler_logps is not None:
            weights = self.weights(policy, batch)
            metrics["policy/correction"] = weights
            metrics["policy/corrected_away"] = ((weights == 0) | (weights >= self.correction_cap)).float()
            metrics["policy/masked_fraction"] = (weights == 0).float()
        if batch.ref_logps is not None:
            metrics["policy/kl_ref"] = sampled_kl(logps, batch.ref_logps)
        elif policy.kl is not None and self._full_kl:
            metrics["policy/kl_ref"] = policy.kl.detach()
        if policy.entropy is not None:
            metrics["policy/entropy"] = policy.entropy.detach()
        return metrics

    def report(self, batch: Batch) -> dict[str, float]:
        """group/degenerate: how many groups have all rewards equal; group/degenerate_share: of all."""
        if batch.rewards is None or not batch.num_groups:
            return {}
        count = count_degenerate(batch.rewards, batch.group)
        return {"group/degenerate": float(count), "group/degenerate_share": count / batch.num_groups}


@dataclass(frozen=True)
class ClippedPolicyGradient(PolicyGradient):
    """PPO's objective: min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)."""

    epsilon: float = setting(0.2, "clip range of the ratio below 1", ge=0, le=1)
    epsilon_high: float | None = setting(None, "clip range above 1; null: the same as epsilon", ge=0)
    dual_clip: float | None = setting(None, "bound on the ratio where the advantage is negative", gt=1)

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.dual_clip is not None and self.dual_clip <= 1 + self.high:
            problems.append(
                f"dual_clip: {self.dual_clip} lies within the clip range; write more than {1 + self.high:g}"
            )
        return problems

    @property
    def high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def ratio(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        """[T]: current over old policy."""
        return safe_exp(log_ratio(policy, batch))

    def objective(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        advantages = required(batch.advantages, "advantages")
        return clipped_surrogate(
            self.ratio(policy, batch), advantages, self.epsilon, self.high, self.dual_clip
        )

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, Tensor]:
        metrics = super().metrics(policy, batch)
        with torch.no_grad():
            batch = self.around(policy, batch)
            ratio, advantages = self.ratio(policy, batch), required(batch.advantages, "advantages")
            metrics["policy/clip_fraction"] = clipped(ratio, advantages, self.epsilon, self.high)
        return metrics


@dataclass(frozen=True)
class Reinforce(PolicyGradient):
    """REINFORCE's objective, A * log p: on-policy, nothing is clipped. The value of the loss means
    little; its gradient is the policy gradient (Williams 1992)."""

    on_policy: ClassVar[bool] = True

    def objective(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        return required(batch.advantages, "advantages") * policy.logps


def behaviour_logps(batch: Batch) -> Tensor:
    """[T]: log-probs of the policy that sampled, by the learner's account, or else by the sampler's."""
    return required(
        batch.sampler_logps if batch.old_logps is None else batch.old_logps, "old_logps or sampler_logps"
    )


def log_ratio(policy: PolicyOutput, batch: Batch) -> Tensor:
    """[T]: log of current over old policy, with gradient; 0 where the mask is False."""
    return torch.where(batch.mask, policy.logps - batch.old_logps_or(policy.logps), 0)
