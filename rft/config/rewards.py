"""The config of rewards: which functions, how they are combined, and what happens when one fails."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rft.config.base import ConfigModel
from rft.utils.paths import PathText, expand


class MaxFraction(ConfigModel):
    """Failures are dropped until they exceed a fraction of what was scored."""

    max_fraction: float = Field(description="highest fraction of failed samples over the run", gt=0, lt=1)


SLOW = ("judge", "local_judge", "reward_model", "pairwise_model", "process_reward_model", "process")
"""Built-ins that take whole batches and long."""

_PATH_OPTIONS = {"model", "tokenizer", "cache", "readable"}

ErrorPolicy = Literal["stop", "drop"] | MaxFraction


class Schedule(ConfigModel):
    """A number that moves from `start` to `end` while the run's progress goes from `begin` to `until`."""

    start: float = Field(description="value up to progress `begin`")
    end: float = Field(description="value from progress `until` on")
    begin: float = Field(0.0, description="progress (0 to 1) at which it begins to move", ge=0, le=1)
    until: float = Field(1.0, description="progress (0 to 1) at which it arrives", ge=0, le=1)
    shape: Literal["linear", "cosine", "step"] = Field(
        "linear", description="how it moves; step jumps at `until`"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Schedule:
        if self.begin > self.until:
            raise ValueError(f"begin ({self.begin}) must not be greater than until ({self.until})")
        return self


class ActorConfig(ConfigModel):
    """A Ray actor of the reward's own, for example on a GPU."""

    num_cpus: float = Field(1.0, description="CPUs that Ray reserves for it", ge=0)
    num_gpus: float = Field(0.0, description="GPUs that Ray reserves for it", ge=0)


class RewardConfig(ConfigModel):
    """One reward function."""

    function: PathText = Field(
        description="built-in name (`math`), `file.py:function` or `package.module:function`"
    )
    name: str | None = Field(None, description="its name in metrics; by default the function's name")
    weight: float | Schedule = Field(1.0, description="factor in the sum, or a schedule of it")
    gate: bool = Field(False, description="the combined reward is `gate_value` unless this one passes")
    threshold: float = Field(0.5, description="a gate passes where its value is at least this")
    timeout_s: float | None = Field(
        None, description="seconds for one call, then its process is killed; 30, judges and models 600", gt=0
    )
    batch_size: int | None = Field(None, description="most samples per call; by default an even share", ge=1)
    workers: int | None = Field(None, description="processes of its own; by default it shares the pool", ge=1)
    actor: ActorConfig | None = Field(None, description="run in a Ray actor instead of a worker process")
    columns: dict[str, str] = Field({}, description="parameter name -> dataset column, where they differ")
    options: dict[str, Any] = Field({}, description="the function's own options")

    @model_validator(mode="after")
    def _expanded(self) -> RewardConfig:
        """Expand the built-ins' options that are paths; a user's own function gets its options as given."""
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
        """The size of its own pool; None: it shares. Judges and models get a process of their own."""
        return 1 if self.workers is None and self.function in SLOW else self.workers

    @property
    def call_timeout_s(self) -> float:
        """`timeout_s`, or the default of its kind."""
        return self.timeout_s or (600.0 if self.function in SLOW else 30.0)

    @property
    def label(self) -> str:
        """The name in metrics and messages."""
        return self.name or self.function.rpartition(":")[2]


class RewardsConfig(ConfigModel):
    """All reward functions of a run, their worker processes and their combination."""

    functions: list[RewardConfig] = Field([], description="the reward functions")
    combine: Literal["sum", "product", "min", "vector", "gdpo"] = Field(
        "sum",
        description="sum: of weight * value; product and min: of the values; vector: direction . values "
        "(DPA); gdpo: sum of weight * value normalised over the group",
    )
    direction: list[float] | None = Field(
        None, description="preference direction of `vector`, one per function"
    )
    gate_value: float = Field(0.0, description="combined reward where a gate does not pass")
    clip: tuple[float, float] | None = Field(None, description="lowest and highest combined reward")
    workers: int = Field(2, description="worker processes of the shared pool", ge=1)
    recycle_after: int = Field(20_000, description="a worker is replaced after this many judgements", ge=1)
    worker_memory_gib: float | None = Field(
        8.0,
        description="memory that a worker process may hold, in GiB, before it is replaced (none: no limit; "
        "judges and models have none)",
        gt=0,
    )
    start_timeout_s: float = Field(
        120.0, description="seconds for a worker to start and load its rewards", gt=0
    )
    on_error: ErrorPolicy = Field("stop", description="stop | drop | {max_fraction: f}: when a call fails")
    max_errors: int = Field(0, description="errors that are dropped before `stop` or the fraction acts", ge=0)
    on_timeout: ErrorPolicy = Field(
        MaxFraction(max_fraction=0.1), description="stop | drop | {max_fraction: f}: when a call hangs"
    )
    max_timeouts: int = Field(16, description="timeouts that are dropped before `on_timeout` acts", ge=0)

    @model_validator(mode="after")
    def _coherent(self) -> RewardsConfig:
        labels = [f.label for f in self.functions]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two rewards are called {twice[0]!r}: give each its own `name`")
        if self.combine == "vector":
            if self.direction is None or len(self.direction) != len(self.functions):
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
