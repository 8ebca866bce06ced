"""Combine several rewards into one number per completion: pure functions on plain lists.

`None` is never treated as 0: a component that abstains is left out of the sum; a component that failed makes
the whole sample None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

from rft.config.rewards import DIRECTION, RewardConfig, RewardsConfig, Schedule
from rft.rewards.types import SampleReward, Score

Values = list[float | None]


def scheduled(weight: float | Schedule, progress: float) -> float:
    """Return a weight at `progress` (0 at the start of the run, 1 at its end)."""
    return float(weight) if isinstance(weight, int | float) else weight.at(progress)


def weighted_sum(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Return the sum of w_i * r_i over the components that apply; None if none does."""
    present = [w * v for v, w in zip(values, weights, strict=True) if v is not None]
    return sum(present) if present else None


def direction_product(vector: Sequence[float | None], direction: Sequence[float]) -> float | None:
    """Return v . r with the preference direction v scaled to length 1 (DPA, arXiv:2402.18571, eq. 2).

    None if a component is missing: the product is undefined without it.
    """
    norm = math.sqrt(sum(d * d for d in direction))
    if any(v is None for v in vector):
        return None
    return sum(d * v for d, v in zip(direction, vector, strict=True) if v is not None) / norm


def direction_of(column: object, count: int) -> Sequence[float]:
    """Return a row's preference direction from its column. Raises ValueError unless it is `count` numbers."""
    if not isinstance(column, list | tuple) or len(column) != count:
        shown = "missing" if column is None else f"{column!r:.60}"
        raise ValueError(
            f"rewards.direction: row needs a column {DIRECTION!r} of {count} numbers, one for each reward, "
            f"and it is {shown}; set data.directions, or give the direction in rewards.direction"
        )
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in column) or not any(column):
        raise ValueError(
            f"the column {DIRECTION!r} must be finite numbers that are not all 0, not {column!r:.60}"
        )
    return column


def normalized(values: Sequence[float | None], groups: Sequence[int], epsilon: float = 1e-4) -> Values:
    """Return (r - mean) / (std + epsilon) within each group (population std), over the values that apply.

    A group whose values are all equal gives exactly 0, whatever the rounding of its mean.
    """
    members: dict[int, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        if value is not None:
            members.setdefault(group, []).append(value)
    stats = {g: (fmean(v), pstdev(v) if min(v) < max(v) else 0.0) for g, v in members.items()}
    result: Values = []
    for value, group in zip(values, groups, strict=True):
        if value is None:
            result.append(None)
        else:
            mean, std = stats[group]
            result.append((value - mean) / (std + epsilon) if std else 0.0)
    return result


def gdpo(
    components: Sequence[Sequence[float | None]], weights: Sequence[float], groups: Sequence[int]
) -> Values:
    """Sum w_k times r_k normalised within its group over the components (GDPO, arXiv:2601.05242, eq. 4-5).

    components: one list of N values per reward. Normalising each reward separately keeps combinations
    distinct that normalising the sum would merge. The batch-wise normalisation of eq. 6 is left to the
    algorithm (advantage whitening).
    """
    per_reward = [normalized(values, groups) for values in components]
    return [weighted_sum(row, weights) for row in zip(*per_reward, strict=True)]


def gates_pass(scores: Sequence[Score], configs: Sequence[RewardConfig]) -> bool:
    """Whether every gate that applies reaches its threshold."""
    return all(
        s.value is None or s.value >= c.threshold for s, c in zip(scores, configs, strict=True) if c.gate
    )


def combine(
    config: RewardsConfig,
    scores: Mapping[str, Sequence[Score]],
    *,
    groups: Sequence[int] | None = None,
    progress: float = 0.0,
    directions: Sequence[Sequence[float]] | None = None,
) -> list[SampleReward]:
    """Combine the rewards of N completions.

    scores: by reward name, N each, in config order. groups: the group of each completion (for `gdpo`;
    by default all N are one group). progress: 0 to 1, for schedules. directions: the preference direction of
    each completion, for `direction: row`.
    """
    names, configs = list(scores), config.functions
    n = len(scores[names[0]]) if names else 0
    rows = [[scores[name][i] for name in names] for i in range(n)]
    weights = [scheduled(c.weight, progress) for c in configs]
    if config.combine == "vector":
        fixed = config.direction if isinstance(config.direction, list) else []
        values = [[s.value for s in row] for row in rows]
        totals = [direction_product(v, d) for v, d in zip(values, directions or [fixed] * n, strict=True)]
    else:
        totals = _totals(config, rows, weights, groups or [0] * n)
    result = []
    for row, total in zip(rows, totals, strict=True):
        failed = any(s.failed for s in row)
        if total is not None and not gates_pass(row, configs):
            total = config.gate_value
        if total is not None and config.clip is not None:
            total = min(max(total, config.clip[0]), config.clip[1])
        result.append(
            SampleReward(
                value=None if failed else total,
                scores=dict(zip(names, row, strict=True)),
                vector=None if failed or total is None else tuple(s.value for s in row),
            )
        )
    return result


def _totals(
    config: RewardsConfig, rows: Sequence[Sequence[Score]], weights: Sequence[float], groups: Sequence[int]
) -> Values:
    kept = [i for i, c in enumerate(config.functions) if not c.gate]
    values = [[None if any(s.failed for s in row) else row[i].value for i in kept] for row in rows]
    chosen = [weights[i] for i in kept]
    if config.combine == "gdpo":
        components = [[row[k] for row in values] for k in range(len(kept))]
        return gdpo(components, chosen, groups)
    if config.combine == "sum":
        return [weighted_sum(row, chosen) for row in values]
    fold = math.prod if config.combine == "product" else min
    present = [[v for v in row if v is not None] for row in values]
    return [fold(row) if row else None for row in present]
