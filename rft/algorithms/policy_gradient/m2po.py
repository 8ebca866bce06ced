"""M2PO: mask the tokens with the largest log-ratios until their second moment is small."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput, required, setting
from rft.algorithms.math.policy_gradient import Proximal, safe_exp
from rft.algorithms.policy_gradient.base import log_ratio
from rft.algorithms.policy_gradient.grpo import GroupRelative
from rft.batch import Batch


@dataclass(frozen=True)
class M2PO(GroupRelative):
    """Zheng et al., "Prosperity before collapse: how far can off-policy RL reach with stale data on LLMs?"
    (2025), for data many versions old.

    The objective is ratio * A with the ratio to the policy that sampled, without a clip. Over the tokens of
    the whole step, M2 is the mean of (log old - log sampler)^2, with the policy before the step; the tokens
    with the largest squares lose their advantage until M2 of the rest is at most `second_moment`. They still
    count in averages. Unlike a clip, which acts on many tokens of stale data, it acts on few. The selection
    is AReaL's, which does not depend on the sign of A.
    """

    second_moment: float = setting(0.04, "bound on the mean squared log-ratio to the sampler", gt=0)
    proximal: Proximal = setting(
        "sampler", "policy that the ratio is to: recomputed, interpolated or sampler"
    )

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"old_logps"}

    @property
    def prescored(self) -> bool:
        return True

    def prepare(self, batch: Batch) -> Batch:
        batch = super().prepare(batch)
        if batch.sampler_logps is None:
            return batch
        sampled = batch.mask if batch.demonstrated is None else batch.mask & ~batch.demonstrated
        index = sampled.nonzero()[:, 0]
        squares = (required(batch.old_logps, "old_logps") - batch.sampler_logps)[index].double().square()
        ascending, order = squares.sort(stable=True)
        moments = ascending.cumsum(0) / torch.arange(1, len(index) + 1, device=index.device)
        kept = int((moments <= self.second_moment).sum())  # moments of ascending squares ascend too
        advantages = required(batch.advantages, "advantages")
        return batch.with_(advantages=advantages.index_fill(0, index[order[kept:]], 0.0))

    def objective(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return safe_exp(log_ratio(policy, batch)) * required(batch.advantages, "advantages")
