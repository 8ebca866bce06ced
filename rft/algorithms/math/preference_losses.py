"""The losses that compare two responses, as pure functions of their scores.

`chosen` and `rejected` are [P]: beta-free implicit rewards, log of policy over reference (or whatever
takes its place: a length-normalised one, another f-divergence's). All return [P].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rft.algorithms.math.kl import MAX_LOG_RATIO, safe_exp

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


@dataclass(frozen=True)
class Knobs:
    """What the losses are turned with: `beta`, the share of flipped labels, DiscoPOP's temperature."""

    beta: float
    smoothing: float = 0.0
    tau: float = 0.05


PairLoss = Callable[[Tensor, Tensor, Knobs], Tensor]


def sigmoid(chosen: Tensor, rejected: Tensor, k: Knobs) -> Tensor:
    """-log sigmoid(beta * margin) (Rafailov et al. 2023, eq. 7); with smoothing, conservative DPO
    (Mitchell 2023, eq. 3)."""
    x = k.beta * (chosen - rejected)
    return -(1 - k.smoothing) * F.logsigmoid(x) - k.smoothing * F.logsigmoid(-x)


def hinge(chosen: Tensor, rejected: Tensor, k: Knobs) -> Tensor:
    """max(0, 1 - beta * margin) (SLiC, Zhao et al. 2023; RSO, Liu et al. 2023)."""
    return (1 - k.beta * (chosen - rejected)).relu()


def ipo(chosen: Tensor, rejected: Tensor, k: Knobs) -> Tensor:
    """(margin - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17)."""
    return (chosen - rejected - 1 / (2 * k.beta)).square()


def robust(chosen: Tensor, rejected: Tensor, k: Knobs) -> Tensor:
    """Unbiased under flipped labels (Chowdhury et al. 2024):
    ((1 - e) * loss - e * flipped loss) / (1 - 2 e)."""
    x, e = k.beta * (chosen - rejected), k.smoothing
    return (e * F.logsigmoid(-x) - (1 - e) * F.logsigmoid(x)) / (1 - 2 * e)


def exo(chosen: Tensor, rejected: Tensor, k: Knobs) -> Tensor:
    """KL(p || q) of p = (sigmoid(x), sigmoid(-x)) and q = (1 - e, e) (Ji et al. 2024, eq. 16)."""
    x = k.beta * (chosen - rejected)
    return torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-k.smoothing)) + torch.sigmoid(-x) * (
        F.logsigmoid(-x) - math.log(k.smoothing)
    )


def nca(chosen: Tensor, rejected: Tensor, k: Knobs) -> Tensor:
    """Noise-contrastive alignment for pairs (Chen et al. 2024): absolute likelihoods too, so that
    the chosen response does not sink with the rejected one."""
    c, r = k.beta * chosen, k.beta * rejected
    return -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r)


def bco(chosen: Tensor, rejected: Tensor, k: Knobs) -> Tensor:
    """Binary classifier: chosen against rejected, each on its own (Jung et al. 2024, with shift 0)."""
    return -F.logsigmoid(k.beta * chosen) - F.logsigmoid(-k.beta * rejected)


def sppo_hard(chosen: Tensor, rejected: Tensor, k: Knobs) -> Tensor:
    """Squared distance to +-1 / (2 beta) (Wu et al. 2024, eq. 4.7 with P(win) 1 and 0)."""
    return (chosen - 0.5 / k.beta).square() + (rejected + 0.5 / k.beta).square()


def apo_zero(chosen: Tensor, rejected: Tensor, k: Knobs) -> Tensor:
    """Chosen up, rejected down (D'Oosterlinck et al. 2024, eq. 7): for data better than the model."""
    return torch.sigmoid(-k.beta * chosen) + torch.sigmoid(k.beta * rejected)


def apo_down(chosen: Tensor, rejected: Tensor, k: Knobs) -> Tensor:
    """Both down, rejected further (eq. 8): for data worse than the model."""
    return torch.sigmoid(k.beta * chosen) + torch.sigmoid(-k.beta * (chosen - rejected))


def discopop(chosen: Tensor, rejected: Tensor, k: Knobs) -> Tensor:
    """Logistic and exponential loss, blended by the margin itself (Lu et al. 2024, eq. 5).

    Not monotone: with tau 0.05 its slope at a margin of 0 is +0.8, so that a policy that starts at the
    reference is drawn to slightly negative margins, unless tau / beta is small against a step.
    """
    x = k.beta * (chosen - rejected)
    blend = torch.sigmoid(x / k.tau)
    return -F.logsigmoid(x) * (1 - blend) + safe_exp(-x) * blend


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

# Losses of the margin alone; the others need the two scores to be log-ratios.
OF_MARGIN = frozenset({"sigmoid", "hinge", "ipo", "robust", "exo", "discopop", "aot"})


def f_score(log_ratio: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """The implicit reward f'(t), t = exp(log_ratio), of DPO under another divergence (Wang et al. 2023,
    "Beyond reverse KL", table 1), up to a constant that cancels in a margin."""
    if divergence == "reverse_kl" or (divergence == "alpha" and abs(alpha - 1) < 1e-6):
        return log_ratio
    if divergence == "forward_kl":
        return 1 - safe_exp(-log_ratio)
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    exponent = ((alpha - 1) * log_ratio).clamp(max=2 * MAX_LOG_RATIO)  # its square still fits float32
    return (exponent.exp() - 1) / (alpha - 1)
