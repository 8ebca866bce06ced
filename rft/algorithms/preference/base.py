"""What the online preference algorithms share: groups of two or more, and a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rft.algorithms.base import Algorithm, PolicyOutput
from rft.algorithms.math.policy_gradient import count_degenerate, sampled_kl
from rft.algorithms.math.preferences import sequence_log_ratio
from rft.algorithms.policy_gradient.base import required
from rft.batch import Batch


@dataclass(frozen=True)
class OnlinePreference(Algorithm):
    """Losses on the log-ratio of policy and reference over whole completions."""

    min_generations: ClassVar[int] = 2

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rewards", "ref_logps"})

    def log_ratio(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        """[N]: log of policy over reference."""
        return sequence_log_ratio(policy.logps, required(batch.ref_logps, "ref_logps"), batch)

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, Tensor]:
        logps = policy.logps.detach()
        found = {"policy/kl_ref": sampled_kl(logps, required(batch.ref_logps, "ref_logps"))}
        if batch.sampler_logps is not None:
            found["policy/kl"] = sampled_kl(logps, batch.sampler_logps)
        if policy.entropy is not None:
            found["policy/entropy"] = policy.entropy.detach()
        return found

    def report(self, batch: Batch) -> dict[str, float]:
        """group/degenerate: how many groups have all rewards equal; group/degenerate_share: of all."""
        count = count_degenerate(required(batch.rewards, "rewards"), batch.group)
        if not batch.num_groups:
            return {}
        return {"group/degenerate": float(count), "group/degenerate_share": count / batch.num_groups}
