"""Config sections `tracking` and `guards`: experiment tracking and training-health checks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rft.config.base import ConfigModel
from rft.utils.paths import PathText

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
Display = Literal["auto", "live", "plain", "off"]
Action = Literal["off", "warn", "stop"]


class TrackingConfig(ConfigModel):
    """Experiment trackers (in addition to `metrics.jsonl`), logged completions and terminal display."""

    trackers: tuple[TrackerName, ...] = Field(
        ("tensorboard",), description="trackers to log to: tensorboard, wandb, mlflow; [] for none"
    )
    project: str = Field("rft", description="W&B project or MLflow experiment of the run")
    run_name: str | None = Field(
        None, description="name of the run in the trackers (none: name of the run folder)"
    )
    wandb_mode: Literal["offline", "online"] = Field(
        "offline", description="W&B mode; offline writes to the run folder, for upload with `wandb sync`"
    )
    mlflow_uri: PathText | None = Field(
        None, description="MLflow tracking URI (none: a file store in the run folder, RUN/mlflow)"
    )
    sample_every: int = Field(
        10, ge=1, description="interval, in steps, at which completions are logged to samples.jsonl"
    )
    samples_kept: int = Field(
        8, ge=0, description="completions logged each time, separately for training and evaluation; 0: none"
    )
    record_steps: int | None = Field(
        100,
        ge=0,
        description="steps whose record is kept, the newest ones: all rollouts that a step trained on, with "
        "which `rft replay` computes it again; 0: none, none: all",
    )
    record_gib: float = Field(
        4.0, gt=0, description="size of all records together in GiB, above which the oldest are removed"
    )
    display: Display = Field(
        "auto",
        description="terminal display: live, plain (lines), off, or auto: live on a terminal, else plain",
    )

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, value: tuple[TrackerName, ...]) -> tuple[TrackerName, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"each tracker can be named once, got {list(value)}")
        return value


class GuardsConfig(ConfigModel):
    """Guards against training failures; each takes no action, warns or stops the run."""

    window: int = Field(20, ge=2, description="number of recent steps that a value is compared with")
    warmup: int = Field(10, ge=0, description="initial steps during which guards are inactive")
    repeat_every: int = Field(20, ge=1, description="minimum steps between warnings of the same guard")

    loss_spike: Action | None = Field(
        None,
        description="action on a loss spike (none: warn in offline training; off in online training, where "
        "the loss of a policy gradient is near zero by construction)",
    )
    loss_spike_sigmas: float = Field(
        8.0, gt=0, description="spike threshold, in robust standard deviations above the recent median loss"
    )
    non_finite: Action = Field("stop", description="action on a NaN or infinite loss or gradient norm")
    entropy_collapse: Action = Field("warn", description="action on a collapse of the policy's entropy")
    entropy_floor: float = Field(
        0.005, ge=0, description="entropy, in nats per token, that counts as collapse"
    )
    entropy_drop: float = Field(
        0.9,
        gt=0,
        le=1,
        description="relative drop of entropy from its initial values that counts as collapse",
    )
    length_explosion: Action = Field("warn", description="action when completion length explodes")
    length_factor: float = Field(
        3.0, gt=1, description="ratio of the mean length to its initial values that counts as an explosion"
    )
    duplicates: Action = Field("warn", description="action when too many completions are duplicates")
    duplicate_share: float = Field(
        0.5, gt=0, le=1, description="fraction of duplicate completions that triggers the guard"
    )
    reward_hacking: Action = Field(
        "warn", description="action when the reward rises while held-out accuracy falls"
    )
    accuracy_drop: float = Field(
        0.05, gt=0, le=1, description="drop of held-out accuracy below its best that triggers the guard"
    )
    stale_engines: Action = Field(
        "warn", description="action when an engine samples from an outdated policy version"
    )
    age_limit: int | None = Field(
        None, ge=0, description="policy versions that an engine may lag behind (none: the run's staleness)"
    )
    engine_silence: float = Field(
        300.0, gt=0, description="seconds without a response after which an engine counts as stale"
    )

    def action(self, guard: str, *, online: bool) -> Action:
        """Return the configured action of a guard, or its default for online or offline training."""
        chosen: Action | None = getattr(self, guard)
        if chosen is None:
            return "off" if online else "warn"
        return chosen
