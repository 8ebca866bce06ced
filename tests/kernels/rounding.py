"""How far two right results of a head may lie apart: from the dtype and the sums, on any processor."""

from __future__ import annotations

import torch
from torch import Tensor

from rft.kernels.logprob_common import accumulate_dtype


def tolerance(
    dtype: torch.dtype, hidden: Tensor, weight: Tensor, slope: float = 1.0, low: float = 0.0
) -> float:
    """Relative to the norm of a head's log-probs, entropies, divergences or gradients.

    hidden [T, H], weight [V, H]: what the logits are made of. slope: d logit / d product. low: what LoRA and
    a bias add to the largest product.
    """
    unit = torch.finfo(dtype).eps / 2  # one rounding
    sum_unit = torch.finfo(accumulate_dtype(dtype)).eps / 2  # one rounding of an accumulator
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    h, w = hidden.detach().double(), weight.detach().double()
    largest = float((h @ w.t()).abs().max()) + low
    summed = float((h.abs() @ w.abs().t()).max()) + low
    # A logit: the product rounded once to the dtype, and its sum of `width` terms in the accumulator.
    logit = slope * (unit * largest + sum_unit * width * summed)
    # Log-probs and probabilities take over the difference of two logits' errors, an entropy's gradient twice.
    # Then the logits' gradient is rounded, is summed over rows or vocabulary, and rounded again.
    return 4 * logit + 2 * unit + sum_unit * max(rows, vocabulary)
