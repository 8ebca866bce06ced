"""Direct preference optimisation: DPO and its variants of loss, divergence and weighting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rft.algorithms.base import PolicyOutput, column, required, setting
from rft.algorithms.extras import ReadsDistributions
from rft.algorithms.math.preferences import (
    OF_MARGIN,
    PAIR_LOSSES,
    DivergenceType,
    LossParams,
    f_score,
    of_same_rank,
    paired_sums,
    sigmoid,
)
from rft.algorithms.preference.base import OfflinePreference
from rft.batch import Batch

LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo",
    "nca",
    "bco",
    "sppo_hard",
    "aot",
    "apo_zero",
    "apo_down",
    "discopop",
]


@dataclass(frozen=True)
class DPO(ReadsDistributions, OfflinePreference):
    """loss = -log sigmoid(beta * (s(chosen) - s(rejected))), s = log policy - log reference of a response;
    Rafailov et al., "Direct preference optimization" (2023), eq. 7.

    `loss_type` selects the replacement of -log sigmoid; each is described in `math/preferences.py`. `ipo`
    uses s per token, like its authors. `aot` (Melnyk et al. 2024) compares distributions instead of pairs:
    the sorted margins of the batch with the sorted margins of the reference.
    `label_smoothing` is the assumed fraction of flipped labels (cDPO; robust; exo's epsilon; aot).

    Further settings: `divergence_type` changes s (f-DPO, Wang et al. 2023); `length_normalized` uses s per
    token; `tail` < 1 is LD-DPO (Liu et al. 2024): it weights tokens past the length of the pair's shorter
    response; `nll` adds the chosen response's -log p per token (RPO, Pang et al. 2024, eq. 1); `weighting`
    multiplies by the geometric mean probability of both responses (WPO, Zhou et al. 2024, eq. 2; `aligned`:
    relative to that of a sample of the policy). The loss of a batch without pairs is 0.

    Pairs whose responses begin with the same tokens are compared from the first different one: log-ratios of
    equal tokens in equal contexts cancel. Step-DPO (Lai et al. 2024, eq. 2) is therefore `dpo` on pairs that
    share the right steps and end with a right and a wrong next step.
    """

    loss_type: LossType = setting("sigmoid", "loss function of the two scores")
    beta: float = setting(0.1, "strength of the regularisation towards the reference", gt=0)
    label_smoothing: float = setting(0.0, "assumed fraction of flipped labels", ge=0, lt=0.5)
    divergence_type: DivergenceType = setting("reverse_kl", "f-divergence to the reference, which defines s")
    alpha: float = setting(1.0, "order of divergence_type alpha", gt=0)
    length_normalized: bool = setting(False, "use log-ratios per token")
    tail: float = setting(1.0, "weight of tokens past the length of the shorter response", ge=0, le=1)
    nll: float = setting(0.0, "weight of the chosen response's negative log-likelihood per token", ge=0)
    weighting: Literal["none", "plain", "aligned"] = setting("none", "weight pairs by their probability")
    tau: float = setting(0.05, "discopop: temperature of the blend", gt=0)
    reference_free: bool = setting(False, "use a uniform reference instead of a model: s = log policy")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type == "exo" and not self.label_smoothing:
            raise ValueError("exo compares with smoothed labels: write label_smoothing: 0.001 or more")
        if self.divergence_type != "reverse_kl" and self.loss_type not in OF_MARGIN - {"aot"}:
            raise ValueError(f"{self.loss_type} is defined for divergence_type: reverse_kl only; write that")
        if self.loss_type == "aot" and self.weighting != "none":
            raise ValueError(
                "weighting does not apply to aot, which compares sorted scores instead of pairs; write "
                "weighting: none"
            )

    @property
    def reads_order(self) -> bool:
        return self.tail != 1

    @property
    def needs(self) -> frozenset[str]:
        needs = set() if self.reference_free else {"ref_logps"}
        return frozenset(needs | ({"old_logps"} if self.prescored else set()))

    @property
    def prescored(self) -> bool:
        return self.loss_type == "aot"

    @property
    def compares_rows(self) -> bool:
        return self.loss_type == "aot"

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset({"kl"} if self.weighting == "aligned" else ())

    @property
    def compares_distributions(self) -> bool:
        return False

    def divergence(self, logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Return log sum p^2, the log mean probability of a sampled token, for `weighting: aligned`."""
        return torch.logsumexp(2 * logps, -1)

    # -- scores ------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> Batch:
        """For aot, assign to each pair the reference margin of the same rank as its margin."""
        if self.loss_type != "aot":
            return batch
        first, second = self.pairs(batch)
        old = batch.sum_by_sequence(required(batch.old_logps, "old_logps"))
        reference = batch.sum_by_sequence(self._reference(batch))
        target = of_same_rank(reference[first] - reference[second], old[first] - old[second])
        target = torch.zeros_like(old).index_put((first,), target)
        return batch.with_(columns={**batch.columns, "aot_target": target})

    def _reference(self, batch: Batch) -> torch.Tensor:
        if self.reference_free:
            return torch.zeros(batch.num_tokens, device=batch.tokens.device)
        return required(batch.ref_logps, "ref_logps")

    def scores(self, policy: PolicyOutput, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return s of the chosen and rejected responses, ([P], [P])."""
        chosen, rejected = paired_sums(
            policy.logps - self._reference(batch), batch, *self.pairs(batch), self.tail
        )
        chosen = f_score(chosen, self.divergence_type, self.alpha)
        rejected = f_score(rejected, self.divergence_type, self.alpha)
        if self.length_normalized or self.loss_type == "ipo":
            first, second = self.pairs(batch)
            lengths = batch.lengths.clamp(min=1).to(chosen.dtype)
            return chosen / lengths[first], rejected / lengths[second]
        return chosen, rejected

    def implicit_rewards(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return self.beta * batch.sum_by_sequence(policy.logps - self._reference(batch))

    # -- the loss ----------------------------------------------------------------------------------

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        first, _ = self.pairs(batch)
        params = LossParams(self.beta, self.label_smoothing, self.tau)
        if self.loss_type == "aot":
            chosen, rejected = paired_sums(policy.logps, batch, *self.pairs(batch), self.tail)
            target = column(batch, "aot_target")[first].to(chosen.dtype)
            loss = sigmoid(chosen - rejected, target, params)
        else:
            loss = PAIR_LOSSES[self.loss_type](*self.scores(policy, batch), params)
        if self.weighting != "none":
            loss = loss * self._weights(policy, batch)
        if self.nll:
            loss = loss - self.nll * batch.mean_by_sequence(policy.logps)[first]
        return loss

    def _weights(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        """Return the product of both responses' geometric mean probability, [P], without gradient."""
        logps = policy.logps.detach()
        if self.weighting == "aligned":
            logps = logps - required(policy.kl, "kl").detach()
        weight = batch.mean_by_sequence(logps).exp()
        first, second = self.pairs(batch)
        return weight[first] * weight[second]
