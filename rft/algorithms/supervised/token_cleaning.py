"""Supervised fine-tuning on tokens selected by the log-probs of two models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rft.algorithms.base import required, setting
from rft.algorithms.math.sequences import top_share
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class TokenCleaning(SFT):
    """`sft` on the fraction of tokens with the highest log-ratio of reference to policy; Pang et al.,
    "Token cleaning" (2025); Lin et al., "Rho-1" (2024), eq. 3.

    score = log ref - log policy, before the step: high for tokens that a better model predicts and the policy
    does not; low for noise, which neither predicts, and for tokens already learned. The reference is a model
    trained on a clean part of the data. `share: 1` is `sft`.
    """

    share: float = setting(0.6, "fraction of response tokens that are trained on", gt=0, le=1)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_logps", "ref_logps"})

    @property
    def prescored(self) -> bool:
        return True

    def score(self, batch: Batch) -> Tensor:
        """Return the selection score of each token, [T]."""
        return required(batch.ref_logps, "ref_logps") - required(batch.old_logps, "old_logps")

    def prepare(self, batch: Batch) -> Batch:
        return batch.with_(mask=top_share(self.score(batch), batch.mask, self.share))


@dataclass(frozen=True)
class SSToken(TokenCleaning):
    """Token cleaning with the policy's history as reference; "ssToken" (2025), the self-modulated part.

    score = log policy - log history: tokens that have become more likely are being learned, and are kept.
    The history is the model at the start of the run, or, with `refresh_reference`, of some steps ago. (The
    attention score of the paper is omitted: fast attention kernels do not return attention maps.)
    """

    refresh_reference: int = setting(
        0, "interval, in steps, of copying the policy to the history; 0: never", ge=0
    )

    def score(self, batch: Batch) -> Tensor:
        return -super().score(batch)
