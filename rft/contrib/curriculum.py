"""A prompt sampler that prefers prompts with an intermediate pass rate."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from rft.batch import Group
from rft.config.schema import CurriculumConfig
from rft.data.errors import DataError
from rft.data.sampler import Sampler
from rft.rewards.types import Outcome


class Curriculum:
    """Sample rows 0..size-1: a share `explore` in the order of `Sampler`, so that every row gets measured;
    the rest from the measured ones, by how close their pass rate p is to `target` t:

        weight(p) = floor + (1 - floor) * p^(t/m) (1-p)^((1-t)/m) / its maximum,   m = max(t, 1-t)

    (for t = 1/2 the variance p (1 - p) of a single trial, to which the gradient of a group with 0/1 rewards
    is proportional). Every draw is a function of the seed, its number and the earlier observations.
    `epoch` after a draw is the number of earlier draws of that row.
    """

    TRIES = 64

    def __init__(self, size: int, seed: int, config: CurriculumConfig) -> None:
        self.config, self.size, self.seed = config, size, seed
        self.plain = Sampler(size, seed)
        self.draws = 0
        self.epoch = 0
        self.rates: dict[int, float] = {}
        self.visits: dict[int, tuple[int, int]] = {}  # row -> (number of draws, index of the last draw)
        self._rows: list[int] = []  # measured rows, in the order of their first measurement

    @property
    def seen(self) -> int:
        """Number of rows drawn since the start, with repetitions."""
        return self.draws

    def next(self, k: int) -> list[int]:
        """Return the next k rows; `epoch` belongs to the last of them."""
        return [self._draw() for _ in range(k)]

    def _draw(self) -> int:
        rng = random.Random(f"{self.seed}/curriculum/{self.draws}")
        row = None if rng.random() < self.config.explore else self._by_rate(rng)
        if row is None:
            (row,) = self.plain.next(1)
        self.epoch = self.visits[row][0] if row in self.visits else 0
        self.visits[row] = (self.epoch + 1, self.draws)
        self.draws += 1
        return row

    def _by_rate(self, rng: random.Random) -> int | None:
        """Draw a measured row, accepted with probability `weight`; None if no draw is accepted."""
        for _ in range(self.TRIES if self._rows else 0):
            row = rng.choice(self._rows)
            rested = self.draws - self.visits[row][1] > self.config.rest
            if rested and rng.random() < self.weight(self.rates[row]):
                return row
        return None

    def weight(self, rate: float) -> float:
        """Return the sampling probability at this pass rate relative to the best one: in [floor, 1]."""
        t, floor = self.config.target, self.config.floor
        m = max(t, 1 - t)
        height = (rate / t) ** (t / m) * ((1 - rate) / (1 - t)) ** ((1 - t) / m)
        return floor + (1 - floor) * height

    def observe(self, row: int, group: Group, primary: str) -> None:
        """Record a scored group's pass rate, if it has one."""
        rate = pass_rate(group, primary)
        if rate is not None:
            self.observe_rate(row, rate)

    def observe_rate(self, row: int, rate: float) -> None:
        """Record the share `rate` of correct completions of a row."""
        if row not in self.rates:
            self._rows.append(row)
            self.rates[row] = rate
        else:
            self.rates[row] += self.config.rate * (rate - self.rates[row])

    def metrics(self) -> dict[str, float]:
        known = list(self.rates.values())
        rate = {"data/pass_rate": sum(known) / len(known)} if known else {}
        return {"data/measured": float(len(known)), **rate}

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON: about 30 bytes for every row that was drawn."""
        rows = [[r, *self.visits[r], self.rates.get(r)] for r in self.visits]
        return {"plain": self.plain.state_dict(), "draws": self.draws, "rows": rows, "measured": self._rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`. Raises DataError if the data is not the same."""
        if "plain" not in state:
            raise DataError(
                "the checkpoint was made without train.curriculum: remove it from the config, or "
                "start a new run"
            )
        self.plain.load_state_dict(state["plain"])
        self.draws, self._rows = state["draws"], list(state["measured"])
        self.visits = {row: (count, last) for row, count, last, _ in state["rows"]}
        self.rates = {row: rate for row, _, _, rate in state["rows"] if rate is not None}


def pass_rate(group: Group, primary: str) -> float | None:
    """Return the share of a group's completions that the reward named `primary` judged correct. Completions
    that begin with a demonstration do not count: the policy did not solve the prompt. None if none are
    left."""
    sampled = [c for c in group.completions if not c.demonstrated]
    return (
        sum(c.scores[primary].outcome == Outcome.correct for c in sampled) / len(sampled) if sampled else None
    )
