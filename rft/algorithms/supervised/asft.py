"""Anchored supervised fine-tuning: DFT with a divergence to the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rft.algorithms.base import PolicyOutput, required, setting
from rft.algorithms.extras import ReadsDistributions
from rft.algorithms.math.policy_gradient import full_kl
from rft.algorithms.supervised.dft import DFT
from rft.batch import Batch


@dataclass(frozen=True)
class ASFT(ReadsDistributions, DFT):
    """loss = -sg(p) log p + lam * KL per token; Zhu et al., "Anchored supervised fine-tuning" (2025).

    It adds to `dft` a full-vocabulary divergence to the reference at each response token, which limits drift.
    The paper uses KL(policy || reference) (`reverse`); its published code computes KL(reference || policy)
    (`forward`). `lam: 0` is `dft`. With `weight: none` the first term is that of `sft`, -log p (the paper's
    SFT with KL). With `refresh_reference` the anchor is the policy of some steps ago.
    """

    lam: float = setting(0.1, "weight of the divergence to the reference", ge=0)
    direction: Literal["reverse", "forward"] = setting(
        "reverse", "reverse: KL(policy || reference); forward: KL(reference || policy)"
    )

    weight: Literal["probability", "none"] = setting(
        "probability", "weight of a token's log-prob: its probability, a constant in the gradient, or 1"
    )
    refresh_reference: int = setting(
        0, "interval, in steps, of copying the policy to the reference; 0: never", ge=0
    )

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset({"kl"} if self.lam else ())

    def divergence(self, logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return full_kl(logps, reference) if self.direction == "reverse" else full_kl(reference, logps)

    @property
    def known_divergence(self) -> tuple[Literal["reverse", "forward", "js"], float] | None:
        return self.direction, 0.5

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        loss = super().loss(policy, batch)
        if self.weight == "none":
            loss = -policy.logps.masked_fill(~batch.mask, 0)
        if not self.lam:
            return loss
        return loss + self.lam * required(policy.kl, "kl").masked_fill(~batch.mask, 0)

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return policy/kl_ref, the divergence to the reference, in nats per token."""
        return {} if policy.kl is None else {"policy/kl_ref": policy.kl.detach()}
