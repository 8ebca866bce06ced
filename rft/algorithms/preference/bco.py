"""Binary classifier optimisation: preference optimisation from binary labels, with a shifted reward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.base import Algorithm, DataKind, PolicyOutput, Unit, required, setting
from rft.algorithms.math.preferences import log_sigmoid
from rft.algorithms.math.sequences import last_tokens
from rft.batch import Batch


@dataclass(frozen=True)
class BCO(Algorithm):
    """loss = -log sigmoid(+-(beta * s - d)), + for good, - for bad responses, s = log policy - log reference;
    Jung et al., "Binary classifier optimization for large language model alignment" (2024), section 3.

    A classifier of good and bad responses whose logit is the implicit reward beta * s. Its loss is an upper
    bound of DPO's, which is tightest at the shift d = (mean reward of good + mean reward of bad) / 2. Both
    means are moving averages over the steps before (`decay`). The paper's matching of the two prompt
    distributions, by a classifier of prompts, is omitted.

    Unlike `kto` it is convex in s, so responses that are far on the wrong side have the largest gradient, and
    it needs no mismatched responses.
    """

    online: ClassVar[bool] = False
    unit: ClassVar[Unit] = "sequence"
    data: ClassVar[DataKind] = "unpaired"

    beta: float = setting(0.1, "strength of the regularisation towards the reference", gt=0)
    decay: float = setting(0.9, "decay, per step, of the moving averages of the rewards", ge=0, lt=1)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logps"})

    def _reward(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return self.beta * batch.sum_by_sequence(policy.logps - required(batch.ref_logps, "ref_logps"))

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        sign = torch.where(_good(batch), 1.0, -1.0)
        return -log_sigmoid(sign * (self._reward(policy, batch) - _shift(batch.state)))

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return bco/reward_good and bco/reward_bad: mean implicit reward of good and of bad responses."""
        reward, good = self._reward(policy, batch).detach(), _good(batch)
        last = last_tokens(batch)
        measured = {}
        for name, chosen in (("bco/reward_good", good), ("bco/reward_bad", ~good)):
            here = chosen & (last >= 0)
            values = torch.full_like(batch.to_tokens(reward), math.nan)
            measured[name] = values.index_put((last[here],), reward[here])
        return measured

    def next_state(self, state: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
        new = {}
        for mean, average in _AVERAGES.items():
            if mean in metrics:  # the policy begins at the reference: an average of 0
                new[average] = self.decay * state.get(average, 0.0) + (1 - self.decay) * metrics[mean]
        return {**state, **new}

    def report(self, batch: Batch) -> dict[str, float]:
        """Return bco/shift, the shift d of the step."""
        return {"bco/shift": _shift(batch.state)}

    def held_out(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return held-out metrics.

        reward_good, reward_bad: implicit rewards. label_accuracy: responses on the right side of the shift.
        nll: of good responses.
        """
        reward, good = self._reward(policy, batch), _good(batch)
        return {
            "reward_good": reward[good],
            "reward_bad": reward[~good],
            "label_accuracy": ((reward > _shift(batch.state)) == good).to(reward.dtype),
            "nll": -policy.logps[batch.to_tokens(good.to(reward.dtype)) > 0],
        }


_AVERAGES = {"bco/reward_good": "bco_good", "bco/reward_bad": "bco_bad"}  # of which metric, in the state


def _good(batch: Batch) -> torch.Tensor:
    return required(batch.rewards, "rewards") > 0.5


def _shift(state: Mapping[str, float]) -> float:
    return sum(state.get(average, 0.0) for average in _AVERAGES.values()) / 2
