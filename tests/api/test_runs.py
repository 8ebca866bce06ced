"""Runs that are started from Python: with the real engine, from an event loop, from a thread, interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

import rft
from rft.api.callbacks import CallbackObserver
from rft.cli import main
from rft.config.metrics import TrackingConfig
from rft.metrics import RunLog
from rft.utils.quiet import ENVIRONMENT
from rft.utils.signals import StopRequests

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(8) for b in range(4)]
SMALL: dict[str, Any] = {
    "model": "tiny",
    "data": ROWS,
    "eval_data": ROWS[:4],
    "algorithm": rft.algorithms.GRPO(epsilon_high=0.28),
    "batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 12,
    "steps": 3,
    "eval": {"every": 2, "samples": 2, "greedy": False},
    "learner": {"threads": 1},
    "rollout": {"engine": "hf"},
    "tracking": {"trackers": []},
}


def short(limit: int) -> Any:
    def short_and_right(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [float(len(c) < limit) + (a in c) for c, a in zip(completions, answer, strict=True)]

    return short_and_right


class Follower(rft.Callback):
    """Records what happens, and stops the run after a step."""

    def __init__(self, stop_after: int = 0) -> None:
        self.stop_after = stop_after
        self.seen: list[tuple[str, Any]] = []

    def on_train_begin(self, run: rft.Run) -> None:
        self.seen.append(("begin", run.name))

    def on_step_end(self, run: rft.Run, metrics: Any) -> None:
        assert run.metrics[-1]["step"] == metrics["step"] and "train/loss" in metrics
        self.seen.append(("step", metrics["step"]))
        if metrics["step"] == self.stop_after:
            run.stop("enough")

    def on_evaluate(self, run: rft.Run, metrics: Any) -> None:
        assert 0 <= metrics["eval/accuracy"] <= 1
        self.seen.append(("evaluate", metrics["step"]))

    def on_save(self, run: rft.Run, path: Path) -> None:
        assert (path / "manifest.json").exists()
        self.seen.append(("save", path.name))

    def on_train_end(self, run: rft.Run) -> None:
        self.seen.append(("end", run.result is not None))


# The lines that a run writes in a program without a terminal.
LINE = re.compile(r"(x|dtype|learner|done|enough): |starting |step \d+/3 |stopped at step 2 ")


@pytest.mark.timeout(280)
def test_a_run_with_the_real_engine_is_stopped_and_resumed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also checks all that reaches the terminal, child processes included: no line of another library."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    here = {
        **SMALL,
        "rollout": {"engine": "vllm", "kv_cache_gib": 0.1},
        "output_dir": str(tmp_path),
        "name": "x",
    }
    follower = Follower(stop_after=2)
    run = rft.train(rewards=[short(6), {"function": "math", "weight": 0.5}], callbacks=[follower], **here)
    assert follower.seen == [
        *(("begin", "x"), ("evaluate", 0), ("step", 1), ("step", 2), ("evaluate", 2)),
        *(("save", "step-00000002"), ("end", False)),
    ]
    assert run.result is None and run.model_path is None and run.step == 2 and "stopped" in run.state
    out, err = capfd.readouterr()
    assert [line for line in (out + err).splitlines() if not LINE.match(line)] == []
    assert not set(ENVIRONMENT) & set(os.environ), "the program's environment is as before"
    with pytest.raises(RuntimeError, match="is not trained by this call"):
        run.stop()

    # The command line has no Python object; another one is refused by name.
    assert main(["train", str(tmp_path / "x" / "config.yaml")]) == 2
    said = capfd.readouterr().err
    assert "(short_and_right): it was passed from Python" in said
    assert 'rft.Run("RUN_FOLDER").resume(rewards=[short_and_right])' in said
    with pytest.raises(rft.ConfigError) as caught:
        run.resume(rewards=[short(7)])
    assert (
        "(short_and_right): the run was trained with another function of this name: limit was 6, now 7"
        in (str(caught.value))
    )
    with pytest.raises(rft.ConfigError, match="the run has no reward 'waits'"):
        run.resume(rewards=[{"function": short(6), "name": "waits"}])

    # The run goes on from another place, where its rows are found.
    moved = tmp_path / "elsewhere" / "x"
    moved.parent.mkdir()
    (tmp_path / "x").rename(moved)
    follower = Follower()
    run = rft.Run(moved).resume(rewards=[short(6)], callbacks=[follower])
    assert follower.seen == [
        *(("begin", "x"), ("step", 3), ("evaluate", 3), ("save", "step-00000003"), ("end", True)),
    ]
    assert run.result is not None and run.result["steps"] == 3 and "eval/accuracy" in run.result
    assert [row["step"] for row in run.metrics] == [0, 1, 2, 3] and run.state == "ended: done"
    frame = run.to_pandas()
    assert list(frame.index) == [0, 1, 2, 3] and frame["reward/short_and_right/mean"].notna().sum() == 3
    assert {row["split"] for row in run.samples} == {"train", "eval"}
    assert run.model_path is not None and run.checkpoint == moved / "checkpoints" / "step-00000003"
    assert run.report().stat().st_size > 10_000 and "<svg" in run._repr_html_() and "step 3/3" in repr(run)
    assert main(["train", str(moved / "config.yaml"), f"output_dir={moved.parent}"]) == 0  # complete
    measured = rft.evaluate(
        run.model_path,
        ROWS[:6],
        "math",
        output_dir=str(tmp_path / "evaluation"),
        max_completion_length=8,
        eval=SMALL["eval"],
        rollout=SMALL["rollout"],
    )
    assert measured["eval/problems"] == 6 and 0 <= measured["eval/accuracy"] <= 1
    assert not (tmp_path / "evaluation" / "run").exists()


def test_an_evaluation_that_a_resumed_run_makes_up_for_is_no_second_step(tmp_path: Path) -> None:
    tracking = TrackingConfig(trackers=())
    with RunLog(tmp_path, 4, tracking) as log:
        log.log(2, {"train/loss": 0.25})
    seen: list[tuple[str, Any]] = []

    class Sees(rft.Callback):
        def on_step_end(self, run: rft.Run, metrics: Any) -> None:
            seen.append(("step", dict(metrics)))

        def on_evaluate(self, run: rft.Run, metrics: Any) -> None:
            assert run.metrics[-1] == metrics, "the folder is complete when it is called"
            seen.append(("evaluate", dict(metrics)))

    observer = CallbackObserver([Sees()], tmp_path, StopRequests())
    with RunLog(tmp_path, 4, tracking, resumed_at=2, observers=[observer]) as log:
        log.log(2, {"eval/accuracy": 0.5})
        log.log(3, {"train/loss": 0.5})
    (kind, line), (last, _) = seen
    assert (kind, last) == ("evaluate", "step")
    assert (line["step"], line["train/loss"], line["eval/accuracy"]) == (2, 0.25, 0.5)


def contents(run: Path) -> dict[str, Any]:
    """What a run folder holds, without times and its own path: files, config, events, metrics and samples."""

    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / name).read_text().splitlines()]

    steps = rows("metrics.jsonl")
    timed = re.compile("time/|throughput/|seconds|/silence|rollout/(waiting|inflight)")
    return {
        "files": sorted(
            re.sub(r"tfevents.*", "tfevents", str(path.relative_to(run)))  # a time, a host and a process
            for path in run.rglob("*")
            if path.is_file()
        ),
        "config": (run / "config.yaml").read_text().replace(str(run.parent), "RUNS"),
        "events": [event["kind"] for event in rows("events.jsonl")],
        "keys": [list(row) for row in steps],
        "metrics": [{k: v for k, v in row.items() if not timed.search(k)} for row in steps],
        "samples": rows("samples.jsonl"),
    }


@pytest.mark.timeout(120)
def test_a_config_file_and_python_make_the_same_run_folder(tmp_path: Path, ray_here: None) -> None:
    sections = {
        "algorithm": {"name": "grpo", "epsilon_high": 0.28},
        "train": {"steps": 1, "batch_size": 4, "num_generations": 4},
        "rollout": {"engine": "hf", "threads": 1, "sampling": {"max_completion_length": 12}},
        "learner": {"threads": 1, "learning_rate": 1e-4},
        "eval": {"every": 1, "problems": 4, "samples": 1},
        "checkpoint": {"every": 1},
    }
    file = tmp_path / "config.yaml"
    raw = {"name": "x", "model": {"path": "tiny"}, "data": {"kind": "arithmetic", "limit": 64}, **sections}
    file.write_text(yaml.safe_dump({**raw, "rewards": ["math"], "output_dir": str(tmp_path / "file")}))
    assert main(["train", str(file)]) == 0
    run = rft.train(
        model="tiny",
        data={"kind": "arithmetic", "limit": 64},
        rewards="math",
        algorithm=rft.algorithms.GRPO(epsilon_high=0.28),
        steps=1,
        batch_size=4,
        num_generations=4,
        max_completion_length=12,
        learning_rate=1e-4,
        rollout={"engine": "hf", "threads": 1},
        learner={"threads": 1},
        eval={"every": 1, "problems": 4, "samples": 1},
        checkpoint={"every": 1},
        output_dir=str(tmp_path / "python"),
        name="x",
    )
    assert contents(run.path) == contents(tmp_path / "file" / "x")


class Fails(rft.Callback):
    def on_step_end(self, run: rft.Run, metrics: Any) -> None:
        raise ZeroDivisionError("half of it")


@pytest.mark.timeout(120)
async def test_in_a_running_event_loop_a_callback_that_raises_ends_the_run(
    tmp_path: Path, ray_here: None
) -> None:
    with pytest.raises(rft.CallbackError) as caught:  # this test itself runs in an event loop
        rft.train(rewards="math", callbacks=[Fails()], output_dir=str(tmp_path), **SMALL)
    assert (
        str(caught.value) == "the callback Fails.on_step_end raised ZeroDivisionError at step 1: half of it"
    )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    run = rft.Run(tmp_path / "run")
    assert run.checkpoint is not None and run.checkpoint.name == "step-00000001"
    assert run.state == f"ended: CallbackError: {caught.value}"


class Interrupts(rft.Callback):
    """Interrupts the program as Ctrl-C or a notebook's stop button does; then tries a second run."""

    second: Exception | None = None

    def on_step_end(self, run: rft.Run, metrics: Any) -> None:
        if metrics["step"] == 1:
            try:
                rft.train(rewards="math", output_dir=str(run.path.parent), name="second", **SMALL)
            except rft.ConfigError as error:
                self.second = error
            os.kill(os.getpid(), signal.SIGINT)
            assert run._stops is not None and run._stops.asked(within=10)


@pytest.mark.timeout(120)
def test_an_interrupt_saves_a_checkpoint_and_is_raised(tmp_path: Path, ray_here: None) -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts = Interrupts()
    try:
        with pytest.raises(KeyboardInterrupt, match="the run was stopped; "):
            rft.train(rewards="math", callbacks=[interrupts], output_dir=str(tmp_path), **SMALL)
    finally:
        signal.signal(signal.SIGINT, before)
    run = rft.Run(tmp_path / "run")
    assert run.step == 1 and run.checkpoint is not None and run.result is None
    assert "another run is active in this process" in str(interrupts.second)


@pytest.mark.timeout(120)
def test_a_run_in_a_thread_is_stopped_from_another_one(tmp_path: Path, ray_here: None) -> None:
    runs: list[rft.Run] = []
    begun: list[rft.Run] = []

    class Begins(rft.Callback):
        def on_train_begin(self, run: rft.Run) -> None:
            begun.append(run)

    settings = {**SMALL, "steps": 1000, "output_dir": str(tmp_path), "eval_data": None, "eval": {"every": 0}}
    thread = threading.Thread(
        target=lambda: runs.append(rft.train(rewards="math", callbacks=[Begins()], **settings))
    )
    thread.start()
    while thread.is_alive() and not (begun and begun[0].step >= 1):
        thread.join(0.1)
    begun[0].stop("seen enough")
    thread.join(60)
    assert runs and runs[0].result is None and 1 <= runs[0].step < 1000
    assert runs[0].events[-1]["kind"] == "run/closed" and runs[0].checkpoint is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "reason"), [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGINT, -2, "interrupted")]
)
def test_a_signal_to_a_script_saves_a_checkpoint(
    tmp_path: Path, number: signal.Signals, code: int, reason: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys, rft\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.api.test_runs import SMALL\n"
        "class Signals(rft.Callback):\n"
        "    def on_step_end(self, run, metrics):\n"
        "        if metrics['step'] == 1:\n"
        "            os.killpg(0, int(sys.argv[1]))\n"  # to Ray's processes and the engines, too
        "            assert run._stops.asked(within=10)\n"
        "rft.train(rewards='math', callbacks=[Signals()], output_dir=sys.argv[2], **SMALL)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(int(number)), str(tmp_path)],
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
    )
    assert done.returncode == code, done.stderr
    run = rft.Run(tmp_path / "run")
    assert run.step == 1 and run.checkpoint is not None and f"(reason: {reason})" in done.stderr
