"""Reward models: a head that reads a response and says what it is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rft.algorithms.base import Algorithm, DataKind, PolicyOutput, Unit, column, required, setting
from rft.algorithms.math.sequences import last_tokens, token_index
from rft.algorithms.preference.base import preference
from rft.batch import Batch


def response_scores(policy: PolicyOutput, batch: Batch) -> Tensor:
    """[N, K]: the head's outputs at each response's last token, as transformers' sequence classifiers."""
    return required(policy.scores, "scores")[last_tokens(batch)]


@dataclass(frozen=True)
class ScoreHead(Algorithm):
    """Base of reward models: they train offline, on the scores of a head with `score_heads` outputs."""

    online: ClassVar[bool] = False

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset({"scores"})

    @property
    def score_heads(self) -> int:
        return 1


@dataclass(frozen=True)
class RewardModel(ScoreHead):
    """loss = -log sigmoid(r(chosen) - r(rejected) - margin) + centre * (r(chosen) + r(rejected))^2; Ouyang et
    al. 2022, eq. 1; margin: Touvron et al. 2023, "Llama 2", eq. 2; centring: Eisenstein et al. 2023.

    Bradley-Terry knows rewards up to a constant; centring fixes it at 0. `margin` says how much
    better the chosen is, from `columns["margin"]` [N] (`data.numbers`).
    """

    unit: ClassVar[Unit] = "pair"
    data: ClassVar[DataKind] = "preference"

    centre: float = setting(0.0, "weight of the squared sum of the two rewards", ge=0)
    margin: bool = setting(False, "subtract the column margin")

    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        first, second = self.pairs(batch)
        reward = response_scores(policy, batch)[:, 0]
        difference = reward[first] - reward[second]
        if self.margin:
            difference = difference - column(batch, "margin")[first]
        return -F.logsigmoid(difference) + self.centre * (reward[first] + reward[second]).square()

    def held_out(self, policy: PolicyOutput, batch: Batch) -> dict[str, Tensor]:
        """preference_accuracy, preference_margin: by pair (a tie counts half); score: all rewards."""
        first, second = self.pairs(batch)
        reward = response_scores(policy, batch)[:, 0]
        return {**preference(reward[first] - reward[second]), "score": reward}

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, Tensor]:
        """preference/reward: mean reward over the responses' tokens."""
        return {"preference/reward": batch.to_tokens(response_scores(policy, batch)[:, 0].detach())}


@dataclass(frozen=True)
class RewardRegression(ScoreHead):
    """Squared error, or cross-entropy for targets in 0..1, to given scores: one number per response, or
    `heads` of them (multi-objective; Wang et al. 2024, "ArmoRM"; HelpSteer).

    Targets are `columns["targets"]` [N, heads]; nan is unknown, and counts nowhere. The loss of a
    response is the mean over its known targets.
    """

    unit: ClassVar[Unit] = "sequence"
    data: ClassVar[DataKind] = "scored"

    heads: int = setting(1, "how many numbers are predicted", ge=1)
    objective: Literal["mse", "bce"] = setting("mse", "mse: squared error; bce: targets are probabilities")

    @property
    def score_heads(self) -> int:
        return self.heads

    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        predicted, target = response_scores(policy, batch), column(batch, "targets")
        if target.shape != predicted.shape:
            raise ValueError(
                f"the data have {target.shape[-1]} targets, the model {predicted.shape[-1]} heads"
            )
        known = ~target.isnan()
        target = target.nan_to_num(0.0).to(predicted.dtype)
        if self.objective == "mse":
            loss = (predicted - target).square()
        else:
            loss = F.binary_cross_entropy_with_logits(predicted, target, reduction="none")
        return loss.masked_fill(~known, 0).sum(-1) / known.sum(-1).clamp(min=1)

    def held_out(self, policy: PolicyOutput, batch: Batch) -> dict[str, Tensor]:
        """score_error: distance of a known target from what is predicted (with `bce`, its probability)."""
        predicted, target = response_scores(policy, batch), column(batch, "targets")
        if self.objective == "bce":
            predicted = predicted.sigmoid()
        return {"score_error": (predicted - target).abs()[~target.isnan()]}


@dataclass(frozen=True)
class PairwiseReward(ScoreHead):
    """loss = -log p of the better candidate, one model reading the prompt and both; Jiang et al.,
    "LLM-Blender" (2023), PairRM; Zhao et al., "SLiC-HF" (2023), sec. 3.

    Against `reward_model`, which scores each response alone: it sees what the two have in common and where
    they differ, at the price of one call for each pair. Every pair is read in both orders, with the
    candidates as in `rft.data.groups.PAIR_TEMPLATE`; sigmoid(r) at its last token is the chance
    that candidate A is better, and `columns["targets"]` [N, 1] says whether it is.
    """

    unit: ClassVar[Unit] = "sequence"
    data: ClassVar[DataKind] = "pairwise"

    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        score, target = response_scores(policy, batch)[:, 0], _first(column(batch, "targets"))
        return F.binary_cross_entropy_with_logits(score, target.to(score.dtype), reduction="none")

    def held_out(self, policy: PolicyOutput, batch: Batch) -> dict[str, Tensor]:
        """preference_accuracy, preference_margin: of the candidate that is better (a tie counts half)."""
        score, target = response_scores(policy, batch)[:, 0], _first(column(batch, "targets"))
        return preference(torch.where(target > 0.5, score, -score))


def _first(targets: Tensor) -> Tensor:
    """[N] of [N] or [N, K]."""
    return targets.reshape(len(targets), -1)[:, 0]


@dataclass(frozen=True)
class ProcessReward(ScoreHead):
    """Cross-entropy of each step's label at the step's last token; Lightman et al., "Let's verify step by
    step" (2023); Uesato et al. 2022.

    The mask is True at the ends of steps only, and `columns["step_labels"]` [N, K] holds the label of
    the k-th; nan is unknown. Averaged over all steps of the batch.
    """

    data: ClassVar[DataKind] = "steps"

    def prepare(self, batch: Batch) -> Batch:
        """Fill in `labels`, and leave out steps without one."""
        labels = self.labels(batch)
        return batch.with_(mask=batch.mask & ~labels.isnan(), labels=labels)

    def labels(self, batch: Batch) -> Tensor:
        """[T]: at the end of each step, its label; elsewhere that of a first step."""
        sequence = batch.sequence.clamp(min=0)
        return column(batch, "step_labels")[sequence, token_index(batch)]

    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        scores = required(policy.scores, "scores")[:, 0]
        label = required(batch.labels, "labels").masked_fill(~batch.mask, 0).to(scores.dtype)
        loss = F.binary_cross_entropy_with_logits(scores, label, reduction="none")
        return loss.masked_fill(~batch.mask, 0)

    def held_out(self, policy: PolicyOutput, batch: Batch) -> dict[str, Tensor]:
        """step_accuracy: share of labelled steps that it puts on the right side of 1/2."""
        scores = required(policy.scores, "scores")[batch.mask, 0]
        label = required(batch.labels, "labels")[batch.mask]
        return {"step_accuracy": ((scores > 0) == (label > 0.5)).to(scores.dtype)}
