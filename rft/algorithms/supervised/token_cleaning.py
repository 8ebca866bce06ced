"""Supervised fine-tuning on tokens selected by the log-probs of two models."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

from rft.algorithms.base import column, required, setting
from rft.algorithms.math.sequences import masked_in, top_share
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class SelectedTokens(SFT):
    """Base of `sft` on the fraction of the batch's tokens with the highest score."""

    share: float = setting(0.6, "fraction of response tokens that are trained on", gt=0, le=1)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_logps", "ref_logps"})

    @property
    def prescored(self) -> bool:
        return True

    @abstractmethod
    def score(self, batch: Batch) -> torch.Tensor:
        """Return the selection score of each token before the step, [T]."""

    def prepare(self, batch: Batch) -> Batch:
        return batch.with_(mask=top_share(self.score(batch), batch.mask, self.share))


def progress_of_policy(batch: Batch) -> torch.Tensor:
    """Return log policy - log reference before the step, [T]."""
    return required(batch.old_logps, "old_logps") - required(batch.ref_logps, "ref_logps")


@dataclass(frozen=True)
class TokenCleaning(SelectedTokens):
    """`sft` on the fraction of tokens with the highest log-ratio of a better model to a worse one; Pang et
    al., "Token cleaning" (2025); Lin et al., "Rho-1" (2024), eq. 3.

    score = log ref - log policy, before the step: high for tokens that a better model predicts and the policy
    does not; low for noise, which neither predicts, and for tokens already learned. The reference is a model
    trained on a clean part of the data. `share: 1` is `sft`.

    `base: start` is the fixed-model cleaning of Pang et al.: the worse model is the one that the run starts
    from, score = log ref - log start (the negative of their influence), so that training does not change the
    scores.

    `better: policy` is self-evolving cleaning (Pang et al., algorithm 1): the better model is the policy, as
    trained on the earlier rows; the worse one is the initial model. score = log policy - log initial. A round
    is a step: all of its rows are scored before its first update, and `train.minibatches` updates follow. The
    first `warmup` of the run trains on all tokens.
    """

    better: Literal["reference", "policy"] = setting(
        "reference", "the better model: the reference (Rho-1), or the policy (self-evolving)"
    )
    base: Literal["policy", "start"] = setting(
        "policy",
        "the worse model of `better: reference`: the policy before each step, or the model that the run "
        "starts from",
    )
    warmup: float = setting(0.0, "initial fraction of the run that trains on all tokens", ge=0, lt=1)

    @property
    def reads_start(self) -> bool:
        return self.base == "start"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logps"}) if self.base == "start" else super().needs

    @property
    def prescored(self) -> bool:
        return self.base == "policy"

    def score(self, batch: Batch) -> torch.Tensor:
        if self.base == "start":
            start = masked_in(column(batch, "start_logps"), batch)
            return required(batch.ref_logps, "ref_logps") - start.to(torch.float32)
        return progress_of_policy(batch) if self.better == "policy" else -progress_of_policy(batch)

    def prepare(self, batch: Batch) -> Batch:
        return batch if batch.state.get("progress", 1.0) < self.warmup else super().prepare(batch)

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.base == "start" and self.better == "policy":
            problems.append("better: policy has the start as its worse model already; leave base out")
        return problems


@dataclass(frozen=True)
class SSToken(SelectedTokens):
    """Token cleaning with the policy's history as reference; "ssToken" (2025), the self-modulated part.

    score = log policy - log history: tokens that have become more likely are being learned, and are kept.
    The history is the model at the start of the run, or, with `refresh_reference`, of some steps ago. (The
    attention score of the paper is omitted: fast attention kernels do not return attention maps.)
    """

    refresh_reference: int = setting(
        0, "interval, in steps, of copying the policy to the history; 0: never", ge=0
    )

    def score(self, batch: Batch) -> torch.Tensor:
        return progress_of_policy(batch)
