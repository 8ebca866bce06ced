"""Online GRPO on the device: rollouts by vLLM where it is installed (transformers otherwise), pushes of
weights, and the learning curve of a model of about 70 M parameters made from scratch on the embedded task.

The warm start is supervised; the curve is held-out accuracy over steps. Seconds of rollout, training and
push are medians of steps, bytes and gap as `rft train` logs them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from harness import BENCHMARKS, Settings, settings

DEMO = BENCHMARKS.parent / "examples" / "arithmetic.yaml"
MODEL = {"hidden_size": 768, "layers": 10, "heads": 12, "intermediate_size": 2048}
SMALL = {"hidden_size": 64, "layers": 1, "heads": 2, "intermediate_size": 64}


def config(s: Settings, engine: str, work: Path) -> dict[str, Any]:
    """The demo's task, with a larger model and a learning rate that suits it."""
    demo = yaml.safe_load(DEMO.read_text())
    steps, warm = (2, 2) if s.small else (60, 600)
    learner = {**demo["learner"], "threads": None, "learning_rate": 3e-5}
    warm_learner = {**demo["warm_start"]["learner"], "threads": None, "learning_rate": 1e-3}
    batch = {"batch_size": 2, "num_generations": 2} if s.small else {"batch_size": 64, "num_generations": 8}
    return {
        **demo,
        "name": "online",
        "output_dir": str(work),
        "model": {"path": "tiny", "options": SMALL if s.small else MODEL},
        "warm_start": {**demo["warm_start"], "steps": warm, "learner": warm_learner},
        "train": {"steps": steps, **batch},
        "rollout": {**demo["rollout"], "engine": engine},
        "learner": learner,
        "eval": {"every": max(1, steps // 6), "problems": 8 if s.small else 512, "samples": 2},
        "checkpoint": {"every": 0},
    }


def run(s: Settings, config: dict[str, Any], work: Path) -> list[dict[str, Any]]:
    """Carry a run out; returns its metrics, step by step."""
    file = work / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    log = (s.out / f"gpu-{s.part}.log").open("w")
    command = [sys.executable, "-m", "rft.cli", "train", str(file), "--resume", "never"]
    subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    lines = (work / config["name"] / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def summary(rows: list[dict[str, Any]], *more: str) -> dict[str, Any]:
    """Medians of the steps after the first three, of `more` metrics too; the curve, and the largest gap."""
    steps = [m for m in rows if "train/loss" in m]
    names = ("time/rollout", "time/train", "time/sync", "time/step", "sync/bytes", *more)
    counted = steps[min(3, len(steps) - 1) :]
    return {
        "curve": [[m["step"], m["eval/accuracy"]] for m in rows if "eval/accuracy" in m],
        "medians": {n: statistics.median(m[n] for m in counted if n in m) for n in names if n in counted[0]},
        "largest_gap": max((m["sync/logp_gap"] for m in steps if "sync/logp_gap" in m), default=None),
    }


def engine_of(s: Settings) -> str:
    return "vllm" if find_spec("vllm") is not None and not s.small else "hf"


if __name__ == "__main__":
    s = settings("online", __doc__)
    s.out.mkdir(parents=True, exist_ok=True)
    if find_spec("ray") is None:
        s.finish({"left_out": "ray is not installed here"})
    else:
        chosen = engine_of(s)
        with tempfile.TemporaryDirectory(prefix="gpu-online-") as folder:
            rows = run(s, config(s, chosen, Path(folder)), Path(folder))
        s.finish({"model": SMALL if s.small else MODEL, "engine": chosen, **summary(rows)})
