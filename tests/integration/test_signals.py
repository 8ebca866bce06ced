"""Stop signals: which signal, sent to whom, at which moment. Every run ends with code 75, keeps what it has
reached, says why it ended, and leaves no process behind.

The whole matrix is slow: `pytest -m slow tests/integration/test_signals.py` writes its table to the file that
RFT_SIGNAL_TABLE names. A few cells are part of the default run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rft import checkpoint
from rft.metrics.log import read_jsonl
from tests.integration.conftest import ENV, ROOT, pids_of, processes_of

SLOW_STEP = 150  # passes over the batch: a step of several seconds on one core
REWARD = '''
import os, time
def score(prompts, completions, seconds=0, **columns):
    """Digits pay."""
    open(os.path.join(os.path.dirname(__file__), "judging"), "a").close()
    time.sleep(seconds)
    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]
'''
CASES = {kind: ROOT / "tests" / "cases" / f"signal_{kind}.yaml" for kind in ("online", "offline")}
BASE: dict[str, Any] = {
    "name": "run",
    "model": {"options": {"hidden_size": 64, "layers": 2, "heads": 2}},
    "learner": {"learning_rate": 1e-5},
    "tracking": {"trackers": []},
}


@dataclass
class Run:
    """A training run in `folder`/runs/run, in a session as its own, as a job scheduler starts it."""

    folder: Path
    changes: dict[str, Any]
    arguments: tuple[str, ...]

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "digits.py").write_text(REWARD)
        (self.folder / "run.yaml").write_text(yaml.safe_dump(self.changes))
        self.err = (self.folder / "stderr").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rft.cli", *self._command()],
            cwd=ROOT,
            env={**ENV, "RFT_TEST_MARK": self.folder.name},
            stdout=subprocess.DEVNULL,
            stderr=self.err,
            start_new_session=True,
        )

    def _command(self) -> list[str]:
        command, *options = self.arguments
        return [command, str(self.folder / "run.yaml"), f"output_dir={self.folder}/runs", *options]

    @property
    def path(self) -> Path:
        return self.folder / "runs" / "run"

    def told(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_jsonl(self.path / "events.jsonl") if e["kind"] == kind]

    def steps(self) -> int:
        return max((row["step"] for row in read_jsonl(self.path / "metrics.jsonl")), default=-1)

    def wait(self, what: str, ready: Callable[[], Any], seconds: float = 240, pause: float = 0.05) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert self.process.poll() is None, f"ended before: {what}\n{self.told()[-3000:]}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.told()[-3000:]}"
            time.sleep(pause)

    def listens(self) -> bool:
        """Whether the process has blocked SIGTERM: its thread waits for it."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        mask = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
        return bool(mask & 1 << (signal.SIGTERM - 1))

    def busy(self, *calls: str) -> bool:
        """Whether an actor is in one of these calls: Ray names its process after it."""
        for pid in pids_of(self.mark):
            try:
                if " ".join(psutil.Process(pid).cmdline()).startswith(calls):
                    return True
            except psutil.NoSuchProcess:
                continue
        return False

    def send(self, number: signal.Signals, target: str) -> None:
        if target == "process":
            self.process.send_signal(number)
        elif target == "group":
            os.killpg(self.process.pid, number)
        else:  # a job step: every process, whatever its group or session
            for pid in pids_of(self.mark):
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue

    @property
    def mark(self) -> str:
        return f"RFT_TEST_MARK={self.folder.name}"

    def end(self, seconds: float = 180) -> int:
        return self.process.wait(seconds)

    def left_behind(self) -> list[str]:
        deadline = time.monotonic() + 10
        while (left := processes_of(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def clean_up(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.err.close()
        for pid in pids_of(self.mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def assert_stopped(self, number: signal.Signals) -> str:
        """What every stopped run owes; returns what it kept, for the table."""
        code, told = self.end(), self.told()
        assert self.left_behind() == [], told[-3000:]
        assert "Traceback" not in told, told[-4000:]
        if code == 0:  # the last model was written before the signal came
            assert (self.path / "result.json").exists()
            return "complete (0)"
        assert code == 75, f"{code}\n{told[-3000:]}"
        assert number.name in told
        saved = checkpoint.newest_step(self.path / "checkpoints")
        if (self.path / "events.jsonl").exists():
            stopped = self.events("run/stopped")[-1]
            assert number.name in stopped["signal"]
            assert stopped["saved"] == saved or "warm start" in told
            assert self.events("run/closed")[-1]["reason"] == "stopped"
        if saved is not None:
            assert saved == self.steps() and f"stopped at step {saved} with a checkpoint saved" in told
            return f"step {saved}"
        stage = checkpoint.newest_step(self.path / "warm-start")
        if stage is not None:
            assert f"stopped at step {stage} of the warm start with a checkpoint saved" in told
            return f"warm start, step {stage}"
        assert "nothing was saved" in told and "with a checkpoint saved" not in told
        assert self.steps() <= 0
        return "nothing"


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts laid over each other."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return result


@dataclass(frozen=True)
class Moment:
    """When to send the signal: what the config must be like, and how to see that it is time."""

    ready: Callable[[Run], Any]
    changes: dict[str, Any] = field(default_factory=dict)
    pause: float = 0.05


def stage(text: str) -> Callable[[Run], bool]:
    return lambda run: text in run.told()


WARM = {"warm_start": {"steps": 100_000, "batch_size": 8, "learner": {"threads": 1}}}
EVAL = {"eval": {"every": 1, "problems": 4000, "samples": 4}, "data": {"limit": 5000}}
EXPORT = {"train": {"steps": 2}, "model": {"options": {"hidden_size": 512, "layers": 8, "heads": 8}}}
MOMENTS: dict[str, dict[str, Moment]] = {
    "online": {
        "imports": Moment(lambda run: run.listens(), pause=0.001),
        "Ray starts": Moment(stage("starting Ray")),
        "engines start": Moment(stage("starting 1 x")),
        "warm start": Moment(stage("/100000 · loss"), {**WARM, "tracking": {"display": "plain"}}),
        "evaluation": Moment(lambda run: run.events("engine/started"), EVAL),
        "reward": Moment(
            lambda run: (run.folder / "judging").exists(),
            {"rewards": [{"function": "digits.py:score", "options": {"seconds": 5}}]},
        ),
        "short steps": Moment(lambda run: run.steps() >= 3),
        "long step": Moment(
            lambda run: any(e["phase"] == "train" and e["step"] == 1 for e in run.events("phase/started")),
            {"train": {"num_iterations": SLOW_STEP}},
        ),
        "checkpoint": Moment(
            lambda run: list((run.path / "checkpoints").glob(".writing-*")),
            {"checkpoint": {"every": 1}, **{k: EXPORT[k] for k in ("model",)}},
            0.002,
        ),
        "export": Moment(lambda run: (run.path / ".writing-model").exists(), EXPORT, 0.002),
    },
    "offline": {
        "imports": Moment(lambda run: run.listens(), pause=0.001),
        "Ray starts": Moment(stage("starting Ray")),
        "learner starts": Moment(stage("starting the learner")),
        "evaluation": Moment(lambda run: run.steps() >= 1, EVAL),
        "short steps": Moment(lambda run: run.steps() >= 3),
        "long step": Moment(lambda run: run.steps() >= 1, {"train": {"num_iterations": SLOW_STEP}}),
        "checkpoint": Moment(
            lambda run: list((run.path / "checkpoints").glob(".writing-*")),
            {"checkpoint": {"every": 1}, **{k: EXPORT[k] for k in ("model",)}},
            0.002,
        ),
        "export": Moment(lambda run: (run.path / ".writing-model").exists(), EXPORT, 0.002),
    },
}
SIGNALS = ("TERM", "INT", "HUP", "USR1", "USR2")
TARGETS = ("process", "group", "every")


def cells() -> Iterator[tuple[str, str, str, str]]:
    """Every pair of signal, target and moment is in some cell, though not every triple."""
    for kind, moments in MOMENTS.items():
        for i, moment in enumerate(moments):
            for j, target in enumerate(TARGETS):
                yield kind, moment, SIGNALS[(i + 2 * j) % len(SIGNALS)], target


def start(
    folder: Path,
    kind: str,
    moment: Moment,
    engine: str = "hf",
    arguments: tuple[str, ...] = ("train",),
    **more: Any,
) -> Run:
    changes = merged(yaml.safe_load(CASES[kind].read_text()), BASE, moment.changes, more)
    if kind == "online":
        (reward,) = changes["rewards"]
        changes["rewards"] = [{**reward, "function": f"{folder}/digits.py:score"}]
        changes["rollout"]["engine"] = engine
    if "warm_start" in changes:
        changes["warm_start"] = {**changes["warm_start"], "cache": f"{folder}/cache"}
    return Run(folder, changes, arguments)


def stop(folder: Path, kind: str, name: str, sign: str, target: str, engine: str = "hf") -> str:
    """Carry a cell out; returns what the run kept and its seconds from the signal to its end."""
    moment, number = MOMENTS[kind][name], signal.Signals[f"SIG{sign}"]
    run = start(folder, kind, moment, engine)
    try:
        run.wait(name, lambda: moment.ready(run), 240 if engine == "hf" else 540, moment.pause)
        run.send(number, target)
        begun = time.monotonic()
        kept = run.assert_stopped(number)
        return f"{kept}, {time.monotonic() - begun:.0f} s"
    finally:
        run.clean_up()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "moment", "sign", "target"), list(cells()))
def test_matrix(tmp_path: Path, kind: str, moment: str, sign: str, target: str) -> None:
    kept = stop(tmp_path, kind, moment, sign, target)
    if moment == "imports" or moment.endswith((" starts", "engines start")):
        assert kept.startswith("nothing"), "a start is given up at once"
    if table := os.environ.get("RFT_SIGNAL_TABLE"):
        with open(table, "a") as file:
            file.write(json.dumps([kind, moment, sign, target, kept]) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("moment", "sign", "target"),
    [("engines start", "TERM", "group"), ("short steps", "USR1", "every"), ("long step", "HUP", "group")],
)
def test_matrix_with_vllm(tmp_path: Path, moment: str, sign: str, target: str) -> None:
    kept = stop(tmp_path, "online", moment, sign, target, "vllm")
    if table := os.environ.get("RFT_SIGNAL_TABLE"):
        with open(table, "a") as file:
            file.write(json.dumps(["online, vLLM", moment, sign, target, kept]) + "\n")


@pytest.mark.timeout(300)
def test_the_group_is_told_to_end_while_a_step_takes_long(tmp_path: Path) -> None:
    """Ray and the engines live until the step is finished and saved."""
    assert stop(tmp_path, "online", "long step", "TERM", "group").startswith("step 2")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_process_gets_the_signal_of_an_offline_run(tmp_path: Path) -> None:
    """As a job step sends it, also to the parent of `--restarts`, which forwards it: that is one request."""
    moment = MOMENTS["offline"]["short steps"]
    run = start(tmp_path, "offline", moment, arguments=("train", "--restarts", "3"))
    try:
        run.wait("some steps", lambda: moment.ready(run))
        run.send(signal.SIGUSR1, "every")
        assert run.assert_stopped(signal.SIGUSR1).startswith("step ")
        assert "forwarded to the run" in run.told() and "restart 1" not in run.told()
    finally:
        run.clean_up()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_step_longer_than_the_grace_is_given_up(tmp_path: Path) -> None:
    """The last complete checkpoint stands, and nothing is left of the step in progress."""
    moment = MOMENTS["offline"]["long step"]
    changes = {"train": {"num_iterations": 10 * SLOW_STEP, "stop_grace_s": 0.5}}
    run = start(tmp_path, "offline", moment, **changes)
    try:
        run.wait("the step", lambda: run.busy("ray::LearnerActor.step"))
        run.send(signal.SIGTERM, "group")
        code, told = run.end(), run.told()
        assert code == 75, told[-3000:]
        assert "train.stop_grace_s" in told and "nothing was saved" in told
        assert run.left_behind() == []
        assert "train.stop_grace_s" in run.events("run/stopped")[-1]["signal"]
    finally:
        run.clean_up()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_evaluation_ends_with_the_same_code(tmp_path: Path) -> None:
    run = start(tmp_path, "online", Moment(Run.listens, EVAL), arguments=("eval",))
    try:
        run.wait("the engine", lambda: run.busy("ray::Replica.generate"))
        run.send(signal.SIGHUP, "group")
        code, told = run.end(), run.told()
        assert code == 75 and "SIGHUP" in told and "nothing was saved" in told, told[-3000:]
        assert run.left_behind() == []
    finally:
        run.clean_up()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_start_of_a_run_is_refused(tmp_path: Path) -> None:
    """While the first one still starts, and while it trains; not once it was killed."""
    first = start(tmp_path, "offline", MOMENTS["offline"]["short steps"])
    again = [
        sys.executable,
        "-m",
        "rft.cli",
        "train",
        str(tmp_path / "run.yaml"),
        f"output_dir={tmp_path}/runs",
    ]
    try:
        for ready in (lambda: (first.path / "run.lock").exists(), lambda: first.steps() >= 1):
            first.wait("the first start", ready)
            done = subprocess.run(again, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
            assert done.returncode == 2, done.stderr
            assert f"already being trained, by process {first.process.pid} on " in done.stderr
        assert first.process.poll() is None
        first.process.kill()
        first.process.wait()
        done = subprocess.run(
            [*again, "train.steps=2"],  # there is no checkpoint: from the start
            cwd=ROOT,
            env=ENV,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert not (first.path / "run.lock").exists()
    finally:
        first.clean_up()
