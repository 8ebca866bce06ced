"""Masked thought fine-tuning: randomly masked response tokens in the input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from rft.algorithms.base import setting
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class MaskedThought(SFT):
    """`sft` with randomly masked response tokens in the input, and the loss on the original tokens; Chen et
    al., "Masked thought" (2024).

    This prevents copying from earlier steps of a chain of thought without attending to the question. The
    masked fraction increases linearly to `share` over the first `warmup` of the run, as in the paper. A
    masked token is replaced by a zero vector, another token of the batch, or the mean embedding, so the
    vocabulary does not need a mask token.
    """

    share: float = setting(0.4, "fraction of response tokens that are masked", ge=0, le=1)
    warmup: float = setting(
        0.67, "fraction of the run over which the masked fraction increases from 0", ge=0, le=1
    )
    replace: Literal["shuffle", "zero", "mean"] = setting(
        "shuffle", "replacement: shuffle (another token of the batch), zero, or mean (embedding)"
    )

    def current_share(self, batch: Batch) -> float:
        """Return the masked fraction at this point of the run."""
        progress = batch.state.get("progress", 1.0)
        return self.share * min(1.0, progress / self.warmup) if self.warmup else self.share

    def embed(
        self, embeddings: torch.Tensor, batch: Batch, expected: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        chance = torch.rand(batch.num_tokens, device=embeddings.device)
        hidden = batch.mask & (chance < self.current_share(batch))
        if self.replace == "zero":
            other = torch.zeros_like(embeddings)
        elif self.replace == "mean":
            other = embeddings.mean(0).expand_as(embeddings)
        else:
            other = embeddings[torch.randint(len(embeddings), (len(embeddings),), device=embeddings.device)]
        return torch.where(hidden[:, None], other, embeddings)
