"""Supervised fine-tuning on the rows and tokens that perplexity and entropy select."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rft.algorithms.base import required, setting
from rft.algorithms.math.policy_gradient import safe_exp
from rft.algorithms.math.sequences import to_grid, top_share
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch


@dataclass(frozen=True)
class QTuning(SFT):
    """`sft` on rows that the model gets wrong for sure or right unsurely, and on part of the former's tokens.

    Wang et al., "Winning the pruning gamble" (Q-Tuning, 2025, arXiv:2509.23873). For each row of a step,
    before it, error is the perplexity exp(mean of -log p), and uncertainty the mean entropy of the
    predictions. With the quantiles Q of both over the rows,

        misconceptions: error > Q_(1-a), uncertainty <= Q_a
        calibration:    error <= Q_a,    uncertainty > Q_(1-a)

    and other rows are left out: noise, high in both, and known ones, low in both. a is such that the fraction
    `rows` remains; the paper bisects it, and here rows are sorted by the a from which on each one remains, at
    equal a by their error.
    Calibration rows are trained on as a whole, and a misconception on the fraction `share` of its tokens with
    the highest

        s_i = (1 - lambda) PPL_i + lambda (PPL_(i-1) + PPL_(i+1)),    PPL_i = 1 / p_i.

    Unlike `token_cleaning` it needs no second model. `rows: 1` leaves out tokens only.
    """

    rows: float = setting(0.5, "fraction of a step's rows that are trained on; 1: all of them", gt=0, le=1)
    share: float = setting(0.7, "fraction of a misconception's tokens that are trained on", gt=0, le=1)
    neighbours: float = setting(
        0.5, "lambda: weight of the perplexities of the token before and the one after", ge=0, le=1
    )

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_logps", "old_entropy"})

    @property
    def prescored(self) -> bool:
        return True

    @property
    def reads_order(self) -> bool:
        return True

    def prepare(self, batch: Batch) -> Batch:
        grid, real = to_grid(batch)
        count = real.sum(1).clamp(min=1)
        logps = required(batch.old_logps, "old_logps")[grid].masked_fill(~real, 0.0)
        entropy = required(batch.old_entropy, "old_entropy")[grid].masked_fill(~real, 0.0)
        kept, misconception = quadrants(-logps.sum(1) / count, entropy.sum(1) / count, self.rows)
        score = token_scores(logps, real, self.neighbours)
        tokens = torch.stack([top_share(*row, self.share) for row in zip(score, real, strict=True)])
        tokens = torch.where(misconception[:, None], tokens, real) & kept[:, None]
        return batch.with_(mask=torch.zeros_like(batch.mask).index_fill(0, grid[tokens], True))


def quadrants(
    error: torch.Tensor, uncertainty: torch.Tensor, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select the fraction `share` of rows that Q-Tuning keeps, at least one.

    error: perplexity of each row, or a value that rises with it, [N]. uncertainty: mean entropy, [N]. Returns
    which rows are kept, and which are misconceptions rather than calibration data, [N] bool each.
    """
    ranked, entropy = _quantile(error), _quantile(uncertainty)
    wrong = torch.maximum(1 - ranked, entropy)  # the a from which on a row is a misconception
    unsure = torch.maximum(ranked, 1 - entropy)
    order = torch.argsort(ranked, descending=True)  # of rows that remain from the same a on
    order = order[torch.argsort(torch.minimum(wrong, unsure)[order], stable=True)]
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept[order[: max(1, round(share * len(order)))]] = True
    return kept, wrong < unsure


def token_scores(logps: torch.Tensor, real: torch.Tensor, neighbours: float) -> torch.Tensor:
    """Return the score s_i of each token, [N, L], of which a misconception keeps the highest.

    logps, real: log-probs of the rows' tokens, padded, and the mask of real ones, [N, L]. neighbours: lambda.
    """
    perplexity = safe_exp(-logps).masked_fill(~real, 0.0)
    around = torch.nn.functional.pad(perplexity, (1, 1))
    return (1 - neighbours) * perplexity + neighbours * (around[:, :-2] + around[:, 2:])


def _quantile(x: torch.Tensor) -> torch.Tensor:
    """Return the position of each element in the sorted `x` [N], in (0, 1); ties by order."""
    order = torch.argsort(x, stable=True)
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(x), device=x.device))
    return (place + 0.5) / len(x)
