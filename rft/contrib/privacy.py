"""Differentially private training of offline runs: clipped and noised gradients, Poisson sampling, and the
privacy that is spent.

Abadi et al., "Deep learning with differential privacy" (2016), algorithm 1. The unit of privacy is a row: a
demonstration, a pair, a ranking.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from rft.batch import Batch, Group
from rft.config.learner import PrivacyConfig
from rft.data.errors import DataError
from rft.learner.learner import Learner
from rft.learner.objective import LogpGap, has_units, merge_means
from rft.utils.seeds import derive_seed

ORDERS = (*range(2, 64), *range(64, 512, 16))  # of the Renyi divergences that bound epsilon


class PrivateGradient:
    """The sum of rows' gradients, each clipped to the norm `clip`, with noise of standard deviation
    `noise * clip`."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: PrivacyConfig) -> None:
        self.parameters, self.config = list(parameters), config
        self.sums = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]

    @torch.no_grad()
    def add(self) -> None:
        """Take the gradient of one row from the parameters, which then have none."""
        gradients = [None if p.grad is None else p.grad.float() for p in self.parameters]
        norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
        scale = (self.config.clip / norm).clamp(max=1.0)  # of a gradient of 0: inf, and then 1
        for total, gradient in zip(self.sums, gradients, strict=True):
            if gradient is not None:
                total.add_(gradient * scale)
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def release(self, expected: int) -> None:
        """Set the parameters' gradients to the noised sum, divided by the expected number of rows. The noise
        is from torch's global generator, whose state is saved in checkpoints."""
        scale = self.config.noise * self.config.clip
        for parameter, total in zip(self.parameters, self.sums, strict=True):
            noised = total + scale * torch.randn_like(total)
            parameter.grad = (noised / expected).to(parameter.dtype)


class PrivateLearner(Learner):
    """A learner whose updates are made of rows' clipped gradients and noise (`learner.privacy`)."""

    def _accumulate(self, mini: Batch, gap: LogpGap | None) -> dict[str, float]:
        """Set the gradient to the noised sum of the rows' clipped gradients; return the mean of the rows'
        metrics. A row's loss is averaged over the row's units. Rows are run one by one."""
        config = self.spec.config.privacy
        if config is None:
            return super()._accumulate(mini, gap)
        gradient = PrivateGradient(self.strategy.trained(self.policy), config)
        metrics = []
        for group in range(mini.num_groups):
            row = mini.select_groups(torch.tensor([group]))
            if has_units(self.algorithm, row):
                metrics.append(super()._accumulate(row, None))
                gradient.add()
        gradient.release(self.spec.train.batch_size)
        return merge_means(metrics)


class PoissonSampler:
    """Rows drawn independently, each with the probability batch_size / rows: the draw that `epsilon` assumes.

    A step has `batch_size` rows on average. None is drawn with the probability e^-batch_size, which is
    neglected: such a step makes no update. Draws depend on seed and step only.
    """

    def __init__(self, size: int, seed: int, config: PrivacyConfig) -> None:
        self.size, self.seed, self.config = size, seed, config
        self.draws, self.seen, self.expected = 0, 0, 0

    @property
    def epoch(self) -> int:
        return self.seen // self.size

    def next(self, k: int) -> list[int]:
        """Return the rows of the next step, k on average; k is at most the number of rows."""
        draw = np.random.default_rng(derive_seed(self.seed, "poisson", self.draws)).random(self.size)
        rows: list[int] = np.flatnonzero(draw < k / self.size).tolist()
        self.draws, self.seen, self.expected = self.draws + 1, self.seen + len(rows), k
        return rows

    def observe(self, row: int, group: Group, primary: str) -> None:
        """No-op: draws depend only on the seed."""

    @cached_property
    def _divergences(self) -> list[float]:
        return [renyi_divergence(self.expected / self.size, self.config.noise, a) for a in ORDERS]

    def metrics(self) -> dict[str, float]:
        """Return privacy/epsilon, spent by the steps so far."""
        if not self.draws:
            return {}
        return {"privacy/epsilon": epsilon([self.draws * d for d in self._divergences], self.config.delta)}

    def state_dict(self) -> dict[str, Any]:
        return {"poisson": self.size, "draws": self.draws, "seen": self.seen, "expected": self.expected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state. Raises DataError if it is of other rows or of another sampler."""
        if state.get("poisson") != self.size:
            raise DataError(
                f"cannot resume the private sampling of {self.size} rows: the checkpoint was made with other "
                "rows, or without learner.privacy; restore these settings, or start a new run"
            )
        self.draws, self.seen, self.expected = (int(state[k]) for k in ("draws", "seen", "expected"))


def renyi_divergence(rate: float, noise: float, order: int) -> float:
    """Return the Renyi divergence of one step that draws rows at `rate` (Mironov et al., "Renyi differential
    privacy of the sampled Gaussian mechanism", 2019, eq. 4; for rate 1 order / (2 noise^2))."""
    if rate == 1:
        return order / (2 * noise**2)
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + k * math.log(rate)
        + (order - k) * math.log1p(-rate)
        + (k * k - k) / (2 * noise**2)
        for k in range(order + 1)
    ]
    return float(np.logaddexp.reduce(terms)) / (order - 1)


def epsilon(divergences: Iterable[float], delta: float) -> float:
    """Return the epsilon of (epsilon, delta)-differential privacy from Renyi divergences of `ORDERS` (Canonne
    et al., "The discrete Gaussian for differential privacy", 2020, proposition 12)."""
    bounds = (
        d + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for a, d in zip(ORDERS, divergences, strict=True)
    )
    return max(0.0, min(bounds))
