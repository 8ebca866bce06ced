"""Intuitive fine-tuning: the model reads a little of what it expected, not only what was demonstrated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rft.algorithms.base import PolicyOutput, setting
from rft.algorithms.math.sequences import token_index
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class IFT(SFT):
    """Hua et al., "Intuitive fine-tuning" (2024).

    Temporal residual: each response token is read as (1 - lam) * its embedding + lam * the mean
    embedding under the policy's own prediction there, so that errors reach what follows, as they
    do in generation. Relation propagation: token i's loss also counts at every later place j,
    discounted by gamma^(j - i); the weights of a response average 1. With `lam: 0` and `gamma: 0`
    it is `sft`. Costs one more forward.
    """

    lam: float = setting(0.2, "share of the policy's own expectation in what it reads", ge=0, lt=1)
    gamma: float = setting(0.95, "discount of a token's loss at later places", ge=0, lt=1)

    def embed(self, embeddings: Tensor, batch: Batch, expected: Callable[[], Tensor]) -> Tensor:
        if not self.lam:
            return embeddings
        mixed = torch.lerp(embeddings, expected().to(embeddings.dtype), self.lam)
        return torch.where(batch.mask[:, None], mixed, embeddings)

    def weights(self, batch: Batch) -> Tensor:
        """[T]: (1 - gamma^(L - i)) for token i of L, over its mean in the sequence; 0 off the mask."""
        left = batch.to_tokens(batch.lengths) - token_index(batch)
        weights = torch.where(batch.mask, 1 - self.gamma**left, 0)
        return weights / batch.to_tokens(batch.mean_by_sequence(weights)).clamp(min=1e-12)

    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        return super().loss(policy, batch) * self.weights(batch)
