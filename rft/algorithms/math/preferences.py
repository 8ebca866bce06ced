"""Preference math: pairs within groups, scores of two responses, and pairwise losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from rft.algorithms.math.policy_gradient import MAX_LOG_RATIO, rank_in_group, safe_exp
from rft.algorithms.math.sequences import token_index
from rft.batch import Batch

Preference = Literal["bradley_terry", "compare"]
DivergenceType = Literal["reverse_kl", "forward_kl", "js", "alpha"]

# -- preferences within groups, from rewards or a pairwise judge ---------------------------------------


def win_probability(reward: torch.Tensor, other: torch.Tensor, preference: Preference) -> torch.Tensor:
    """Return P(first is preferred), same shape.

    sigmoid(reward - other) for Bradley-Terry rewards; for verifiable rewards 1, 1/2 or 0 if the first is
    better, equal or worse.
    """
    if preference == "bradley_terry":
        return torch.sigmoid(reward - other)
    return (torch.sign(reward - other) + 1) / 2


def win_rate(rewards: torch.Tensor, group: torch.Tensor, preference: Preference) -> torch.Tensor:
    """Return the mean probability that a sequence is preferred to the others of its group, [N].

    The comparison with itself is excluded; in a group of one the result is 1/2.
    """
    same = (group[:, None] == group[None, :]) & ~torch.eye(len(group), dtype=torch.bool, device=group.device)
    wins = win_probability(rewards[:, None], rewards[None, :], preference).masked_fill(~same, 0)
    count = same.sum(1)
    return torch.where(count > 0, wins.sum(1) / count.clamp(min=1), 0.5)


def best_and_worst(rewards: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of each group's best and worst sequence, ([P], [P]).

    Groups whose rewards are all equal are omitted; ties go to the first in order.
    """
    best = rank_in_group(rewards, group) == 0
    worst = rank_in_group(-rewards, group) == 0
    first, last = best.nonzero().squeeze(1), worst.nonzero().squeeze(1)
    first, last = first[torch.argsort(group[first])], last[torch.argsort(group[last])]
    keep = rewards[first] > rewards[last]
    return first[keep], last[keep]


def all_pairs(group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all pairs of sequences of the same group, the earlier one first, ([P], [P])."""
    same = (group[:, None] == group[None, :]).triu(diagonal=1)
    first, second = same.nonzero(as_tuple=True)
    return first, second


def sequence_log_ratio(logps: torch.Tensor, other: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the log-ratio of policy to `other` of whole sequences, [N], in nats."""
    return batch.sum_by_sequence(logps - other)


def paired_sums(
    x: torch.Tensor, batch: Batch, first: torch.Tensor, second: torch.Tensor, tail: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sums of `x` [T] over the sequences `first` [P] and `second` [P] of pairs, ([P], [P]).

    Tokens past the length of the pair's shorter sequence are weighted by `tail`.
    """
    if tail == 1.0:
        total = batch.sum_by_sequence(x)
        return total[first], total[second]
    shorter = torch.minimum(batch.lengths[first], batch.lengths[second])
    index = token_index(batch)

    # In a ranking, a sequence may be in two pairs of different lengths.
    def total_of(role: torch.Tensor) -> torch.Tensor:
        common = torch.zeros_like(batch.lengths).index_put((role,), shorter)
        weight = torch.where(index < batch.to_tokens(common), 1.0, tail)
        return batch.sum_by_sequence(x * weight)[role]

    return total_of(first), total_of(second)


def of_same_rank(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Permute `values` [P] to the rank order of `like` [P]: the smallest where `like` is smallest, etc."""
    order = torch.argsort(like, stable=True)
    return torch.empty_like(values).scatter(0, order, values.sort().values)


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 / (1 + exp(-x))) without overflow."""
    return torch.nn.functional.logsigmoid(x)


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 - exp(x)) for x < 0, numerically stable (Maechler 2012)."""
    near = x > -0.6931471805599453  # -log 2
    safe_near = torch.where(near, x, -1.0)  # restrict each branch to its valid range, to avoid nan gradients
    safe_far = torch.where(near, -1.0, x)
    return torch.where(near, (-torch.expm1(safe_near)).log(), torch.log1p(-safe_far.exp()))


# -- losses --------------------------------------------------------------------------------------------
#
# `chosen` and `rejected` are [P]: implicit rewards without beta, i.e. the log-ratio of policy to reference,
# or a variant of it (length-normalised, or of another f-divergence). All losses return [P].


@dataclass(frozen=True)
class LossParams:
    """Parameters of the losses: `beta`, the fraction of flipped labels, the temperature of DiscoPOP."""

    beta: float
    smoothing: float = 0.0
    tau: float = 0.05


PairLoss: TypeAlias = "Callable[[torch.Tensor, torch.Tensor, LossParams], torch.Tensor]"


def sigmoid(chosen: torch.Tensor, rejected: torch.Tensor, p: LossParams) -> torch.Tensor:
    """-log sigmoid(beta * margin) (Rafailov et al. 2023, eq. 7).

    With label smoothing: conservative DPO (Mitchell 2023, eq. 3).
    """
    x = p.beta * (chosen - rejected)
    return -(1 - p.smoothing) * log_sigmoid(x) - p.smoothing * log_sigmoid(-x)


def hinge(chosen: torch.Tensor, rejected: torch.Tensor, p: LossParams) -> torch.Tensor:
    """max(0, 1 - beta * margin) (SLiC, Zhao et al. 2023; RSO, Liu et al. 2023)."""
    return (1 - p.beta * (chosen - rejected)).relu()


def ipo(chosen: torch.Tensor, rejected: torch.Tensor, p: LossParams) -> torch.Tensor:
    """(margin - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17)."""
    return (chosen - rejected - 1 / (2 * p.beta)).square()


def robust(chosen: torch.Tensor, rejected: torch.Tensor, p: LossParams) -> torch.Tensor:
    """Unbiased under flipped labels (Chowdhury et al. 2024).

    ((1 - e) * loss - e * flipped loss) / (1 - 2 e).
    """
    x, e = p.beta * (chosen - rejected), p.smoothing
    return (e * log_sigmoid(-x) - (1 - e) * log_sigmoid(x)) / (1 - 2 * e)


def exo(chosen: torch.Tensor, rejected: torch.Tensor, p: LossParams) -> torch.Tensor:
    """KL(p || q) of p = (sigmoid(x), sigmoid(-x)) and q = (1 - e, e) (Ji et al. 2024, eq. 16)."""
    x = p.beta * (chosen - rejected)
    return torch.sigmoid(x) * (log_sigmoid(x) - math.log1p(-p.smoothing)) + torch.sigmoid(-x) * (
        log_sigmoid(-x) - math.log(p.smoothing)
    )


def nca(chosen: torch.Tensor, rejected: torch.Tensor, p: LossParams) -> torch.Tensor:
    """Noise-contrastive alignment for pairs (Chen et al. 2024).

    It also optimises absolute likelihoods, which keeps the chosen response's likelihood from decreasing.
    """
    c, r = p.beta * chosen, p.beta * rejected
    return -log_sigmoid(c) - 0.5 * log_sigmoid(-c) - 0.5 * log_sigmoid(-r)


def bco(chosen: torch.Tensor, rejected: torch.Tensor, p: LossParams) -> torch.Tensor:
    """Binary classification of chosen and rejected responses, independently (Jung et al. 2024, shift 0)."""
    return -log_sigmoid(p.beta * chosen) - log_sigmoid(-p.beta * rejected)


def sppo_hard(chosen: torch.Tensor, rejected: torch.Tensor, p: LossParams) -> torch.Tensor:
    """Squared error to targets +-1 / (2 beta) (Wu et al. 2024, eq. 4.7, with P(win) 1 and 0)."""
    return (chosen - 0.5 / p.beta).square() + (rejected + 0.5 / p.beta).square()


def apo_zero(chosen: torch.Tensor, rejected: torch.Tensor, p: LossParams) -> torch.Tensor:
    """Increase chosen, decrease rejected (D'Oosterlinck et al. 2024, eq. 7): for data above model quality."""
    return torch.sigmoid(-p.beta * chosen) + torch.sigmoid(p.beta * rejected)


def apo_down(chosen: torch.Tensor, rejected: torch.Tensor, p: LossParams) -> torch.Tensor:
    """Decrease both, rejected more (D'Oosterlinck et al. 2024, eq. 8): for data below model quality."""
    return torch.sigmoid(p.beta * chosen) + torch.sigmoid(-p.beta * (chosen - rejected))


def discopop(chosen: torch.Tensor, rejected: torch.Tensor, p: LossParams) -> torch.Tensor:
    """Logistic and exponential loss, blended as a function of the margin (Lu et al. 2024, eq. 5).

    Not monotone: with tau 0.05 the slope at margin 0 is +0.8, so a policy initialised at the reference moves
    to slightly negative margins, unless tau / beta is small compared to a step.
    """
    x = p.beta * (chosen - rejected)
    blend = torch.sigmoid(x / p.tau)
    return -log_sigmoid(x) * (1 - blend) + safe_exp(-x) * blend


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "exo": exo,
    "nca": nca,
    "bco": bco,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}

# Losses that depend only on the margin; the others require log-ratios as scores.
OF_MARGIN = frozenset({"sigmoid", "hinge", "ipo", "robust", "exo", "discopop", "aot"})


def f_score(log_ratio: torch.Tensor, divergence: DivergenceType, alpha: float) -> torch.Tensor:
    """Return the implicit reward f'(t), t = exp(log_ratio), of DPO with an f-divergence.

    Up to a constant that cancels in margins; Wang et al. 2023, "Beyond reverse KL", table 1.
    """
    if divergence == "reverse_kl" or (divergence == "alpha" and abs(alpha - 1) < 1e-6):
        return log_ratio
    if divergence == "forward_kl":
        return 1 - safe_exp(-log_ratio)
    if divergence == "js":
        return math.log(2) + log_sigmoid(log_ratio)
    exponent = ((alpha - 1) * log_ratio).clamp(max=2 * MAX_LOG_RATIO)  # so that its square fits float32
    return (exponent.exp() - 1) / (alpha - 1)
