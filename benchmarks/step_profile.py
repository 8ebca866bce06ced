"""Where the processor time of a small GRPO step goes: the processes of a run, and vLLM's engine by function.

    python benchmarks/step_profile.py [--seconds 25] [--model FOLDER] [--py-spy PATH]

Runs the demo's GRPO steps (256 completions of up to 24 tokens) as `rft train`, reads the processor time of
its processes, and samples the engine's stack with py-spy (`pip install py-spy`). Without --model the model is
untrained: its completions run to the limit. Processor time depends less on other programs than the time on
the clock does. Added to benchmarks/results/step-time-cpu.json as `profile`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import yaml
from step_time import LEARNING_RATE, RESULT, demo_config

PROCESSES = {  # first letters of their names, which Linux cuts
    "VLLM::EngineCor": "engine",
    "ray::Replica": "front end of the engine",
    "ray::LearnerAct": "learner",
}
# The innermost function of a stack that is listed here names what the engine does.
KINDS = {
    "_model_forward": "the model",
    "sample_tokens": "sampling and log-probs",
    "execute_model": "batch preparation",
    "schedule": "scheduler",
    "update_from_output": "outputs of each request",
    "_handle_client_request": "new requests",
    "preprocess_add_request": "new requests",
    "process_output_sockets": "messages",
    "process_input_sockets": "messages",
}


def share_by_kind(raw: str) -> dict[str, float]:
    """Return the share of samples of each kind. raw: py-spy's lines, `frame;frame;... count`."""
    counts: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        names = [frame.split(" (")[0].split(".")[-1] for frame in stack.split(";")]
        kind = next((KINDS[name] for name in reversed(names) if name in KINDS), "the rest")
        counts[kind] += int(count)
    total = sum(counts.values())
    return {kind: round(count / total, 3) for kind, count in counts.most_common()}


def processes(run: int) -> dict[str, psutil.Process]:
    """Return the processes of a run by role."""
    driver = psutil.Process(run)
    found = {"driver": driver}
    for child in driver.children(recursive=True):
        for name, role in PROCESSES.items():
            if child.name().startswith(name):
                found[role] = child
    return found


def steps_of(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [m for m in map(json.loads, lines) if "train/loss" in m]


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    config = demo_config(work, "profile", warm_start=None, checkpoint={"every": 0})
    config["train"]["steps"] = 10_000
    config["learner"]["learning_rate"] = LEARNING_RATE
    if arguments.model:
        config["model"] = {"path": str(arguments.model)}
    file = work / "profile.yaml"
    file.write_text(yaml.safe_dump(config))
    folder = work / "runs" / "profile"
    run = subprocess.Popen([sys.executable, "-m", "rft.cli", "train", str(file)], stdout=sys.stderr)
    try:
        while len(steps_of(folder)) < 3:  # the first ones start the kernels
            if run.poll() is not None:
                raise SystemExit(f"rft train ended with {run.returncode}")
            time.sleep(0.5)
        parts = processes(run.pid)
        before, first = {role: sum(p.cpu_times()[:2]) for role, p in parts.items()}, len(steps_of(folder))
        raw = work / "engine.raw"
        command = [arguments.py_spy, "record", "--pid", str(parts["engine"].pid), "--format", "raw"]
        command += ["--duration", str(arguments.seconds), "--output", str(raw), "--nonblocking"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        spent = {role: sum(p.cpu_times()[:2]) - before[role] for role, p in parts.items()}
        steps = steps_of(folder)[first:]
    finally:
        run.terminate()
        run.wait()
    return {
        "steps": len(steps),
        "tokens_per_completion": sum(m["completion/length_mean"] for m in steps) / len(steps),
        "processor_seconds_per_step": {role: round(s / len(steps), 3) for role, s in spent.items()},
        "engine": share_by_kind(raw.read_text()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=25)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--py-spy", default="py-spy")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="step-profile-") as work:
        profile = measure(arguments, Path(work))
    result = json.loads(RESULT.read_text()) | {"profile": profile}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(profile, indent=1))


if __name__ == "__main__":
    main()
