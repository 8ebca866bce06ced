"""Config of what a run writes down and of the guards that watch it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rft.config.base import ConfigModel
from rft.utils.paths import PathText

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
Display = Literal["auto", "live", "plain", "off"]
Action = Literal["off", "warn", "stop"]


class TrackingConfig(ConfigModel):
    """Where metrics go beside `metrics.jsonl`, and how many completions are kept to read."""

    trackers: tuple[TrackerName, ...] = Field(
        ("tensorboard",), description="trackers to feed: tensorboard, wandb, mlflow; [] for none"
    )
    project: str = Field("rft", description="project (W&B) or experiment (MLflow) that the run belongs to")
    run_name: str | None = Field(None, description="name of the run in the trackers; none: the run folder's")
    wandb_mode: Literal["offline", "online"] = Field(
        "offline", description="W&B mode; offline writes into the run folder, to be sent with `wandb sync`"
    )
    mlflow_uri: PathText | None = Field(
        None, description="MLflow tracking URI; none: a file store in the run folder (RUN/mlflow)"
    )
    sample_every: int = Field(
        10, ge=1, description="steps between two writings of completions to samples.jsonl"
    )
    samples_kept: int = Field(
        8, ge=0, description="completions written each time, for training and for evaluation each; 0 for none"
    )
    display: Display = Field(
        "auto", description="terminal display: live, plain lines, off; auto: live on a terminal, else plain"
    )

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, value: tuple[TrackerName, ...]) -> tuple[TrackerName, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"each tracker can be named once, got {list(value)}")
        return value


class GuardsConfig(ConfigModel):
    """What to do when a run looks sick: nothing, a named warning with the number, or stop."""

    window: int = Field(20, ge=2, description="steps that a value is compared with")
    warmup: int = Field(10, ge=0, description="first steps in which no guard speaks")
    repeat_every: int = Field(20, ge=1, description="steps before the same guard speaks again")

    loss_spike: Action | None = Field(
        None,
        description="action when the loss jumps away from its recent values (none: warn in offline training; "
        "off online, where a policy gradient's loss is around zero by construction)",
    )
    loss_spike_sigmas: float = Field(
        8.0, gt=0, description="how many robust standard deviations above the recent median make a spike"
    )
    non_finite: Action = Field("stop", description="action when the loss or gradient norm is NaN or infinite")
    entropy_collapse: Action = Field("warn", description="action when the policy's entropy falls too low")
    entropy_floor: float = Field(0.005, ge=0, description="entropy (nats per token) below which it collapsed")
    entropy_drop: float = Field(
        0.9, gt=0, le=1, description="share of its first values that entropy may lose before it collapsed"
    )
    length_explosion: Action = Field("warn", description="action when completions grow much longer")
    length_factor: float = Field(
        3.0, gt=1, description="growth of the mean length over the run's first values that is an explosion"
    )
    duplicates: Action = Field("warn", description="action when completions repeat each other")
    duplicate_share: float = Field(
        0.5, gt=0, le=1, description="share of completions that repeat another one"
    )
    reward_hacking: Action = Field(
        "warn", description="action when the reward rises while held-out accuracy falls"
    )
    accuracy_drop: float = Field(
        0.05, gt=0, le=1, description="fall of held-out accuracy below its best that counts"
    )
    stale_engines: Action = Field("warn", description="action when an engine samples with too old a version")
    age_limit: int | None = Field(
        None, ge=0, description="oldest policy version allowed, in versions; none: the run's staleness"
    )
    engine_silence: float = Field(
        300.0, gt=0, description="seconds without a sign of life after which an engine is stale"
    )

    def action(self, guard: str, *, online: bool) -> Action:
        """What to do when a guard speaks: the user's word, else its default for this kind of training."""
        chosen: Action | None = getattr(self, guard)
        if chosen is None:
            return "off" if online else "warn"
        return chosen
