"""Supervised fine-tuning with noise on the input embeddings (NEFTune)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rft.algorithms.base import setting
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class NEFT(SFT):
    """`sft` with uniform noise on the embeddings; Jain et al., "NEFTune" (2023), algorithm 1.

    The noise of each element is uniform in +- alpha / sqrt(L * H), for L tokens of prompt and response (a
    shared prompt is counted with its first response) and hidden size H. `alpha: 0` is `sft`.
    """

    alpha: float = setting(5.0, "scale of the noise", ge=0)

    def embed(
        self, embeddings: torch.Tensor, batch: Batch, expected: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        # The maximum position in a tree gives the length of its longest sequence, without padding.
        tree = batch.tree[batch.segment]
        longest = torch.zeros_like(batch.parent).scatter_reduce(0, tree, batch.positions + 1, "amax")
        scale = self.alpha / (longest[tree] * embeddings.shape[-1]).to(embeddings.dtype).sqrt()
        return embeddings + torch.empty_like(embeddings).uniform_(-1, 1) * scale[:, None]
