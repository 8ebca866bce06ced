"""Base classes of policy-gradient algorithms: KL to the reference, off-policy correction, averaging, metrics.

A subclass defines `advantages`, and uses one of the two objectives here or defines another.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

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
from rft.algorithms.math.turns import as_sequences, turn_returns
from rft.algorithms.policy_gradient.exploration import Exploration
from rft.batch import Batch


@dataclass(frozen=True)
class PolicyGradient(Exploration, ReadsDistributions):
    """loss = - correction * objective + beta * KL(policy || reference) - entropy_coef * entropy, per token.

    turn_level: whether `advantages` only compare the rewards of sequences in groups, so that a session's
    turns can be compared in the same way.
    """

    turn_level: ClassVar[bool] = False

    beta: float = setting(0.0, "weight of the KL to the reference; 0: no reference model", ge=0)
    kl_in: Literal["loss", "reward"] = setting("loss", "apply the KL as a loss term or as a reward penalty")
    kl_estimator: KLEstimator = setting("k3", "KL estimator in the loss: k1, k2, k3, or full (vocabulary)")
    normalization: Normalization = setting(
        "token", "average the loss over tokens, sequences or a constant length"
    )
    correction: Correction = setting("token_truncate", "importance weights of learner to sampler log-probs")
    correction_cap: float = setting(2.0, "upper bound of the correction weights", gt=0)
    correction_floor: float = setting(0.0, "lower bound of the weights, for masking corrections", ge=0)
    proximal: Proximal = setting(
        "recomputed", "centre of the clip: recomputed, interpolated or sampler log-probs"
    )
    mask_truncated: bool = setting(False, "exclude completions truncated by the length limit from the loss")
    turn_returns: Literal["none", "turn", "group", "state"] = setting(
        "none",
        "credit a session's turns with the rewards from that turn on, compared with turns of the same "
        "number, with all turns of the group, or with those in equal states, added to the session's (GiGPO)",
    )
    turn_discount: float = setting(1.0, "discount per turn of `turn_returns`", ge=0, le=1)
    turn_weight: float = setting(1.0, "weight of the advantage among equal states (GiGPO's omega)", ge=0)

    @abstractmethod
    def advantages(self, batch: Batch) -> torch.Tensor:
        """Return the advantages of a whole batch, [T] float32."""

    @abstractmethod
    def objective(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        """Return the objective to maximise, [T].

        It must be a multiple of the advantage, with objective and gradient 0 at advantage 0; otherwise
        override `acts_on`.
        """

    @property
    def needs(self) -> frozenset[str]:
        old = {"old_logps"} if self.proximal == "recomputed" else set()
        reference = {"ref_logps"} if self.beta and not self._full_kl else set()
        return super().needs | {"rewards"} | old | reference

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
        return super().outputs | ({"kl"} if self._full_kl else set())

    @property
    def compares_distributions(self) -> bool:
        return self._full_kl

    def divergence(self, logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return full_kl(logps, reference)

    @property
    def known_divergence(self) -> tuple[Literal["reverse", "forward", "js"], float] | None:
        plain = type(self).divergence is PolicyGradient.divergence
        return ("reverse", 0.5) if plain else None

    @property
    def normalizer(self) -> Normalization:
        return self.normalization

    def prepare(self, batch: Batch) -> Batch:
        return self.explore(batch.with_(advantages=self.credit(batch), mask=self.trained(batch)))

    def credit(self, batch: Batch) -> torch.Tensor:
        """Return the advantages of sessions, or of their turns if `turn_returns` asks for it, [T].

        With `state` they are A(session) + turn_weight * A(turn), each in the algorithm's normalisation: GiGPO
        (arXiv:2505.10978, eq. 3, 7 and 8), whose F_norm is the deviation for grpo and 1 for dr_grpo."""
        if self.turn_returns == "none":
            return self.advantages(batch)
        returns = turn_returns(batch, self.task_rewards(batch), self.turn_discount)
        turns = self.advantages(as_sequences(batch, returns, self.turn_returns))
        return self.advantages(batch) + self.turn_weight * turns if self.turn_returns == "state" else turns

    def trained(self, batch: Batch) -> torch.Tensor:
        """Return the tokens that stay in the mask, [T] bool.

        Token statistics (whitening) use only these; reward statistics use all completions, each of which is a
        sample of its prompt's reward.
        """
        if not self.mask_truncated or batch.truncated is None:
            return batch.mask
        return batch.mask & ~batch.to_tokens(batch.truncated)

    def acts_on(self, batch: Batch) -> torch.Tensor:
        if self.has_bonus or (self.beta and self.kl_in == "loss"):
            return batch.mask
        return batch.mask & (required(batch.advantages, "advantages") != 0)

    def around(self, policy: PolicyOutput, batch: Batch) -> Batch:
        """Return the batch with the proximal policy's log-probs as `old_logps`."""
        if self.proximal == "recomputed" or batch.sampler_logps is None:
            return batch
        logps = policy.logps.detach()
        return batch.with_(
            old_logps=proximal_logps(logps, batch, interpolate=self.proximal == "interpolated")
        )

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        batch = self.around(policy, batch)
        loss = -self.weights(policy, batch) * self.objective(policy, batch)
        if self.beta and self.kl_in == "loss":
            loss = loss + self.kl_weight(batch.state) * self.kl(policy, batch)
        if self.has_bonus:
            loss = loss - self.entropy_bonus(policy, batch)
        return loss.masked_fill(~batch.mask, 0)

    def conflicts(self, num_generations: int) -> list[str]:
        return super().conflicts(num_generations) + self._turn_conflicts()

    def _turn_conflicts(self) -> list[str]:
        if self.turn_returns == "none":
            unused = [n for n in ("turn_discount", "turn_weight") if getattr(self, n) != 1]
            return [f"{name} has no effect without turn_returns; remove it" for name in unused]
        problems = []
        if not self.turn_level:
            problems.append(
                f"{type(self).__name__} assigns credit in another way than by the rewards of a group, so "
                "turn_returns is not defined for it; remove it, or choose grpo"
            )
        if self.beta and self.kl_in == "reward":
            problems.append("turn_returns cannot contain a KL penalty; write kl_in: loss, or beta: 0")
        if self.turn_weight != 1 and self.turn_returns != "state":
            problems.append("turn_weight weighs turn_returns: state only; remove it")
        return problems

    def weights(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        """Return the correction weights of old policy to sampler, [T], detached."""
        old = batch.old_logps_or(policy.logps)
        return correction_weights(old, batch, self.correction, self.correction_cap, self.correction_floor)

    def kl_weight(self, state: Mapping[str, float]) -> float:
        """Return the weight of the KL: `beta`, unless an algorithm adapts it."""
        return self.beta

    def kl(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        """Return KL(policy || reference), [T]."""
        if self.kl_estimator == "full":
            return required(policy.kl, "policy.kl")
        return sampled_kl(policy.logps, required(batch.ref_logps, "ref_logps"), self.kl_estimator)

    def kl_penalty(self, batch: Batch) -> torch.Tensor:
        """Return the KL penalty of each token's reward, [T]: k1 at the sampling policy."""
        if not self.beta or self.kl_in == "loss":
            return torch.zeros(batch.num_tokens, device=batch.tokens.device)
        kl = behaviour_logps(batch) - required(batch.ref_logps, "ref_logps")
        return self.kl_weight(batch.state) * kl.masked_fill(~batch.mask, 0)

    def task_rewards(self, batch: Batch) -> torch.Tensor:
        """Return the rewards before any KL, [N].

        Groups whose task rewards are all equal count as degenerate: differences in their KL are sampling
        noise.
        """
        return required(batch.rewards, "rewards")

    def sequence_rewards(self, batch: Batch) -> torch.Tensor:
        """Return `task_rewards` minus, for `kl_in: reward`, the KL penalty of the sequence, [N]."""
        return self.task_rewards(batch) - batch.sum_by_sequence(self.kl_penalty(batch))

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return token metrics [T].

        policy/kl: k3 to the sampling policy (NaN on demonstrations). policy/kl_ref: k3 to the reference,
        exact for `kl_estimator: full`.
        """
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
        """Return group/degenerate, the number of groups with equal rewards, and group/degenerate_share."""
        metrics = super().report(batch)
        if batch.rewards is None or not batch.num_groups:
            return metrics
        count = count_degenerate(batch.rewards, batch.group)
        share = count / batch.num_groups
        return {**metrics, "group/degenerate": float(count), "group/degenerate_share": share}


@dataclass(frozen=True)
class ClippedPolicyGradient(PolicyGradient):
    """PPO's objective: min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A)."""

    epsilon: float = setting(0.2, "clip range of the ratio below 1", ge=0, le=1)
    epsilon_high: float | None = setting(None, "clip range above 1; null: the same as epsilon", ge=0)
    dual_clip: float | None = setting(None, "dual-clip bound of the ratio at negative advantages", gt=1)

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

    def ratio(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        """Return the probability ratio of current to old policy, [T]."""
        return safe_exp(log_ratio(policy, batch))

    def objective(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        advantages = required(batch.advantages, "advantages")
        return clipped_surrogate(
            self.ratio(policy, batch), advantages, self.epsilon, self.high, self.dual_clip
        )

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        metrics = super().metrics(policy, batch)
        with torch.no_grad():
            batch = self.around(policy, batch)
            ratio, advantages = self.ratio(policy, batch), required(batch.advantages, "advantages")
            metrics["policy/clip_fraction"] = clipped(ratio, advantages, self.epsilon, self.high)
        return metrics


@dataclass(frozen=True)
class Reinforce(PolicyGradient):
    """REINFORCE objective, A * log p: on-policy, without clipping (Williams 1992).

    The gradient of the loss is the policy gradient; its value is not meaningful.
    """

    on_policy: ClassVar[bool] = True

    def objective(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return required(batch.advantages, "advantages") * policy.logps


def behaviour_logps(batch: Batch) -> torch.Tensor:
    """Return log-probs of the sampling policy, [T]: the learner's if computed, else the sampler's."""
    return required(
        batch.sampler_logps if batch.old_logps is None else batch.old_logps, "old_logps or sampler_logps"
    )


def log_ratio(policy: PolicyOutput, batch: Batch) -> torch.Tensor:
    """Return the log-ratio of current to old policy, [T], with gradient; 0 where the mask is False."""
    return torch.where(batch.mask, policy.logps - batch.old_logps_or(policy.logps), 0)


def log_ratio_to_sampler(policy: PolicyOutput, batch: Batch) -> torch.Tensor:
    """Return the log-ratio of the current policy to the one that sampled, [T]; 0 on demonstrated tokens and
    where the mask is False."""
    if batch.sampler_logps is None:
        return log_ratio(policy, batch)
    sampled = batch.mask if batch.demonstrated is None else batch.mask & ~batch.demonstrated
    return torch.where(sampled, policy.logps - batch.sampler_logps, 0)


def refuse_correction(algorithm: PolicyGradient) -> list[str]:
    """Return the conflict of an algorithm whose weights contain the correction for the sampler."""
    if algorithm.correction == "none":
        return []
    name = type(algorithm).__name__
    return [f"{name} weighs by the ratio to the sampler already; write correction: none"]
