"""Class-conditioned fine-tuning on data of mixed quality."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput, column
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class CRLFT(SFT):
    """loss = -w(source) log p(token | prompt, source); Wang et al., "OpenChat" (2023).

    Each source of demonstrations is a class with a weight (the paper's exp(reward / beta), e.g. 1 for expert
    and 0.1 for sub-optimal data) and a prompt prefix: `data.sources`. Conditioned on the source, the policy
    does not average over sources; prompted with the best class, it imitates that source. With one source of
    weight 1 it is `sft`. Reads `columns["weight"]` [N].
    """

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return super().loss(policy, batch) * batch.to_tokens(column(batch, "weight").to(policy.logps.dtype))
