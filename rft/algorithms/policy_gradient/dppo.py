"""DPPO: a trust region in the divergence of the policies instead of the ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rft.algorithms.base import PolicyOutput, required, setting
from rft.algorithms.math.policy_gradient import Proximal, safe_exp
from rft.algorithms.policy_gradient.base import log_ratio
from rft.algorithms.policy_gradient.grpo import GroupRelative
from rft.batch import Batch


@dataclass(frozen=True)
class DPPO(GroupRelative):
    """Qi et al., "Rethinking the trust region in LLM reinforcement learning" (2026), the binary variants.

    The objective is ratio * A; a token has no gradient if the update would lead further away (A > 0 and
    ratio > 1, or A < 0 and ratio < 1) and the divergence of the two policies exceeds `delta`. Its estimate
    takes the sampled token against all others, with probabilities p (now) and q (when sampled):

        tv   |p - q|
        kl   q log(q / p) + (1 - q) log((1 - q) / (1 - p))

    A clip of the ratio stops rare tokens too early, whose ratio is large at a small divergence, and frequent
    ones too late. `proximal: sampler` makes the trust region one around the policy that sampled, as in the
    paper; the ratio in the gradient is at most `ratio_cap`, as in the authors' code. The top-k variant is not
    implemented.
    """

    divergence_kind: Literal["tv", "kl"] = setting("tv", "estimate of the divergence")
    delta: float = setting(0.2, "largest divergence at which a token may move further away", gt=0)
    ratio_cap: float = setting(20.0, "upper bound of the ratio in the gradient", gt=1)
    proximal: Proximal = setting(
        "sampler", "centre of the trust region: recomputed, interpolated or sampler log-probs"
    )

    def _kept(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        """Return the tokens whose update stays in the trust region, [T] bool."""
        logps = policy.logps.detach()
        p, q = logps.exp(), (logps - log_ratio(policy, batch).detach()).exp()
        if self.divergence_kind == "tv":
            divergence = (p - q).abs()
        else:
            rest = ((1 - q).clamp(min=1e-8) / (1 - p).clamp(min=1e-8)).log()
            divergence = q * (q.clamp(min=1e-30).log() - logps) + (1 - q) * rest
        away = (p - q) * required(batch.advantages, "advantages") > 0
        return ~away | (divergence <= self.delta)

    def objective(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        ratio = safe_exp(log_ratio(policy, batch))
        gradient = ratio * (self.ratio_cap / ratio.detach()).clamp(max=1)
        return gradient * self._kept(policy, batch) * required(batch.advantages, "advantages")

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        metrics = super().metrics(policy, batch)
        with torch.no_grad():
            metrics["policy/clip_fraction"] = (~self._kept(policy, self.around(policy, batch))).float()
        return metrics
