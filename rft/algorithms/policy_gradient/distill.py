"""On-policy distillation: minimise the divergence to a teacher on the student's samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rft.algorithms.base import PolicyOutput, Rollout, required, setting
from rft.algorithms.extras import ReadsDistributions
from rft.algorithms.math.policy_gradient import jensen_shannon, safe_exp, sampled_kl
from rft.algorithms.policy_gradient.base import log_ratio
from rft.batch import Batch


@dataclass(frozen=True)
class Distill(ReadsDistributions):
    """Agarwal et al., "On-policy distillation of language models" (GKD, 2023), eq. 1 and algorithm 1.

    full: the generalised Jensen-Shannon divergence of student and teacher over the vocabulary at each
    token; `beta` 0 is the forward KL(teacher || student), 1 the reverse KL. sampled: the reverse KL on
    sampled tokens only, by REINFORCE (weighted by the ratio to the sampling policy) with reward
    log teacher - log student, which does not need the teacher's distribution in memory. The teacher is the
    reference model. Completions are sampled from the student, except a fraction `demonstration_share` that
    are demonstrations (GKD's 1 - lambda).

    If student and teacher are equal, loss and gradient are 0.
    """

    estimator: Literal["full", "sampled"] = setting(
        "full", "divergence over the vocabulary, or on sampled tokens"
    )
    beta: float = setting(0.5, "full: interpolation between forward (0) and reverse (1) KL", ge=0, le=1)
    demonstration_share: float = setting(
        0.0, "fraction of completions replaced by demonstrations", ge=0, le=1
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logps", "old_logps"} if self.estimator == "sampled" else ())

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset({"kl"} if self.estimator == "full" else set())

    @property
    def uses_demonstrations(self) -> bool:
        return self.demonstration_share > 0

    def divergence(self, logps: Tensor, reference: Tensor) -> Tensor:
        return jensen_shannon(logps, reference, self.beta)

    @property
    def known_divergence(self) -> tuple[Literal["reverse", "forward", "js"], float] | None:
        if 0 < self.beta < 1:
            return "js", self.beta
        return ("reverse" if self.beta else "forward"), 0.5

    def rollouts(self, num_generations: int, *, progress: float, demonstration: bool) -> Sequence[Rollout]:
        given = round(self.demonstration_share * num_generations) if demonstration else 0
        return (*[Rollout(prefix_share=1.0)] * given, *[Rollout()] * (num_generations - given))

    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        if self.estimator == "full":
            return required(policy.kl, "policy.kl").masked_fill(~batch.mask, 0)
        reward = required(batch.ref_logps, "ref_logps") - policy.logps.detach()
        ratio = safe_exp(log_ratio(policy, batch)).detach()
        return -(ratio * reward * policy.logps).masked_fill(~batch.mask, 0)

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, Tensor]:
        """Return policy/divergence, the minimised divergence (full), and policy/kl_ref.

        policy/kl_ref is k3 to the teacher (sampled), or the divergence if that is the reverse KL.
        """
        if self.estimator == "sampled":
            teacher = required(batch.ref_logps, "ref_logps")
            return {"policy/kl_ref": sampled_kl(policy.logps.detach(), teacher)}
        divergence = required(policy.kl, "policy.kl").detach()
        reverse = {"policy/kl_ref": divergence} if self.beta == 1 else {}
        return {"policy/divergence": divergence, **reverse}
