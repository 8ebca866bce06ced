"""A run that is alive while a test hurts it: `rft train --restarts` with short deadlines on a small disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from rft import checkpoint
from rft.metrics.log import read_jsonl
from tests.integration.conftest import ENV, ROOT, pids_of

REWARD = '''
import os, time
FLAG = os.path.join(os.path.dirname(__file__), "hang")
def score(prompts, completions, **columns):
    """Digits pay. A worker that finds the flag takes it away and hangs."""
    try:
        os.remove(FLAG)
    except FileNotFoundError:
        pass
    else:
        time.sleep(10_000)
    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]
'''


def settings(folder: Path, engine: str, **more: Any) -> list[str]:
    """Overrides of a long tiny run with short deadlines."""
    # One replica of vLLM: each takes a core and half a minute to start.
    values: dict[str, Any] = {
        "output_dir": folder / "runs",
        "name": "live",
        "warm_start": None,
        "train.steps": 1_000_000,
        "train.batch_size": 4,
        "train.num_generations": 4,
        "data.limit": 4096,
        "eval.every": 0,
        "rollout.engine": engine,
        "rollout.replicas": 2 if engine == "hf" else 1,
        "rollout.staleness": 1,
        "rollout.sampling.max_completion_length": 8,
        "rollout.health_every_s": 0.5,
        "rollout.health_timeout_s": 5,
        "rollout.control_timeout_s": 30,
        "sync.timeout_s": 30,
        "learner.learning_rate": 1e-5,
        "checkpoint.every": 10,
        "checkpoint.max_failures": 1000,
        "tracking.trackers": [],
        "tracking.sample_every": 1000,
        "rewards": {
            "functions": [{"function": f"{folder}/digits.py:score", "timeout_s": 2}],
            "max_timeouts": 1_000_000,
            "max_errors": 1_000_000,
        },
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return [f"{key}={json.dumps(v, default=str)}" for key, v in values.items()]


def is_gone(process: psutil.Process) -> bool:
    """Ended, whether its parent has taken note or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass
class Live:
    """A supervised run in `folder`/runs/live."""

    folder: Path
    engine: str
    process: subprocess.Popen[bytes] | None = None
    measured: dict[str, float] = field(default_factory=dict)  # fault -> seconds to its detection

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "live"

    @property
    def marker(self) -> str:
        return f"RFT_TEST_MARK={self.folder.name}"

    def start(self, **more: Any) -> None:
        (self.folder / "digits.py").write_text(REWARD)
        arguments = ["train", "examples/arithmetic.yaml", *settings(self.folder, self.engine, **more)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rft.cli", *arguments, "--restarts", "5"],
            cwd=ROOT,
            env={**ENV, "RFT_TEST_MARK": self.folder.name},
            stderr=(self.folder / "stderr").open("ab"),
        )

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    # -- looking -----------------------------------------------------------------------------------

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        return [e for e in read_jsonl(self.run / "events.jsonl") if e["kind"].startswith(kind)]

    def step(self) -> int:
        rows = read_jsonl(self.run / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else -1

    def wait(self, what: str, ready: Callable[[], Any], seconds: float = 120) -> Any:
        """The first true answer of `ready`."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while True:
            answer = ready()
            if answer:
                return answer
            code = self.process.poll()
            assert code is None, f"the run ended with {code} before: {what}\n{self.stderr()[-3000:]}"
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{self.stderr()[-3000:]}"
            time.sleep(0.05)

    def makes_steps(self, count: int = 2, seconds: float = 120) -> None:
        goal = self.step() + count
        self.wait(f"step {goal}", lambda: self.step() >= goal, seconds)

    def resumes(self) -> None:
        """The newest process went on from a checkpoint, and makes steps."""
        opened = self.wait(
            "a restart", lambda: [e for e in self.events("run/opened") if e["resumed_at"]], 120
        )
        assert opened[-1]["resumed_at"] > 0
        since = opened[-1]["time"]
        self.wait(
            "a restored checkpoint",
            lambda: [e for e in self.events("checkpoint/restored") if e["time"] >= since],
        )
        self.makes_steps(seconds=180)

    def accounts_for_every_prompt(self) -> None:
        """After the run's end: each step that counts was trained on a batch of prompts of no other step, and
        the last checkpoint accounts for all prompts that were handed out."""
        # The later one counts of a step taken twice; steps beyond the last one were set back and not retaken.
        steps = {e["step"]: e["prompts"] for e in self.events("group/trained") if e["step"] <= self.step()}
        assert sorted(steps) == list(range(1, self.step() + 1))
        keys = Counter(tuple(key) for prompts in steps.values() for key in prompts)
        assert set(map(len, steps.values())) == {4} and max(keys.values()) == 1
        found = checkpoint.latest(self.run / "checkpoints")
        assert found is not None
        place = found.meta["sampler"]
        handed = place["epoch"] * place["size"] + place["position"]
        waiting = {tuple(key) for key in found.meta["outstanding"]}
        dropped = {(epoch, row) for epoch, row, _ in found.meta["dropped"]}
        assert not waiting & set(keys) and not dropped & set(keys) and not dropped & waiting
        assert len(keys) + len(waiting) + len(dropped) == handed

    def hurt(self, name: str, action: Callable[[], object], kind: str, seconds: float = 60) -> dict[str, Any]:
        """Do something bad; the first event of `kind` after it. Keeps how long that took."""
        began, known = time.time(), len(self.events(kind))
        action()
        event: dict[str, Any] = self.wait(f"{kind} after {name}", lambda: self.events(kind)[known:], seconds)[
            0
        ]
        self.measured[name] = round(event["time"] - began, 2)
        return event

    # -- processes ---------------------------------------------------------------------------------

    def driver(self) -> psutil.Process:
        """The process that runs the loop: the newest one that opened the run."""
        return psutil.Process(self.events("run/opened")[-1]["pid"])

    def child(self, name: str) -> psutil.Process:
        """A process below the driver, by a part of its command line."""
        found = self.wait(f"a process {name}", lambda: self.children(name))
        process: psutil.Process = found[0]
        return process

    def children(self, name: str) -> list[psutil.Process]:
        found = []
        for process in self.driver().children(recursive=True):
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    # -- the end -----------------------------------------------------------------------------------

    def terminate(self) -> tuple[int, float]:
        """SIGTERM; returns exit code and seconds."""
        assert self.process is not None
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        return code, time.monotonic() - began

    def clean_up(self) -> None:
        """Whatever a failed test has left."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in pids_of(self.marker):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
