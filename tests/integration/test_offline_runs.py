"""Offline runs with the real actors: sampled evaluation in the log and the report, a warm start cut short."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from rft.config.load import parse_config
from rft.loops.offline import RunStopped
from rft.loops.warm_start import warm_start
from rft.metrics import Progress, RunLog
from rft.metrics.names import is_documented
from rft.plan import Plan, make_plan
from rft.preflight.data import warm_start_folder
from rft.report.report import write_report
from rft.run_dir import RunFolder
from rft.run_training import _offline, start_learner


def plan_of(tiny_folder: Path, where: Path, **changes: Any) -> Plan:
    raw: dict[str, Any] = {
        "output_dir": str(where),
        "algorithm": "dpo",
        "model": {"path": str(tiny_folder)},
        "data": {"kind": "arithmetic_pairs", "limit": 64},
        "train": {"steps": 4, "batch_size": 8},
        "rollout": {"engine": "hf", "sampling": {"max_completion_length": 6}, "threads": 1},
        "learner": {"learning_rate": 1e-3, "threads": 1},
        "tracking": {"display": "off"},
    }
    return make_plan(parse_config({**raw, **changes}))


@pytest.mark.timeout(300)
def test_an_offline_run_samples_its_evaluation_and_tells_it(
    ray_here: None, tiny_folder: Path, tmp_path: Path
) -> None:
    plan = plan_of(
        tiny_folder,
        tmp_path,
        rewards={"functions": [{"function": "math"}], "workers": 1},
        eval={"every": 2, "problems": 4, "samples": 1, "generate": True},
    )
    folder = RunFolder(tmp_path / "run", None)
    folder.path.mkdir()

    async def run() -> dict[str, Any]:
        log = RunLog(folder.path, 4, plan.config.tracking, config=plan.config.to_dict())
        with Progress(4, "test", display="off") as progress:
            try:
                return await _offline(plan, folder, progress, log, asyncio.Event())
            finally:
                log.close("done")

    result = asyncio.run(run())
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    for name in ("eval/accuracy", "eval/preference_accuracy", "eval/loss", "eval/greedy_accuracy"):
        assert [line["step"] for line in lines if name in line] == [0, 2, 4], name
        assert name in result
    assert not {name for line in lines for name in line if not is_documented(name)}
    assert (folder.path / "model" / "config.json").exists()
    samples = (folder.path / "samples.jsonl").read_text()
    assert '"split": "eval"' in samples
    page = write_report(folder.path).read_text()
    for title in (
        "Held-out examples",
        "Held-out preferences",
        "Held-out reward margins",
        "Held-out accuracy",
    ):
        assert title in page
    assert "preference accuracy" in page


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_warm_start_stops_on_request_and_goes_on(ray_here: None, tiny_folder: Path, tmp_path: Path) -> None:
    stage = {"steps": 12, "batch_size": 8, "cache": str(tmp_path / "cache"), "data": {"limit": 64}}
    plan = plan_of(tiny_folder, tmp_path, warm_start={**stage, "learner": {"threads": 1}}, eval={"every": 0})
    whole = asyncio.run(_warm(plan, tmp_path / "whole", asyncio.Event()))
    expected = (Path(whole) / "model.safetensors").read_bytes()
    folder = warm_start_folder(plan.config, plan.config.warm_start, plan.model)
    folder.rename(tmp_path / "kept")

    stop = asyncio.Event()
    with pytest.raises(RunStopped, match="stopped at step 5 of the warm start"):
        asyncio.run(_warm(plan, tmp_path / "cut", stop, stop_after=5))
    assert not folder.exists()
    assert [p.name for p in (tmp_path / "cut" / "warm-start").glob("step-*")] == ["step-00000005"]
    again = asyncio.run(_warm(plan, tmp_path / "cut", asyncio.Event()))
    assert (Path(again) / "model.safetensors").read_bytes() == expected
    assert not (tmp_path / "cut" / "warm-start").exists()


async def _warm(plan: Plan, run: Path, stop: asyncio.Event, stop_after: int | None = None) -> str:
    """A warm start with real actors; asks for a stop once its loop has told `stop_after`."""
    handles: list[Any] = []

    class Watched:
        """A learner's handle that counts the steps it was asked for."""

        def __init__(self, handle: Any) -> None:
            self.handle, self.steps = handle, 0

        def __getattr__(self, name: str) -> Any:
            if name == "step":
                self.steps += 1
                if self.steps == stop_after:
                    stop.set()
            return getattr(self.handle, name)

    def start(spec: Any) -> Any:
        handles.append(start_learner(plan, spec))
        return Watched(handles[-1]) if stop_after else handles[-1]

    with Progress(1, "test", display="off") as progress:
        return await warm_start(plan, plan.config.warm_start, start, progress, run, stop)
