"""What the policy-gradient algorithms share: the KL to the reference, the correction for the
sampler, the averaging, the diagnostics. A subclass gives `advantages` and `objective`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from rft.algorithms.base import Algorithm, Normalization, PolicyOutput, setting
from rft.algorithms.math.kl import KLEstimator, safe_exp, sampled_kl
from rft.algorithms.math.ratios import Correction, correction_weights
from rft.batch import Batch


@dataclass(frozen=True)
class PolicyGradient(Algorithm):
    """loss = - correction * objective + beta * KL(policy || reference), per token."""

    beta: float = setting(0.0, "weight of the KL to the reference in the loss; 0: no reference", ge=0)
    kl_estimator: KLEstimator = setting("k3", "estimator of that KL: k1, k2, k3, or full (vocabulary)")
    normalization: Normalization = setting("token", "average over tokens, sequences, or a constant length")
    correction: Correction = setting("token_truncate", "weights for learner against sampler log-probs")
    correction_cap: float = setting(2.0, "upper bound of these weights", gt=0)
    correction_floor: float = setting(0.0, "lower bound, for the masking corrections", ge=0)
    mask_truncated: bool = setting(False, "leave completions that ran into the length limit out of the loss")

    @abstractmethod
    def advantages(self, batch: Batch) -> Tensor:
        """[T] float32, of a whole batch."""

    @abstractmethod
    def objective(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        """[T], to be maximised."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rewards", "old_logps"} | ({"ref_logps"} if self.beta else set()))

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset({"kl"} if self.beta and self.kl_estimator == "full" else set())

    @property
    def normalizer(self) -> Normalization:
        return self.normalization

    def prepare(self, batch: Batch) -> Batch:
        batch = batch.with_(advantages=self.advantages(batch))
        if self.mask_truncated and batch.truncated is not None:
            batch = batch.with_(mask=batch.mask & ~batch.to_tokens(batch.truncated))
        return batch

    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        loss = -self.weights(policy, batch) * self.objective(policy, batch)
        if self.beta:
            loss = loss + self.beta * self.kl(policy, batch)
        return loss.masked_fill(~batch.mask, 0)

    def weights(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        """[T], detached: old policy against sampler."""
        old = batch.old_logps_or(policy.logps)
        return correction_weights(old, batch, self.correction, self.correction_cap, self.correction_floor)

    def kl(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        """[T]: KL(policy || reference)."""
        if self.kl_estimator == "full":
            return required(policy.kl, "policy.kl")
        return sampled_kl(policy.logps, required(batch.ref_logps, "ref_logps"), self.kl_estimator)

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, Tensor]:
        """policy/kl is to the policy that sampled, policy/kl_ref to the reference (both k3)."""
        logps = policy.logps.detach()
        old = batch.old_logps_or(logps)
        ratio = safe_exp(logps - old)
        sampler = old if batch.sampler_logps is None else batch.sampler_logps
        kl = sampled_kl(logps, sampler)
        if batch.demonstrated is not None:
            kl = kl.masked_fill(batch.demonstrated, 0)
        found = {"policy/kl": kl, "policy/ratio": ratio, "policy/ratio_spread": (ratio - 1).abs()}
        if self.correction != "none" and batch.sampler_logps is not None:
            weights = self.weights(policy, batch)
            found["policy/correction"] = weights
            found["policy/corrected_away"] = ((weights == 0) | (weights >= self.correction_cap)).float()
        if batch.ref_logps is not None:
            found["policy/kl_ref"] = sampled_kl(logps, batch.ref_logps)
        if policy.entropy is not None:
            found["policy/entropy"] = policy.entropy.detach()
        return found


def required(x: Tensor | None, name: str) -> Tensor:
    """`x`, or a ValueError that names what the batch or the policy output lacks."""
    if x is None:
        raise ValueError(f"the algorithm needs {name}, and it was not filled in")
    return x


def log_ratio(policy: PolicyOutput, batch: Batch) -> Tensor:
    """[T]: log of current over old policy, with gradient; 0 where the mask is False."""
    return torch.where(batch.mask, policy.logps - batch.old_logps_or(policy.logps), 0)
