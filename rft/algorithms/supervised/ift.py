"""Intuitive fine-tuning: mix the model's predictions into its input embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput, setting
from rft.algorithms.math.sequences import token_index
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class IFT(SFT):
    """Hua et al., "Intuitive fine-tuning" (2024).

    Temporal residual: the input embedding of each response token is (1 - lam) * its embedding + lam * the
    mean embedding under the policy's prediction of it, so that errors propagate to later tokens, as in
    generation. Relation propagation: token i's loss also counts at every later position j, discounted by
    gamma^(j - i); the weights of a response average 1. With `lam: 0` and `gamma: 0` it is `sft`. Requires
    one additional forward.
    """

    lam: float = setting(0.2, "weight of the policy's predicted embedding in the input", ge=0, lt=1)
    gamma: float = setting(0.95, "discount of a token's loss at later positions", ge=0, lt=1)

    def embed(
        self, embeddings: torch.Tensor, batch: Batch, expected: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        if not self.lam:
            return embeddings
        mixed = torch.lerp(embeddings, expected().to(embeddings.dtype), self.lam)
        return torch.where(batch.mask[:, None], mixed, embeddings)

    def weights(self, batch: Batch) -> torch.Tensor:
        """Return 1 - gamma^(L - i) for token i of L, over its sequence mean, [T]; 0 outside the mask."""
        left = batch.to_tokens(batch.lengths) - token_index(batch)
        weights = torch.where(batch.mask, 1 - self.gamma**left, 0)
        return weights / batch.to_tokens(batch.mean_by_sequence(weights)).clamp(min=1e-12)

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return super().loss(policy, batch) * self.weights(batch)
