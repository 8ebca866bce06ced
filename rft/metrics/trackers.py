"""TensorBoard, Weights & Biases and MLflow behind one small interface; each package is optional."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from rft.config.metrics import TrackerName, TrackingConfig


class TrackerMissing(ImportError):
    """A tracker that the config names is not installed."""


class Tracker(Protocol):
    """A destination for metrics. `log` gets finite numbers only."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


# Tracker -> modules that implement it; the first installed one is used.
MODULES: dict[TrackerName, tuple[str, ...]] = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


def import_module(tracker: TrackerName) -> ModuleType:
    """Import a tracker's module. Raises TrackerMissing, which names the package to install."""
    reasons = []
    for module in MODULES[tracker]:
        try:
            return importlib.import_module(module)
        except ImportError as error:
            reasons.append(f"{module}: {error}")
    raise TrackerMissing(
        f"tracking.trackers names {tracker!r}, which is not installed ({'; '.join(reasons)}). "
        f"Install it with `pip install 'rft[{tracker}]'`, or remove it from tracking.trackers."
    )


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names: {"a": {"b": 1}} -> {"a.b": 1}."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out.update(flatten(value, f"{name}."))
        else:
            out[name] = value
    return out


class TensorBoard:
    """Event files in RUN/tensorboard. After a resume, TensorBoard hides the points after the resumed step."""

    def __init__(
        self, tracking: TrackingConfig, run_dir: Path, resumed_at: int | None, config: Mapping[str, Any]
    ) -> None:
        module = import_module("tensorboard")
        purge = None if resumed_at is None else resumed_at + 1
        self._writer = module.SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        if config and resumed_at is None:
            rows = "\n".join(f"| {k} | `{v}` |" for k, v in flatten(config).items())
            self._writer.add_text("config", f"| setting | value |\n|---|---|\n{rows}", 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run; offline (the default) it is written to RUN/wandb until `wandb sync` uploads it."""

    def __init__(
        self, tracking: TrackingConfig, run_dir: Path, resumed_at: int | None, config: Mapping[str, Any]
    ) -> None:
        module = import_module("wandb")
        identity = run_dir / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4), encoding="utf-8")
        self._run = module.init(
            project=tracking.project,
            name=tracking.run_name or run_dir.name,
            id=identity.read_text(encoding="utf-8").strip(),
            dir=str(run_dir),
            mode=tracking.wandb_mode,
            config=dict(config),
            resume="allow" if resumed_at is not None and tracking.wandb_mode == "online" else None,
            settings=module.Settings(console="off", silent=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """An MLflow run in a file store in RUN/mlflow, or at `tracking.mlflow_uri`."""

    def __init__(
        self, tracking: TrackingConfig, run_dir: Path, resumed_at: int | None, config: Mapping[str, Any]
    ) -> None:
        module = import_module("mlflow")
        uri = tracking.mlflow_uri
        if uri is None:
            uri = (run_dir / "mlflow").resolve().as_uri()
            # MLflow 3 needs an explicit file store; one run does not need a database.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = module.tracking.MlflowClient(tracking_uri=uri)
        identity = run_dir / "mlflow_id"
        if resumed_at is not None and identity.exists():
            self._id = identity.read_text(encoding="utf-8").strip()
            self._client.update_run(self._id, status="RUNNING")
            return
        existing = self._client.get_experiment_by_name(tracking.project)
        experiment = existing.experiment_id if existing else self._client.create_experiment(tracking.project)
        run = self._client.create_run(experiment, run_name=tracking.run_name or run_dir.name)
        self._id = run.info.run_id
        identity.write_text(self._id, encoding="utf-8")
        for name, value in flatten(config).items():
            self._client.log_param(self._id, name, str(value)[:6000])  # MLflow's limit

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            # MLflow allows no `@` in a name.
            self._client.log_metric(self._id, name.replace("@", "_at_"), float(value), step=step)

    def close(self) -> None:
        self._client.set_terminated(self._id)


_TRACKERS: dict[TrackerName, Callable[[TrackingConfig, Path, int | None, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def open_trackers(
    tracking: TrackingConfig, run_dir: Path, *, resumed_at: int | None, config: Mapping[str, Any]
) -> list[Tracker]:
    """The trackers that the config names, opened; all or, with TrackerMissing, none."""
    for name in tracking.trackers:
        import_module(name)
    return [_TRACKERS[name](tracking, run_dir, resumed_at, config) for name in tracking.trackers]
