"""Kahneman-Tversky optimisation: preference optimisation from binary labels, without pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from rft.algorithms.base import Algorithm, DataKind, PolicyOutput, Unit, column, required, setting
from rft.batch import Batch, Group


@dataclass(frozen=True)
class KTO(Algorithm):
    """loss = w * (1 - sigmoid(+-beta * (s - z))), + and `desirable` for good, - and `undesirable` for bad
    responses, s = log policy - log reference; Ethayarajh et al., "KTO" (2024), eqs. 7 and 8.

    z is the policy's divergence from the reference, estimated without gradient as max(0, mean s) over
    mismatched responses: each prompt with the next prompt's response. These sequences are not trained on.
    `baseline: zero` omits them and sets z = 0 (APO-zero, unpaired). Weights should balance the labels:
    desirable * (number of good) within 1 to 4/3 of undesirable * (number of bad).
    """

    online: ClassVar[bool] = False
    unit: ClassVar[Unit] = "sequence"
    data: ClassVar[DataKind] = "unpaired"

    beta: float = setting(0.1, "strength of the regularisation towards the reference", gt=0)
    desirable: float = setting(1.0, "weight of good responses", ge=0)
    undesirable: float = setting(1.0, "weight of bad responses", ge=0)
    baseline: Literal["mismatched", "zero"] = setting(
        "mismatched", "estimate z from mismatched responses, or set it to zero"
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logps"} | ({"old_logps"} if self.prescored else set()))

    @property
    def prescored(self) -> bool:
        return self.baseline == "mismatched"

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """Add the next prompt's response to each group, marked by `values["mismatched"]`.

        Raises ValueError for fewer than two groups.
        """
        if self.baseline == "zero":
            return list(groups)
        if len(groups) < 2:
            raise ValueError(
                "KTO needs at least two examples per step: raise train.batch_size, or write baseline: zero"
            )
        out = []
        for i, group in enumerate(groups):
            matched = [replace(c, values={**c.values, "mismatched": 0.0}) for c in group.completions]
            other = groups[(i + 1) % len(groups)].completions[0]
            mismatched = replace(other, values={**other.values, "mismatched": 1.0})
            out.append(Group(group.prompt, (*matched, mismatched)))
        return out

    def prepare(self, batch: Batch) -> Batch:
        """Add `columns["kto_z"]` [N], z, and `columns["kto_weight"]` [N], the weight of each sequence.

        Weights are scaled such that a mean over all sequences is a mean over those with a loss.
        """
        good = required(batch.rewards, "rewards") > 0.5
        weight = torch.where(good, self.desirable, self.undesirable)
        z = torch.zeros(())
        if self.baseline == "mismatched":
            mismatched = column(batch, "mismatched") > 0.5
            old = required(batch.old_logps, "old_logps") - required(batch.ref_logps, "ref_logps")
            z = batch.sum_by_sequence(old)[mismatched].mean().clamp(min=0)
            weight = weight.masked_fill(mismatched, 0) * (len(mismatched) / (~mismatched).sum())
        columns = {"kto_z": z.expand(batch.num_sequences), "kto_weight": weight}
        return batch.with_(columns={**batch.columns, **columns})

    def acts_on(self, batch: Batch) -> torch.Tensor:
        return batch.to_tokens(column(batch, "kto_weight") != 0)

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        score = batch.sum_by_sequence(policy.logps - required(batch.ref_logps, "ref_logps"))
        sign = torch.where(required(batch.rewards, "rewards") > 0.5, 1.0, -1.0)
        value = torch.sigmoid(sign * self.beta * (score - column(batch, "kto_z")))
        return column(batch, "kto_weight") * (1 - value)

    def held_out(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return held-out metrics.

        reward_good, reward_bad: implicit reward beta * s of good and bad responses. label_accuracy: responses
        whose implicit reward is on the right side of beta * z. nll: of good responses.
        """
        ratio = policy.logps - required(batch.ref_logps, "ref_logps")
        reward = self.beta * batch.sum_by_sequence(ratio)
        matched = torch.ones_like(reward, dtype=torch.bool)
        if self.prescored:
            matched = column(batch, "mismatched") < 0.5
        good = required(batch.rewards, "rewards") > 0.5
        above = reward > self.beta * column(batch, "kto_z")
        return {
            "reward_good": reward[matched & good],
            "reward_bad": reward[matched & ~good],
            "label_accuracy": (above == good)[matched].to(reward.dtype),
            "nll": -policy.logps[batch.to_tokens((matched & good).to(reward.dtype)) > 0],
        }

    def report(self, batch: Batch) -> dict[str, float]:
        """Return kto/z, the estimated divergence from the reference."""
        return {"kto/z": float(batch.columns["kto_z"][0])}
