"""Reward models: pairwise, regression, pairwise-input and process reward models with a score head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rft.algorithms.base import Algorithm, DataKind, PolicyOutput, Unit, column, required, setting
from rft.algorithms.math.preferences import log_sigmoid
from rft.algorithms.math.sequences import last_tokens, token_index
from rft.algorithms.preference.base import preference
from rft.batch import Batch


def response_scores(policy: PolicyOutput, batch: Batch) -> torch.Tensor:
    """Return the head's outputs at each response's last token, [N, K], like sequence classifiers."""
    return required(policy.scores, "scores")[last_tokens(batch)]


@dataclass(frozen=True)
class ScoreHead(Algorithm):
    """Base of reward models, trained offline on the scores of a head with `score_heads` outputs."""

    online: ClassVar[bool] = False

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset({"scores"})

    @property
    def score_heads(self) -> int:
        return 1


@dataclass(frozen=True)
class RewardModel(ScoreHead):
    """Bradley-Terry reward model on pairs, with margins.

    loss = -log sigmoid(r(chosen) - r(rejected) - margin) + centre * (r(chosen) + r(rejected))^2; Ouyang et
    al. 2022, eq. 1; margin: Touvron et al. 2023, "Llama 2", eq. 2; centring: Eisenstein et al. 2023.

    Bradley-Terry rewards are defined up to a constant; centring fixes it at 0. `margin` is the strength of
    the preference, from `columns["margin"]` [N] (`data.numbers`).
    """

    unit: ClassVar[Unit] = "pair"
    data: ClassVar[DataKind] = "preference"

    centre: float = setting(0.0, "weight of the centring term, the squared sum of the two rewards", ge=0)
    margin: bool = setting(False, "subtract the column `margin` from the reward difference")

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        first, second = self.pairs(batch)
        reward = response_scores(policy, batch)[:, 0]
        difference = reward[first] - reward[second]
        if self.margin:
            difference = difference - column(batch, "margin")[first]
        return -log_sigmoid(difference) + self.centre * (reward[first] + reward[second]).square()

    def held_out(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return preference_accuracy, preference_margin (by pair; ties count 1/2) and score (all rewards)."""
        first, second = self.pairs(batch)
        reward = response_scores(policy, batch)[:, 0]
        return {**preference(reward[first] - reward[second]), "score": reward}

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return preference/reward, the reward of each response at its tokens."""
        return {"preference/reward": batch.to_tokens(response_scores(policy, batch)[:, 0].detach())}


@dataclass(frozen=True)
class RewardRegression(ScoreHead):
    """Regression on given scores, by squared error or, for targets in [0, 1], cross-entropy.

    One score per response, or `heads` of them (multi-objective; Wang et al. 2024, "ArmoRM"; HelpSteer).

    Targets are `columns["targets"]` [N, heads]; nan is unknown and ignored. The loss of a response is the
    mean over its known targets.

    With `confidence` a weak model's probabilities are the targets of a stronger one: the loss is
    (1 - a) * CE(target) + a * CE(1 or 0), 1 for the half of the batch with the highest predictions before the
    step. `a` increases linearly to `confidence` over the first `warmup` of the run (Burns et al., "Weak-to-
    strong generalization", 2023, eq. 1, with the threshold of appendix A).
    """

    unit: ClassVar[Unit] = "sequence"
    data: ClassVar[DataKind] = "scored"

    heads: int = setting(1, "number of predicted scores", ge=1)
    objective: Literal["mse", "bce"] = setting(
        "mse", "mse: squared error; bce: cross-entropy, with probabilities as targets"
    )
    confidence: float = setting(
        0.0,
        "weight of the cross-entropy to the policy's own hardened predictions (weak to strong)",
        ge=0,
        le=1,
    )
    warmup: float = setting(
        0.2, "fraction of the run over which the weight of `confidence` increases from 0", ge=0, le=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.confidence and self.objective != "bce":
            raise ValueError("confidence mixes two cross-entropies: write objective: bce, or confidence: 0")

    @property
    def score_heads(self) -> int:
        return self.heads

    @property
    def compares_rows(self) -> bool:
        return self.confidence > 0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_scores"} if self.confidence else ())

    def prepare(self, batch: Batch) -> Batch:
        """Add `columns["hardened"]` [N, heads]: 1 for the half of the known targets with the highest
        predictions, else 0."""
        if not self.confidence:
            return batch
        known = ~column(batch, "targets").isnan()
        scores = column(batch, "old_scores").masked_fill(~known, -torch.inf)
        rank = torch.argsort(torch.argsort(scores, dim=0, descending=True, stable=True), dim=0)
        hardened = (rank < known.sum(0) // 2).to(scores)
        return batch.with_(columns={**batch.columns, "hardened": hardened})

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        predicted, target = response_scores(policy, batch), column(batch, "targets")
        if target.shape != predicted.shape:
            raise ValueError(
                f"each row has {target.shape[-1]} targets, but the model has {predicted.shape[-1]} heads; "
                f"write heads: {target.shape[-1]}"
            )
        known = ~target.isnan()
        target = target.nan_to_num(0.0).to(predicted.dtype)
        if self.objective == "mse":
            loss = (predicted - target).square()
        else:
            loss = _cross_entropy(predicted, self._mixed(target, batch))
        return loss.masked_fill(~known, 0).sum(-1) / known.sum(-1).clamp(min=1)

    def _mixed(self, target: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the targets mixed with the hardened predictions, [N, heads]: the loss is linear in them."""
        if not self.confidence:
            return target
        progress = batch.state.get("progress", 1.0)
        a = self.confidence * (min(1.0, progress / self.warmup) if self.warmup else 1.0)
        return (1 - a) * target + a * column(batch, "hardened").to(target)

    def held_out(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return score_error, the absolute error of known targets (with `bce`, of the probability)."""
        predicted, target = response_scores(policy, batch), column(batch, "targets")
        if self.objective == "bce":
            predicted = predicted.sigmoid()
        return {"score_error": (predicted - target).abs()[~target.isnan()]}


@dataclass(frozen=True)
class PairwiseReward(ScoreHead):
    """Reward model that reads both candidates and names the better one.

    loss = -log p of the better candidate; Jiang et al., "LLM-Blender" (2023), PairRM; Zhao et al., "SLiC-HF"
    (2023), sec. 3.

    Unlike `reward_model`, which scores each response separately, it can compare the two directly, at the cost
    of one call per pair. Every pair is read in both orders, formatted by `rft.data.groups.PAIR_TEMPLATE`;
    sigmoid(r) at the last token is the probability that candidate A is better, and `columns["targets"]`
    [N, 1] is 1 if it is, else 0.
    """

    unit: ClassVar[Unit] = "sequence"
    data: ClassVar[DataKind] = "pairwise"

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        score, target = response_scores(policy, batch)[:, 0], _first(column(batch, "targets"))
        return _cross_entropy(score, target.to(score.dtype))

    def held_out(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return preference_accuracy and preference_margin of the better candidate (ties count 1/2)."""
        score, target = response_scores(policy, batch)[:, 0], _first(column(batch, "targets"))
        return preference(torch.where(target > 0.5, score, -score))


def _cross_entropy(score: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy of each logit `score` and the probability `target`, of one shape."""
    return torch.nn.functional.binary_cross_entropy_with_logits(score, target, reduction="none")


def _first(targets: torch.Tensor) -> torch.Tensor:
    """Return the first column, [N], of [N] or [N, K]."""
    return targets.reshape(len(targets), -1)[:, 0]


@dataclass(frozen=True)
class ProcessReward(ScoreHead):
    """Process reward model: cross-entropy of each step's label at the step's last token.

    Lightman et al., "Let's verify step by step" (2023); Uesato et al. 2022.

    The mask is True only at the last token of each step, and `columns["step_labels"]` [N, K] contains the
    label of step k; nan is unknown. The loss is averaged over all steps of the batch.
    """

    data: ClassVar[DataKind] = "steps"

    @property
    def compares_rows(self) -> bool:
        return False

    def prepare(self, batch: Batch) -> Batch:
        """Remove steps without a label from the mask."""
        labels = self.labels(batch)
        return batch.with_(mask=batch.mask & ~labels.isnan(), labels=labels)

    def labels(self, batch: Batch) -> torch.Tensor:
        """Return the label of each step at its last token, [T]; values at other tokens are unused."""
        sequence = batch.sequence.clamp(min=0)
        return column(batch, "step_labels")[sequence, token_index(batch)]

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        scores = required(policy.scores, "scores")[:, 0]
        label = required(batch.labels, "labels").masked_fill(~batch.mask, 0).to(scores.dtype)
        loss = _cross_entropy(scores, label)
        return loss.masked_fill(~batch.mask, 0)

    def held_out(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return step_accuracy, the fraction of labelled steps classified correctly at threshold 1/2."""
        scores = required(policy.scores, "scores")[batch.mask, 0]
        label = required(batch.labels, "labels")[batch.mask]
        return {"step_accuracy": ((scores > 0) == (label > 0.5)).to(scores.dtype)}
