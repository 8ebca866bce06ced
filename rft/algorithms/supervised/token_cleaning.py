"""Supervised fine-tuning on the tokens worth it, chosen by the loss of two models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rft.algorithms.base import required, setting
from rft.algorithms.math.sequences import top_share
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class TokenCleaning(SFT):
    """`sft` on the share of the batch's tokens that a reference model finds likeliest against the
    policy; Pang et al., "Token cleaning" (2025); Lin et al., "Rho-1" (2024), eq. 3.

    score = log ref - log policy, before the step: high where there is something to learn that a
    better model knows; low for noise, which neither knows, and for what is known already. The
    reference is a model trained on a clean part of the data. `share: 1` is `sft`.
    """

    share: float = setting(0.6, "share of the response tokens that are trained on", gt=0, le=1)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_logps", "ref_logps"})

    @property
    def prescored(self) -> bool:
        return True

    def score(self, batch: Batch) -> Tensor:
        """[T]: how much a token is worth training on."""
        return required(batch.ref_logps, "ref_logps") - required(batch.old_logps, "old_logps")

    def prepare(self, batch: Batch) -> Batch:
        return batch.with_(mask=top_share(self.score(batch), batch.mask, self.share))


@dataclass(frozen=True)
class SSToken(TokenCleaning):
    """The same with the model's own history for a reference; "ssToken" (2025), the self-modulated part.

    score = log policy - log history: a token that has become likelier is one that the model is
    learning, and is kept. The history is the model at the start of the run, or, with
    `refresh_reference`, of some steps ago. (The paper adds an attention score, left out here: it
    needs attention maps, which no fast attention gives.)
    """

    refresh_reference: int = setting(0, "steps after which the history becomes the policy; 0: never", ge=0)

    def score(self, batch: Batch) -> Tensor:
        return -super().score(batch)
