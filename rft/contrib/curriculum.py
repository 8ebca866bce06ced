"""A prompt sampler that prefers prompts with an intermediate pass rate."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from rft.batch import Group
from rft.config.schema import CurriculumConfig
from rft.data.errors import DataError
from rft.data.sampler import Sampler
from rft.rewards.types import Outcome

PRIOR = (1.0, 1.0)  # Beta(1, 1): all pass rates are equally likely


class Curriculum:
    """Sample rows 0..size-1: a share `explore` in the order of `Sampler`, so that every row gets measured;
    the rest from the measured ones, by how close their pass rate p is to `target` t:

        weight(p) = floor + (1 - floor) * p^(t/m) (1-p)^((1-t)/m) / its maximum,   m = max(t, 1-t)

    (for t = 1/2 the variance p (1 - p) of a single trial, to which the gradient of a group with 0/1 rewards
    is proportional).

    With `model: beta` the rest is predicted instead (Qu et al., "Can prompt difficulty be online predicted",
    2025, MoPPS; after model predictive task sampling, arXiv:2504.19139): each row has a posterior Beta(a, b)
    of its pass rate, at first Beta(1, 1). After k completions, s of them correct,

        a <- decay * a + (1 - decay) * 1 + s,    b <- decay * b + (1 - decay) * 1 + k - s,

    since the policy changes. A draw takes `candidates` random rows, measured or not, draws a rate from the
    posterior of each (Thompson sampling), and chooses the row whose rate is closest to `target`. Every draw
    is a function of the seed, its number and the earlier observations. `epoch` after a draw is the number of
    earlier draws of that row.
    """

    TRIES = 64

    def __init__(self, size: int, seed: int, config: CurriculumConfig) -> None:
        self.config, self.size, self.seed = config, size, seed
        self.plain = Sampler(size, seed)
        self.draws = 0
        self.epoch = 0
        self.rates: dict[int, float] = {}
        self.posterior: dict[int, tuple[float, float]] = {}  # (a, b) of the rows that were measured
        self._mean: float | None = None  # deviation over these; None: to be computed
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
        choose = self._predicted if self.config.model == "beta" else self._by_rate
        row = None if rng.random() < self.config.explore else choose(rng)
        if row is None:
            (row,) = self.plain.next(1)
        self.epoch = self.visits[row][0] if row in self.visits else 0
        self.visits[row] = (self.epoch + 1, self.draws)
        self.draws += 1
        return row

    def _predicted(self, rng: random.Random) -> int | None:
        """Draw the row of the best predicted pass rate among some; None if all of them rest."""
        best, distance = None, math.inf
        for _ in range(self.config.candidates):
            row = rng.randrange(self.size)
            gap = abs(rng.betavariate(*self.posterior.get(row, PRIOR)) - self.config.target)
            if gap < distance and self._rested(row):
                best, distance = row, gap
        return best

    def _rested(self, row: int) -> bool:
        return row not in self.visits or self.draws - self.visits[row][1] > self.config.rest

    def _by_rate(self, rng: random.Random) -> int | None:
        """Draw a measured row, accepted with probability `weight`; None if no draw is accepted."""
        for _ in range(self.TRIES if self._rows else 0):
            row = rng.choice(self._rows)
            if self._rested(row) and rng.random() < self.weight(self.rates[row]):
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
            self.observe_rate(row, rate, sum(not c.demonstrated for c in group.completions))

    def observe_rate(self, row: int, rate: float, count: int = 1) -> None:
        """Record the share `rate` of correct ones among `count` completions of a row."""
        a, b = (
            self.config.decay * x + (1 - self.config.decay) * x0
            for x, x0 in zip(self.posterior.get(row, PRIOR), PRIOR, strict=True)
        )
        self._mean = None
        self.posterior[row] = a + rate * count, b + (1 - rate) * count
        if row not in self.rates:
            self._rows.append(row)
            self.rates[row] = rate
        else:
            self.rates[row] += self.config.rate * (rate - self.rates[row])

    def generations(self, row: int, usual: int) -> int:
        """Return how many completions to sample of a row: `usual` on average, and with `allocate` more where
        their rewards vary more: in proportion to the standard deviation of a trial, sqrt(p (1 - p)).

        Of all ways to spend a number of trials it has the smallest sum over the rows of variance / trials
        (Neyman's allocation). p is the posterior's mean; the deviation is relative to the mean of all
        measured rows, and limited to [1/2, 2].
        """
        if not self.config.allocate or row not in self.posterior:
            return usual
        if self._mean is None:
            self._mean = sum(_deviation(*ab) for ab in self.posterior.values()) / len(self.posterior)
        share = _deviation(*self.posterior[row]) / self._mean
        return max(2, round(usual * min(max(share, 0.5), 2.0)))

    def metrics(self) -> dict[str, float]:
        known = list(self.rates.values())
        rate = {"data/pass_rate": sum(known) / len(known)} if known else {}
        return {"data/measured": float(len(known)), **rate}

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON: about 30 bytes for every row that was drawn."""
        rows = [[r, *self.visits[r], self.rates.get(r), *self.posterior.get(r, ())] for r in self.visits]
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
        self.visits = {row: (count, last) for row, count, last, *_ in state["rows"]}
        self.rates = {row: rate for row, _, _, rate, *_ in state["rows"] if rate is not None}
        self._mean = None
        self.posterior = {row: (ab[0], ab[1]) for row, _, _, _, *ab in state["rows"] if ab}


def _deviation(a: float, b: float) -> float:
    """Return the standard deviation of a trial whose rate is the mean of Beta(a, b)."""
    return math.sqrt(a * b) / (a + b)


def pass_rate(group: Group, primary: str) -> float | None:
    """Return the share of a group's completions that the reward named `primary` judged correct. Completions
    that begin with a demonstration do not count: the policy did not solve the prompt. None if none are
    left."""
    sampled = [c for c in group.completions if not c.demonstrated]
    return (
        sum(c.scores[primary].outcome == Outcome.correct for c in sampled) / len(sampled) if sampled else None
    )
