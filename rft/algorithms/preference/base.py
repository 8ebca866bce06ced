"""Base classes of preference algorithms: online with a reference on groups, offline on pairs of responses."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.base import Algorithm, DataKind, PolicyOutput, Unit, column, required
from rft.algorithms.math.policy_gradient import count_degenerate, sampled_kl
from rft.algorithms.math.preferences import sequence_log_ratio
from rft.batch import Batch


@dataclass(frozen=True)
class OnlinePreference(Algorithm):
    """Base of online losses on the log-ratio of policy to reference of whole completions."""

    min_generations: ClassVar[int] = 2

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rewards", "ref_logps"})

    def log_ratio(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        """Return the log-ratio of policy to reference, [N]."""
        return sequence_log_ratio(policy.logps, required(batch.ref_logps, "ref_logps"), batch)

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        logps = policy.logps.detach()
        metrics = {"policy/kl_ref": sampled_kl(logps, required(batch.ref_logps, "ref_logps"))}
        if batch.sampler_logps is not None:
            metrics["policy/kl"] = sampled_kl(logps, batch.sampler_logps)
        if policy.entropy is not None:
            metrics["policy/entropy"] = policy.entropy.detach()
        return metrics

    def report(self, batch: Batch) -> dict[str, float]:
        """Return group/degenerate, the number of groups with equal rewards, and group/degenerate_share."""
        count = count_degenerate(required(batch.rewards, "rewards"), batch.group)
        if not batch.num_groups:
            return {}
        return {"group/degenerate": float(count), "group/degenerate_share": count / batch.num_groups}


def without_unknown(batch: Batch, name: str) -> Batch:
    """Remove sequences whose column `name` is nan from the mask."""
    unknown = column(batch, name).isnan()
    if not unknown.any():
        return batch
    known = {**batch.columns, name: batch.columns[name].nan_to_num()}
    return batch.with_(mask=batch.mask & ~batch.to_tokens(unknown), columns=known)


def preference(margin: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return held-out accuracy and margin of pairs, from their reward margins [P]."""
    right = ((margin > 0).to(margin) + (margin >= 0).to(margin)) / 2
    return {"preference_accuracy": right, "preference_margin": margin}


@dataclass(frozen=True)
class OfflinePreference(Algorithm):
    """Base of losses [P] on pairs of responses: chosen and rejected, or neighbours in a ranking."""

    online: ClassVar[bool] = False
    unit: ClassVar[Unit] = "pair"
    data: ClassVar[DataKind] = "preference"

    @abstractmethod
    def implicit_rewards(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        """Return the implicit reward of each sequence, [N], up to a constant per prompt."""

    def held_out(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return preference_accuracy and preference_margin of implicit rewards, and nll.

        The first two are by pair (ties count 1/2), nll is by token of the preferred responses.
        """
        first, second = self.pairs(batch)
        reward = self.implicit_rewards(policy, batch)
        preferred = torch.zeros(batch.num_sequences, device=reward.device).index_fill(0, first, 1.0)
        return {
            **preference(reward[first] - reward[second]),
            "nll": -policy.logps[batch.to_tokens(preferred) > 0],
        }

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return token metrics of pairs.

        preference/accuracy: pairs whose chosen response has the higher implicit reward (ties count 1/2).
        preference/margin: difference of implicit rewards. preference/chosen, preference/rejected: log-prob
        per token. The value of a pair is repeated at its tokens, so long pairs have more weight (unlike in
        the loss).
        """
        first, second = self.pairs(batch)
        if not len(first):
            return {}
        reward = self.implicit_rewards(policy, batch).detach()
        margin = reward[first] - reward[second]
        mean = batch.mean_by_sequence(policy.logps.detach())

        def spread(of_pair: torch.Tensor) -> torch.Tensor:
            both = torch.zeros_like(mean).index_add(0, first, of_pair).index_add(0, second, of_pair)
            count = torch.bincount(torch.cat([first, second]), minlength=len(mean)).clamp(min=1)
            return batch.to_tokens(both / count)

        return {
            "preference/accuracy": spread(preference(margin)["preference_accuracy"]),
            "preference/margin": spread(margin),
            "preference/chosen": spread(mean[first]),
            "preference/rejected": spread(mean[second]),
        }
