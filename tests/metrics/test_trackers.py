"""Trackers, read back by their own readers."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from rft.config.metrics import TrackerName, TrackingConfig
from rft.metrics import RunLog
from rft.metrics.trackers import TrackerMissing, flatten

CONFIG = {"algorithm": {"name": "grpo", "epsilon": 0.2}, "seed": 1}


def record(
    run: Path, tracker: TrackerName, first: int = 0, last: int = 4, resumed_at: int | None = None
) -> None:
    tracking = TrackingConfig(trackers=(tracker,), project="tests", run_name="one")
    with RunLog(run, 9, tracking, resumed_at=resumed_at, config=CONFIG) as log:
        for step in range(first, last + 1):
            values = {"reward/mean": step / 10, "eval/pass@2": 0.5, "train/loss": float("nan")}
            log.log(step, values)


def test_tensorboard(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record(tmp_path, "tensorboard")
    record(tmp_path, "tensorboard", 3, 5, resumed_at=2)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = [(e.step, round(e.value, 3)) for e in events.Scalars("reward/mean")]
    assert scalars == [(i, i / 10) for i in range(6)]  # steps 3 and 4 of the dead process are purged
    assert "train/loss" not in events.Tags()["scalars"]
    assert "config/text_summary" in events.Tags()["tensors"]


def test_wandb_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    record(tmp_path, "wandb")
    (stored,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    identity = (tmp_path / "wandb_id").read_text()
    assert identity in stored.name
    wanted = (b"reward/mean", b"eval/pass@2", b"epsilon")
    until = time.monotonic() + 20  # W&B's own process writes the file, shortly after the run is finished
    while not all(name in stored.read_bytes() for name in wanted):
        assert time.monotonic() < until, "W&B did not write the run"
        time.sleep(0.1)
    record(tmp_path, "wandb", 3, 5, resumed_at=2)
    assert (tmp_path / "wandb_id").read_text() == identity
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))) == 2


def test_mlflow_local_store(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow.tracking import MlflowClient

    record(tmp_path, "mlflow")
    record(tmp_path, "mlflow", 5, 6, resumed_at=4)
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").resolve().as_uri())
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "one"
    assert run.data.params["algorithm.epsilon"] == "0.2"
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert [(m.step, m.value) for m in history] == [(i, i / 10) for i in range(7)]
    assert run.data.metrics["eval/pass_at_2"] == 0.5


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_missing_tracker_is_named_before_anything_is_written(
    tracker: TrackerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, tracker, None)  # an import of it then raises ImportError
    tracking = TrackingConfig(trackers=("tensorboard", tracker))
    with pytest.raises(TrackerMissing, match=rf"pip install 'rft\[{tracker}\]'"):
        RunLog(tmp_path, 9, tracking)
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_can_be_named_once_only() -> None:
    with pytest.raises(ValueError, match="named once"):
        TrackingConfig(trackers=("wandb", "wandb"))


def test_settings_as_dotted_names() -> None:
    assert flatten(CONFIG) == {"algorithm.name": "grpo", "algorithm.epsilon": 0.2, "seed": 1}
