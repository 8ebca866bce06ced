"""Supervised fine-tuning that learns good tokens and actively forgets bad ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import PolicyOutput, required, setting
from rft.algorithms.math.sequences import top_share
from rft.algorithms.supervised.token_cleaning import TokenCleaning
from rft.batch import Batch


@dataclass(frozen=True)
class Forgetting(TokenCleaning):
    """loss = mean over positive tokens of -log p - lam * mean over negative tokens of min(-log p, bound);
    Ghahrizjani et al., "Forgetting: a new mechanism towards better fine-tuning" (2025).

    Positive tokens are the fraction `share` that `token_cleaning` keeps; the others, which it only ignores,
    are unlearned here. lam increases linearly over the run. Negative tokens whose loss exceeds `bound` nats
    are ignored, so that gradient ascent does not diverge. `lam: 0` is `token_cleaning`.
    """

    share: float = setting(0.75, "fraction of response tokens that are learned", gt=0, le=1)
    lam: float = setting(0.05, "weight of unlearning at the end of the run", ge=0)
    bound: float = setting(5.0, "loss, in nats, above which a negative token is ignored", gt=0)

    def prepare(self, batch: Batch) -> Batch:
        """Compute `advantages` [T]: 1 for positive tokens, -lam for negative ones.

        Each is divided by its fraction of the tokens, so that the mean over all tokens is the difference of
        the two means.
        """
        positive = top_share(self.score(batch), batch.mask, self.share)
        negative = batch.mask & ~positive
        tokens = batch.mask.sum()
        lam = self.lam * batch.state.get("progress", 1.0)
        weight = torch.zeros(batch.num_tokens, device=batch.tokens.device)
        weight = weight.masked_fill(positive, float(tokens / positive.sum().clamp(min=1)))
        weight = weight.masked_fill(negative, -lam * float(tokens / negative.sum().clamp(min=1)))
        return batch.with_(advantages=weight)

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        weight = required(batch.advantages, "advantages")
        nll = -policy.logps.masked_fill(~batch.mask, 0)
        return weight * torch.where(weight < 0, nll.clamp(max=self.bound), nll)
