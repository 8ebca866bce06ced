"""Config of `data.mixture`: named sources of training rows, and the rates at which they are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import Field, ValidationError, field_validator

from rft.config.base import ConfigModel
from rft.config.environment import EnvironmentConfig
from rft.config.rewards import Schedule
from rft.utils.paths import PathText

NAME = r"^[A-Za-z0-9_-]+$"  # of a source: it is part of override keys and metric names
RESERVED = ("mean", "std", "min", "max", "outcome", "dropped", "demonstrated", "own", "workers")
COLUMN = "mixture_source"
"""Column that each row of a mixture gets, with the name of its source."""

Stages = list[tuple[float, float]]


class AioliConfig(ConfigModel):
    """Rates of a mixture that are learned during training."""

    every: int = Field(200, ge=2, description="steps of a round: a sweep over the sources, then training")
    steps: int = Field(4, ge=1, description="steps on each source in a sweep")
    sweeps: int = Field(1, ge=1, description="sweeps over the sources in a round")
    focus: float = Field(0.75, gt=0, le=1, description="share of the swept source in its steps")
    eta: float = Field(0.5, gt=0, description="step size of the rates, per round")
    rows: int = Field(64, ge=1, description="held-out rows of each source, on which losses are measured")


class MixtureSource(ConfigModel):
    """Source of a mixture. Keys that are not set are those of `data`."""

    kind: str | None = Field(None, description="as `data.kind`")
    path: PathText | None = Field(None, description="as `data.path`")
    eval_path: PathText | None = Field(None, description="as `data.eval_path`")
    split: str | None = Field(None, description="as `data.split`")
    eval_split: str | None = Field(None, description="as `data.eval_split`")
    holdout: int = Field(0, ge=0, description="as `data.holdout`")
    subset: str | None = Field(None, description="as `data.subset`")
    revision: str | None = Field(None, description="as `data.revision`")
    task: str | None = Field(None, description="as `data.task`")
    options: dict[str, Any] = Field(default_factory=dict, description="as `data.options`")
    columns: dict[str, str] | None = Field(None, description="as `data.columns`")
    answer_pattern: str | None = Field(None, description="as `data.answer_pattern`")
    template: str | list[str] | None = Field(None, description="as `data.template`")
    system: str | None = Field(None, description="as `data.system`")
    rewards: list[str] | None = Field(
        None, description="names of the `rewards` that score rows of this source (none: all)"
    )
    rate: float | Schedule | Stages | None = Field(
        None,
        description="share of the rows drawn, relative to the other sources: a number, a schedule, or stages "
        "[[progress, rate], ...], each from its progress (0 to 1) on",
    )
    limit: int | None = Field(None, ge=1, description="as `data.limit`")
    eval_limit: int | None = Field(None, ge=1, description="as `data.eval_limit`")
    epochs: float | None = Field(
        None, gt=0, description="passes over the rows after which the source is left out (none: no limit)"
    )

    environment: EnvironmentConfig | None = Field(
        None,
        description="the multi-turn environment of this source (none: the section `environment`; without "
        "one, a row has one completion)",
    )

    @field_validator("environment")
    @classmethod
    def _named(cls, value: EnvironmentConfig | None) -> EnvironmentConfig | None:
        if value is not None and value.passed:
            raise ValueError(
                f"{next(iter(value.passed))} was passed as an object, and a source names its environment; "
                "write `file.py:name` or `package.module:name`"
            )
        return value

    @field_validator("template", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        return checked_templates(value)

    @field_validator("rate", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        """Check numbers and stages here: a union's errors would name its members instead of the key."""
        if isinstance(value, int | float) and not isinstance(value, bool) and not value >= 0:
            raise ValueError("a rate must not be negative")
        if isinstance(value, Mapping):
            return _schedule(value)
        if value is None or (isinstance(value, int | float | Schedule) and not isinstance(value, bool)):
            return value
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError("write a number, a schedule {start: 1, end: 0}, or stages [[0, 1], [0.5, 0]]")
        pairs = [pair for pair in value if isinstance(pair, Sequence) and len(pair) == 2]
        numbers = [n for pair in pairs for n in pair if isinstance(n, int | float)]
        starts = [pair[0] for pair in pairs]
        if len(numbers) != 2 * len(value) or not value or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError("stages are [[0, rate], [progress, rate], ...], by increasing progress")
        if max(starts) > 1 or min(numbers) < 0:
            raise ValueError("the progress of a stage is 0 to 1, and its rate not negative")
        return value


def checked_templates(value: Any) -> Any:
    """Return a template, or a list of them. Raises ValueError: a union's errors would name its members."""
    texts = [value] if value is None or isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(t is None or isinstance(t, str) for t in texts):
        raise ValueError("write a text, or a list of at least one text")
    return value


def _schedule(value: Mapping[str, Any]) -> Schedule:
    try:
        return Schedule.model_validate(value)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}".lstrip(": ") for e in error.errors()]
        raise ValueError(f"not a schedule: {'; '.join(problems)}") from None


def rate_at(rate: float | Schedule | Stages, progress: float) -> float:
    """Return a rate at `progress`, 0 at the start of the run and 1 at its end."""
    if isinstance(rate, Schedule):
        return rate.at(progress)
    if isinstance(rate, int | float):
        return float(rate)
    return next(value for start, value in reversed(rate) if start <= progress)


def rate_problems(sources: Mapping[str, MixtureSource], mixing: str | None) -> list[str]:
    """Return the problems of a mixture's rates. mixing: `data.mixing`."""
    given = [name for name, source in sources.items() if source.rate is not None]
    if mixing in ("proportional", "temperature", "aioli"):
        if given:
            return [f"`mixing: {mixing}` computes the rates; leave out the rate of {', '.join(given)}"]
        return []
    without = [name for name in sources if name not in given]
    if without and (given or mixing == "fixed"):
        return [
            f"no rate for {', '.join(without)}: give every source one, or none and `mixing: proportional`"
        ]
    rates = [source.rate for source in sources.values() if source.rate is not None]
    if any(isinstance(rate, Schedule) and min(rate.start, rate.end) < 0 for rate in rates):
        return ["a rate must not be negative: change the `start` or `end` of a schedule"]
    for progress in _turning_points(rates) if rates else ():
        if not any(rate_at(rate, progress) > 0 for rate in rates):
            return [f"the rates of all sources are 0 at progress {progress:g}; give one of them a rate"]
    return []


def aioli_problems(sources: Mapping[str, MixtureSource], aioli: AioliConfig) -> list[str]:
    """Return the problems of a mixture whose rates are learned."""
    k = len(sources)
    if k < 2:
        return ["`mixing: aioli` needs two sources or more"]
    problems = []
    if limited := [name for name, source in sources.items() if source.epochs is not None]:
        problems.append(f"`mixing: aioli` learns the rates; leave out the epochs of {', '.join(limited)}")
    if aioli.focus * k <= 1:
        problems.append(f"`aioli.focus` must be above 1/{k}, the share of a source without a sweep")
    if (sweep := k * aioli.sweeps * aioli.steps) >= aioli.every:
        problems.append(
            f"`aioli.every`: a sweep over {k} sources takes {sweep} steps, and a round has {aioli.every}"
        )
    return problems


def _turning_points(rates: Sequence[float | Schedule | Stages]) -> list[float]:
    """Return the values of progress between which every rate is monotone, and their midpoints."""
    points = {0.0, 1.0}
    for rate in rates:
        if isinstance(rate, Schedule):
            points |= {rate.begin, rate.until}
        elif not isinstance(rate, int | float):
            points |= {start for start, _ in rate}
    ordered = sorted(points)
    return sorted({*ordered, *((a + b) / 2 for a, b in pairwise(ordered))})
