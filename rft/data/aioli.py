"""Rates of a mixture, learned during training by Aioli (Chen et al. 2024, arXiv:2411.05735)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rft.config.mixture import AioliConfig
from rft.data.errors import DataError

Matrix = NDArray[np.float64]


def gain_matrix(drops: Matrix, focus: float) -> Matrix:
    """Return A [k, k]: how much a step on source j lowers the loss of source i.

    drops: [k, k], the fall of loss i over the interval in which source j had the share `focus` and the others
    the rest in equal parts. By the mixing law the fall is sum_s A[i, s] p[s], so each row solves W a = drop,
    where W[j] are the rates of interval j.
    """
    k = len(drops)
    rates = np.full((k, k), (1 - focus) / (k - 1))
    np.fill_diagonal(rates, focus)
    solved: Matrix = np.linalg.solve(rates, drops.T).T
    return solved


def updated(weights: Matrix, gains: Matrix, eta: float) -> Matrix:
    """Return the rates [k] after an exponentiated-gradient step: p_j exp(eta sum_i A[i, j]), normalised.

    A is shifted to be non-negative and divided by its sum: eta does not depend on the scale of the losses.
    """
    shifted = gains - min(float(gains.min()), 0.0)
    total = float(shifted.sum())
    scaled = shifted / total if total > 0 else shifted
    new = weights * np.exp(eta * scaled.sum(axis=0))
    result: Matrix = new / new.sum()
    return result


class Aioli:
    """Learned rates. A round of `every` steps begins with a sweep over the sources, from which the gains are
    estimated; the rest of the round is trained at the updated rates. `current`: the rates of the next batch.
    """

    def __init__(self, config: AioliConfig, names: Sequence[str], seed: int) -> None:
        self.config, self.names, self.seed = config, list(names), seed
        k = len(self.names)
        self.weights: Matrix = np.full(k, 1 / k)
        self.drops: Matrix = np.zeros((k, k))
        self.losses: Matrix | None = None  # at the last measurement
        self.measured = -1  # step of the last measurement
        self.current: Matrix = self.weights

    @property
    def sweep_steps(self) -> int:
        """Return the steps of a sweep."""
        return len(self.names) * self.config.sweeps * self.config.steps

    def due(self, step: int) -> bool:
        """Return whether to measure the losses after `step` steps, before the next batch is drawn."""
        place = step % self.config.every
        return step > self.measured and place <= self.sweep_steps and place % self.config.steps == 0

    def order(self, step: int) -> list[int]:
        """Return the source of each interval in the round of `step`; every sweep is in random order."""
        rng = random.Random(f"{self.seed}/aioli/{step // self.config.every}")
        k = len(self.names)
        return [j for _ in range(self.config.sweeps) for j in rng.sample(range(k), k)]

    def observe(self, step: int, losses: Mapping[str, float]) -> None:
        """Record the held-out loss of each source after `step` steps, and set the rates of the next steps."""
        now = np.array([losses[name] for name in self.names])
        place, k = step % self.config.every, len(self.names)
        interval, order = place // self.config.steps, self.order(step)
        if place == 0 or self.losses is None:
            self.drops = np.zeros((k, k))
        else:
            self.drops[:, order[interval - 1]] += self.losses - now
        self.losses, self.measured = now, step
        if place < self.sweep_steps:
            self.current = np.full(k, (1 - self.config.focus) / (k - 1))
            self.current[order[interval]] = self.config.focus
            return
        gains = gain_matrix(self.drops / self.config.sweeps, self.config.focus)
        self.weights = self.current = updated(self.weights, gains, self.config.eta)

    def rates(self) -> dict[str, float]:
        """Return the rates of the next batch, by source."""
        return dict(zip(self.names, self.current.tolist(), strict=True))

    def metrics(self) -> dict[str, float]:
        """Return the learned rate of each source, without those of a sweep."""
        return {f"data/{n}/rate": w for n, w in zip(self.names, self.weights.tolist(), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "names": self.names,
            "weights": self.weights.tolist(),
            "drops": self.drops.tolist(),
            "losses": None if self.losses is None else self.losses.tolist(),
            "measured": self.measured,
            "current": self.current.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state. Raises DataError if the sources differ."""
        if state["names"] != self.names:
            raise DataError(
                f"cannot resume the rates of a mixture: they were learned for {', '.join(state['names'])}, "
                f"this run has {', '.join(self.names)}; restore `data.mixture`, or start a new run"
            )
        self.weights, self.drops, self.current = (
            np.array(state[name]) for name in ("weights", "drops", "current")
        )
        self.losses = None if state["losses"] is None else np.array(state["losses"])
        self.measured = int(state["measured"])
