"""Learning from a weaker model's answers without learning its mistakes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rft.algorithms.base import PolicyOutput, required, setting
from rft.algorithms.extras import ReadsDistributions
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class WeakToStrong(ReadsDistributions, SFT):
    """loss = (1 - a) * -log p(token) + a * -log max p; Burns et al., "Weak-to-strong generalization"
    (2023), eq. 1, taken per token.

    The demonstrations come from a weak supervisor. The second term is the cross-entropy to the
    policy's own hardened prediction: where it is sure, it may disagree. `a` rises linearly from 0 to
    `alpha` over the first `warmup` of the run. `alpha: 0` is `sft`.
    """

    alpha: float = setting(0.75, "weight of the policy's own confident prediction", ge=0, le=1)
    warmup: float = setting(0.2, "part of the run over which the weight rises from 0", ge=0, le=1)

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset({"kl"} if self.alpha else ())

    @property
    def compares_distributions(self) -> bool:
        return False

    def divergence(self, logps: Tensor, reference: Tensor) -> Tensor:
        """-log max p, the cross-entropy to the policy's own most likely token; reads no reference."""
        return -logps.max(-1).values

    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        nll = super().loss(policy, batch)
        if not self.alpha:
            return nll
        progress = batch.state.get("progress", 1.0)
        a = self.alpha * min(1.0, progress / self.warmup) if self.warmup else self.alpha
        own = required(policy.kl, "kl").masked_fill(~batch.mask, 0)
        return (1 - a) * nll + a * own
