"""Config section `rewards`: reward functions, their combination and error handling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from rft.config.base import ConfigModel
from rft.utils import objects
from rft.utils.paths import PathText, expand

PASSED = "python:"
"""Prefix of a reward that a Python program passed as an object."""

DIRECTION = "direction"
"""Column with the preference direction of a row."""


class MaxFraction(ConfigModel):
    """Error policy that drops failed samples up to a fraction of all scored samples."""

    max_fraction: float = Field(description="maximum fraction of failed samples over the run", gt=0, lt=1)


SLOW = ("judge", "local_judge", "reward_model", "pairwise_model", "process_reward_model", "process")
"""Slow built-in rewards that score whole batches."""

_PATH_OPTIONS = {"model", "tokenizer", "cache", "readable"}

ErrorPolicy = Literal["stop", "drop"] | MaxFraction


class Schedule(ConfigModel):
    """Schedule from `start` to `end` between progress `begin` and `until`."""

    start: float = Field(description="value until progress `begin`")
    end: float = Field(description="value after progress `until`")
    begin: float = Field(0.0, description="progress (0 to 1) at which the schedule starts", ge=0, le=1)
    until: float = Field(1.0, description="progress (0 to 1) at which the schedule ends", ge=0, le=1)
    shape: Literal["linear", "cosine", "step"] = Field(
        "linear", description="interpolation; step: jump at `until`"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Schedule:
        if self.begin > self.until:
            raise ValueError(f"begin ({self.begin}) must not be greater than until ({self.until})")
        return self

    def at(self, progress: float) -> float:
        """Return the value at `progress`, 0 at the start of the run and 1 at its end."""
        span = self.until - self.begin
        done = 1.0 if progress >= self.until else max(0.0, (progress - self.begin) / span)
        if self.shape == "step":
            done = float(done >= 1)
        elif self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


class ActorConfig(ConfigModel):
    """Ray actor for a reward function, e.g. on a GPU."""

    num_cpus: float = Field(1.0, description="CPUs reserved by Ray", ge=0)
    num_gpus: float = Field(0.0, description="GPUs reserved by Ray", ge=0)


class PassedReward(ConfigModel):
    """Content of an object that was passed from Python, by which a resumed run recognises it."""

    sha256: str = Field(description="hash of the source and of the values that it uses")
    source: str = Field("", description="source of the function, or of the instance's class")
    values: dict[str, str] = Field({}, description="values that it uses: defaults, closure, globals")


def pass_object(what: str, target: Any, workers: str) -> tuple[str, PassedReward, bytes]:
    """Return the name, the identity and the pickle of an object for worker processes. Raises ValueError.

    what: its kind, named in errors (a reward, a tool). workers: where it is sent.
    """
    identity = objects.identify(target)
    try:
        payload = objects.pickled(target)
    except objects.NotPicklable as error:
        raise ValueError(
            f"{what} {identity.name} cannot be sent to {workers}, which are processes: it cannot be pickled: "
            f"{error}. Create objects that cannot be pickled (a lock, a connection, an open file) inside the "
            f"function, or write {what} into a file: file.py:{identity.name}"
        ) from None
    passed = PassedReward(sha256=identity.sha256, source=identity.source, values=identity.values)
    return f"{PASSED}{identity.name}", passed, payload


ENVIRONMENT = "environment"
"""The name of an environment's reward among the scores of a completion."""


class RewardConfig(ConfigModel):
    """Reward function and its execution."""

    function: PathText = Field(
        description="name of a built-in (e.g. `math`), `file.py:function` or `package.module:function`; from "
        "Python also the function itself"
    )
    passed: PassedReward | None = Field(
        None, description="written by rft for a function that was passed from Python: not set by hand"
    )
    name: str | None = Field(None, description="name in metrics (none: the function's name)")
    weight: float | Schedule = Field(1.0, description="weight in the sum, or a schedule of it")
    gate: bool = Field(False, description="gate: if it does not pass, the combined reward is `gate_value`")
    threshold: float = Field(0.5, description="minimum value at which a gate passes")
    timeout_s: float | None = Field(
        None,
        description="timeout of one call, in seconds, after which its process is killed (none: 30; judges "
        "and models: 600)",
        gt=0,
    )
    batch_size: int | None = Field(
        None, description="maximum samples per call (none: split evenly among workers)", ge=1
    )
    workers: int | None = Field(
        None, description="dedicated worker processes (none: shared pool; judges and models: 1)", ge=1
    )
    actor: ActorConfig | None = Field(None, description="run in a Ray actor instead of worker processes")
    columns: dict[str, str] = Field(
        {}, description="mapping from parameter names to dataset columns, if they differ"
    )
    options: dict[str, Any] = Field({}, description="options passed to the function")

    _payload: bytes | None = PrivateAttr(None)

    @model_validator(mode="wrap")
    @classmethod
    def _from_object(cls, value: Any, handler: ModelWrapValidatorHandler[RewardConfig]) -> RewardConfig:
        """Accept a name or a function in place of the section; pickle a function for the reward workers."""
        if isinstance(value, str) or (callable(value) and not isinstance(value, ConfigModel)):
            value = {"function": value}
        target = value.get("function") if isinstance(value, Mapping) else None
        if not callable(target):
            return handler(value)
        name, passed, payload = pass_object("the reward", target, "the reward workers")
        made = handler({**value, "function": name, "passed": passed})
        made._payload = payload
        return made

    @model_validator(mode="after")
    def _known_object(self) -> RewardConfig:
        if self.function.startswith(PASSED) and self.passed is None:
            raise ValueError(
                f"function: {self.function} refers to an object passed from Python; in a config "
                "file write `file.py:function` or `package.module:function`"
            )
        return self

    @property
    def payload(self) -> bytes | None:
        """Return the pickle of a passed object; None for other rewards, and in a config that was read."""
        return self._payload

    def with_payload(self, payload: bytes | None) -> RewardConfig:
        """Return a copy with the pickle of the passed object."""
        copy = self.model_copy()
        copy._payload = payload
        return copy

    @model_validator(mode="after")
    def _expanded(self) -> RewardConfig:
        """Expand path options of built-ins; options of custom functions are left unchanged."""
        if ":" not in self.function:
            for name in _PATH_OPTIONS & self.options.keys():
                value = self.options[name]
                if isinstance(value, str):
                    self.options[name] = expand(value)
                elif isinstance(value, list):
                    self.options[name] = [expand(str(path)) for path in value]
        return self

    @property
    def own_workers(self) -> int | None:
        """Return the number of dedicated workers; None: shared pool. Judges and models default to 1."""
        return 1 if self.workers is None and self.function in SLOW else self.workers

    @property
    def call_timeout_s(self) -> float:
        """Return `timeout_s`, or its default for the kind of reward."""
        return self.timeout_s or (600.0 if self.function in SLOW else 30.0)

    @property
    def label(self) -> str:
        """Return the name used in metrics and messages."""
        return self.name or self.function.rpartition(":")[2]


class RewardsConfig(ConfigModel):
    """Reward functions, worker processes and combination."""

    functions: list[RewardConfig] = Field([], description="reward functions")
    combine: Literal["sum", "product", "min", "vector", "gdpo"] = Field(
        "sum",
        description="combination: sum (of weight * value), product or min (of the values), vector (dot "
        "product of `direction` and the values, DPA), gdpo (sum of weight * group-normalised value)",
    )
    direction: list[float] | Literal["row"] | None = Field(
        None,
        description="preference direction of `vector`, one number per function; row: that of each row, its "
        "column `direction` (`data.directions`)",
    )
    gate_value: float = Field(0.0, description="combined reward if a gate does not pass")
    clip: tuple[float, float] | None = Field(None, description="lower and upper bound of the combined reward")
    workers: int = Field(2, description="number of worker processes in the shared pool", ge=1)
    recycle_after: int = Field(20_000, description="scored samples after which a worker is replaced", ge=1)
    worker_memory_gib: float | None = Field(
        8.0,
        description="memory limit of a worker process, in GiB, above which it is replaced (none: no limit); "
        "not applied to judges and models",
        gt=0,
    )
    start_timeout_s: float = Field(
        120.0, description="timeout of a worker's start, in seconds, including loading its rewards", gt=0
    )
    on_error: ErrorPolicy = Field(
        "stop", description="policy on a failed call: stop, drop or {max_fraction: f}"
    )
    max_errors: int = Field(0, description="errors dropped before `on_error` applies", ge=0)
    on_timeout: ErrorPolicy = Field(
        MaxFraction(max_fraction=0.1),
        description="policy on a timed-out call: stop, drop or {max_fraction: f}",
    )
    max_timeouts: int = Field(16, description="timeouts dropped before `on_timeout` applies", ge=0)

    @property
    def primary(self) -> str:
        """Return the name of the score that decides whether a completion is correct."""
        return self.functions[0].label if self.functions else ENVIRONMENT

    @model_validator(mode="after")
    def _coherent(self) -> RewardsConfig:
        labels = [f.label for f in self.functions]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two rewards are called {twice[0]!r}: set a different `name` for each")
        if self.combine == "vector":
            wrong = self.direction != "row" and len(self.direction or ()) != len(self.functions)
            if self.direction is None or wrong:
                raise ValueError("combine: vector needs `direction`, one number for each reward function")
            if not any(self.direction):
                raise ValueError("`direction` must not be all zeros")
        elif self.direction is not None:
            raise ValueError("`direction` is only used by combine: vector")
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip: the lowest ({self.clip[0]}) must be below the highest ({self.clip[1]})")
        if self.functions and all(f.gate for f in self.functions):
            raise ValueError("all rewards are gates: at least one must give the value")
        return self


def list_as_functions(rewards: Any) -> Any:
    """Expand a list of reward functions to a `rewards` section; return anything else unchanged."""
    return {"functions": list(rewards)} if isinstance(rewards, list | tuple) else rewards
