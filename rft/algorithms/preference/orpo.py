"""Odds-ratio preference optimisation: supervised fine-tuning plus an odds-ratio term, without reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput, setting
from rft.algorithms.math.preferences import log1mexp, log_sigmoid
from rft.algorithms.preference.base import OfflinePreference
from rft.batch import Batch


@dataclass(frozen=True)
class ORPO(OfflinePreference):
    """loss = -mean log p(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected)), with
    odds = p / (1 - p), p = exp(mean log p per token); Hong et al., "ORPO" (2024), eqs. 6 and 7.

    It needs neither a reference nor prior fine-tuning. The likelihood term is averaged over pairs. p is
    clamped to at most 1 - 1e-6, since the odds of p = 1 are infinite.
    """

    beta: float = setting(0.1, "weight of the odds-ratio term", ge=0)

    def implicit_rewards(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        mean = batch.mean_by_sequence(policy.logps).clamp(max=-1e-6)
        return mean - log1mexp(mean)

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        first, second = self.pairs(batch)
        log_odds = self.implicit_rewards(policy, batch)
        nll = -batch.mean_by_sequence(policy.logps)[first]
        return nll - self.beta * log_sigmoid(log_odds[first] - log_odds[second])
