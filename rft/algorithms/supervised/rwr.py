"""Reward-weighted regression: likelihood weighted by the exponential of the reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput, column, required, setting
from rft.algorithms.math.policy_gradient import safe_exp
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class RWR(SFT):
    """loss = -exp((r - 1) / tau) log p per token, with the reward r of the response.

    Peters and Schaal, "Reinforcement learning by reward-weighted regression" (2007); on the attempts of a
    session it is the objective of RISE (Qu et al., "Recursive introspection", 2024, arXiv:2407.18219), whose
    weight exp(r / tau) differs by a constant factor only: here a reward of 1 has the weight 1.

    Unlike `sft` on successes, it learns from all responses, from the worse ones less. `tau` to infinity is
    `sft` on all of them, `tau` to 0 on the best. With `data.sessions`, r is the session's reward, and
    `first_turn` leaves out earlier turns: 1 trains on the second attempt and later ones, given the first.
    Other rows have r in a column `reward` (`data.numbers: [reward]`), as `rft sample` writes it. Reads
    `columns["reward"]` [N].
    """

    tau: float = setting(0.5, "temperature of the weights, in units of the reward", gt=0)
    first_turn: int = setting(0, "turns of a session before this one, counted from 0, are only read", ge=0)

    @property
    def compares_rows(self) -> bool:
        return False

    def prepare(self, batch: Batch) -> Batch:
        if not self.first_turn:
            return batch
        return batch.with_(mask=batch.mask & (required(batch.turn, "turn") >= self.first_turn))

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        weights = safe_exp((column(batch, "reward") - 1) / self.tau)
        return super().loss(policy, batch) * batch.to_tokens(weights.to(policy.logps.dtype))
