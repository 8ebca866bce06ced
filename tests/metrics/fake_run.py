"""A run folder as the writer itself makes it: killed once, resumed, with faults and guards on the way."""

from __future__ import annotations

import math
import random
from pathlib import Path
from unittest.mock import patch

from rft.config.metrics import TrackingConfig
from rft.metrics import RunLog

TOTAL = 120
CONFIG = """name: arithmetic
algorithm: {name: grpo, epsilon: 0.2}
model: {path: tiny}
train: {steps: 120}
"""
PLAIN = TrackingConfig(trackers=(), sample_every=20, samples_kept=4)


def numbers(step: int, total: int = TOTAL, seed: int = 0) -> dict[str, float]:
    """Metrics as a healthy run shows them at a step."""
    rng = random.Random(seed * 10_000 + step)
    skill = 0.35 + 0.6 * (1 - math.exp(-3 * step / total))
    correct = min(0.99, max(0.02, skill + rng.gauss(0, 0.04)))
    row = {
        "reward/mean": correct,
        "reward/std": math.sqrt(correct * (1 - correct)),
        "reward/outcome/correct": correct,
        "reward/outcome/wrong": (1 - correct) * 0.8,
        "reward/outcome/unparseable": (1 - correct) * 0.2,
        "policy/kl": 0.002 * (1 + rng.random()),
        "policy/kl_ref": 0.05 * step / total * (1 + 0.2 * rng.random()),
        "policy/entropy": 0.45 - 0.25 * step / total + rng.gauss(0, 0.01),
        "policy/clip_fraction": 0.02 * rng.random(),
        "completion/length_mean": 27 + 3 * step / total + rng.gauss(0, 0.5),
        "completion/length_min": 14,
        "completion/length_max": 48 + rng.random() * 8,
        "completion/truncated": 0.01 * rng.random(),
        "completion/distinct_2": 0.6 - 0.2 * step / total,
        "completion/duplicates": 0.1 + 0.4 * step / total,
        "group/degenerate_share": 0.5 * step / total,
        "train/loss": rng.gauss(0, 0.01),
        "train/grad_norm": 0.4 + 0.1 * rng.random(),
        "sync/changed_share": 0.1 + 0.1 * rng.random(),
        "sync/logp_gap": 1e-6 * (1 + rng.random()),
        "sync/logp_gap_mean": 1e-7 * (1 + rng.random()),
        "time/rollout": 0.5 + 0.1 * rng.random(),
        "time/reward": 0.1,
        "time/train": 0.4 + 0.05 * rng.random(),
        "time/sync": 0.05,
        "time/step": 1.1 + 0.2 * rng.random(),
        "throughput/tokens_per_s": 9000 + 1000 * rng.random(),
        "rollout/age_mean": 0.4,
        "rollout/age_max": 1,
        "rollout/age/0": 0.6,
        "rollout/age/1": 0.4,
    }
    if step % 10 == 0:
        row |= {"eval/accuracy": skill, "eval/accuracy_stderr": 0.015, "eval/greedy_accuracy": skill + 0.02}
    return row


def sample(step: int, index: int, split: str = "eval") -> dict[str, object]:
    right = step > 0 or index == 0
    total = index + 14 if right else index + 13
    return {
        "prompt": f"What is {index + 2} + 3 * 4?",
        "completion": f"3 * 4 = 12\n{index + 2} + 12 = {total}\n<b>not markup</b>",
        "reward": 1.0 if right else 0.0,
        "outcome": {"math": "correct" if right else "wrong"},
        "finish": "stop",
        "version": step,
        "split": split,
    }


def make_run(path: Path, total: int = TOTAL, seed: int = 0) -> Path:
    """Killed after 60 % of the steps, resumed ten steps earlier, finished; 75 s a step by its clock."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG)
    died, resumed = int(total * 0.6), int(total * 0.6) - 10
    now = 1_700_000_000.0
    with patch("rft.metrics.log.time.time", lambda: now):
        log = RunLog(path, total, PLAIN)
        for step in range(died + 1):
            now += 75
            take(log, step, total, seed)
            if step == 40:
                log.event(
                    "fault/engine", step=step, part="engine 1", what="EngineDeadError", action="rebuilt"
                )
                log.event("engine/health", engine="1", version=40, inflight=12)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 73, "reward/me')  # the kill comes in the middle of a line
    now += 900
    with (
        patch("rft.metrics.log.time.time", lambda: now),
        RunLog(path, total, PLAIN, resumed_at=resumed) as log,
    ):
        for step in range(resumed + 1, total + 1):
            now += 75
            take(log, step, total, seed)
        log.event("guard/duplicates", step=total, value=0.6, limit=0.5, message="60 % repeat", action="warn")
    return path


def take(log: RunLog, step: int, total: int, seed: int) -> None:
    log.log(step, numbers(step, total, seed))
    log.samples(step, [sample(step, i) for i in range(8)])
    if step and step % 25 == 0:
        log.event("checkpoint/saved", step=step, path=f"checkpoints/{step}", seconds=0.2, bytes=10**7)
