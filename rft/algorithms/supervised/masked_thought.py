"""Masked thought fine-tuning: parts of the demonstration hidden from the model that learns it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rft.algorithms.base import setting
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class MaskedThought(SFT):
    """`sft` that reads its response tokens replaced at random, with the loss on the originals; Chen et al.,
    "Masked thought" (2024).

    What stands earlier in a chain of thought cannot then be copied without looking at the question.
    The share rises linearly to `share` over the first `warmup` of the run, as in the paper. A hidden
    token is read as a zero vector, as another token of the batch, or as the mean embedding, none of
    which needs a mask token in the vocabulary.
    """

    share: float = setting(0.4, "share of response tokens that are hidden", ge=0, le=1)
    warmup: float = setting(0.67, "part of the run over which the share rises from 0", ge=0, le=1)
    replace: Literal["shuffle", "zero", "mean"] = setting(
        "shuffle", "shuffle: another token of the batch; zero; or mean"
    )

    def current_share(self, batch: Batch) -> float:
        """The share at this point of the run."""
        progress = batch.state.get("progress", 1.0)
        return self.share * min(1.0, progress / self.warmup) if self.warmup else self.share

    def embed(self, embeddings: Tensor, batch: Batch, expected: Callable[[], Tensor]) -> Tensor:
        chance = torch.rand(batch.num_tokens, device=embeddings.device)
        hidden = batch.mask & (chance < self.current_share(batch))
        if self.replace == "zero":
            other = torch.zeros_like(embeddings)
        elif self.replace == "mean":
            other = embeddings.mean(0).expand_as(embeddings)
        else:
            other = embeddings[torch.randint(len(embeddings), (len(embeddings),), device=embeddings.device)]
        return torch.where(hidden[:, None], other, embeddings)
