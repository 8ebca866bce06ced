"""Seconds per GRPO step on the demo's sizes, rft against TRL's `GRPOTrainer`, on this machine.

    python benchmarks/step_time.py [--rounds 3] [--steps 20] [--model FOLDER]

Both train the same model folder on the same prompts with the same reward function, group size, completion
limit and learning rate (a tiny one, so that the completions keep their length). rft runs as `rft
train` with the demo's own settings: vLLM in one process, the learner in another; and once more with its
transformers engine, with which TRL generates. TRL runs in one process, with one thread and with all
cores; the better of the two counts. Rounds of all are interleaved. A step's time is the wall time between
the ends of two steps, so nothing is left out; the first `--warmup` steps of each run are. The error is the
largest difference of log-probs between rft's learner and its engine. Written to benchmarks/results/step-
time-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from common import cpu_name, peer_versions
from peers.make_env import run_peer

from rft.tasks.arithmetic import Arithmetic
from rft.utils.cores import usable_cores

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "examples" / "arithmetic.yaml"
RESULT = HERE / "results" / "step-time-cpu.json"
LEARNING_RATE = 1e-6
AIM = 2.0  # times as fast as the peer
ENGINES = {"rft": "vllm", "rft, transformers engine": "hf"}


def rft_train(config: dict[str, Any], work: Path) -> Path:
    """Run `rft train` on `config`; returns the run folder. Raises CalledProcessError when it fails."""
    file = work / f"{config['name']}.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "rft.cli", "train", str(file), "--resume", "never"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return Path(config["output_dir"]) / config["name"]


def demo_config(work: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {
        **yaml.safe_load(DEMO.read_text()),
        "name": name,
        "output_dir": str(work / "runs"),
        "eval": {"every": 0},
        **changes,
    }


def make_model(work: Path) -> Path:
    """The demo's warm-started model (kept in runs/.cache, shared with the demo) after one GRPO step."""
    demo = yaml.safe_load(DEMO.read_text())
    run = rft_train(demo_config(work, "model", train={**demo["train"], "steps": 1}), work)
    return run / "model"


def write_prompts(work: Path, count: int) -> Path:
    rows = Arithmetic().rows("train", count, seed=7)
    file = work / "prompts.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": r["prompt"], "answer": str(r["answer"])}) + "\n" for r in rows)
    )
    return file


def step_times(ends: list[float], warmup: int) -> list[float]:
    return [b - a for a, b in zip(ends[warmup - 1 :], ends[warmup:], strict=False)]


def time_rft(work: Path, name: str, engine: str, s: dict[str, Any], warmup: int) -> dict[str, Any]:
    demo = yaml.safe_load(DEMO.read_text())
    config = demo_config(
        work,
        name,
        model={"path": s["model"]},
        data={"path": s["prompts"]},
        warm_start=None,
        train={**demo["train"], "steps": s["steps"]},
        rewards=[{"function": f"{HERE / 'peers' / 'step_reward.py'}:{s['reward']}"}],
        learner={**demo["learner"], "learning_rate": s["learning_rate"]},
        rollout={**demo["rollout"], "engine": engine},
        checkpoint={"every": 0},
    )
    lines = (rft_train(config, work) / "metrics.jsonl").read_text().splitlines()
    steps = [m for m in map(json.loads, lines) if "train/loss" in m]
    return {
        "seconds": step_times([m["time/wall"] for m in steps], warmup),
        "length": statistics.fmean(m["completion/length_mean"] for m in steps),
        "gap": max((m["sync/logp_gap"] for m in steps if "sync/logp_gap" in m), default=None),
        "parts": {
            part: statistics.median(m[f"time/{part}"] for m in steps[warmup:])
            for part in ("rollout", "reward", "train", "sync", "step")
        },
    }


def time_trl(work: Path, name: str, s: dict[str, Any], warmup: int) -> dict[str, Any]:
    settings, result = work / f"{name}.json", work / f"{name}-result.json"
    settings.write_text(json.dumps({**s, "work": str(work / name)}))
    run_peer("trl", HERE / "peers" / "trl_grpo.py", settings, result)
    done = json.loads(result.read_text())
    return {"seconds": step_times(done["ends"][1:], warmup), "length": done["completion_length"]}


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    demo = yaml.safe_load(DEMO.read_text())
    cores = usable_cores()
    model = arguments.model or make_model(work)
    s = {
        "model": str(Path(model).absolute()),
        "prompts": str(write_prompts(work, arguments.steps * demo["train"]["batch_size"])),
        "steps": arguments.steps,
        "batch_size": demo["train"]["batch_size"],
        "num_generations": demo["train"]["num_generations"],
        "max_completion_length": demo["rollout"]["sampling"]["max_completion_length"],
        "learning_rate": LEARNING_RATE,
        "reward": "exact",
        "dtype": "float32",
    }
    runs: dict[str, list[dict[str, Any]]] = {}
    for i in range(arguments.rounds):
        for threads in sorted({1, cores}):
            name = f"trl, {threads} thread{'s' * (threads > 1)}"
            runs.setdefault(name, []).append(
                time_trl(work, f"trl-{threads}-{i}", {**s, "threads": threads}, arguments.warmup)
            )
        for name, engine in ENGINES.items():
            runs.setdefault(name, []).append(time_rft(work, f"rft-{engine}-{i}", engine, s, arguments.warmup))
        for name, found in runs.items():
            print(
                f"round {i + 1}: {name:<24} {statistics.median(found[-1]['seconds']):.3f} s a step",
                flush=True,
            )
    median = {name: statistics.median(t for r in found for t in r["seconds"]) for name, found in runs.items()}
    best = min((n for n in median if n not in ENGINES), key=median.__getitem__)
    return {
        "settings": {k: v for k, v in s.items() if k not in ("model", "prompts")},
        "machine": {"cpu": cpu_name(), "cores": cores, "load_before": arguments.load},
        "versions": {n: metadata.version(n) for n in ("torch", "transformers")} | peer_versions("trl", "trl"),
        "seconds_per_step": median,
        "completion_length": {n: statistics.fmean(r["length"] for r in found) for n, found in runs.items()},
        "errors": {"log-prob gap": max(r["gap"] for name in ENGINES for r in runs[name])},
        "rft_parts": [r["parts"] for r in runs["rft"]],
        "runs": {n: [[round(t, 4) for t in r["seconds"]] for r in found] for n, found in runs.items()},
        "trl_best": best,
        "ratio": median[best] / median["rft"],
        "ratio_with_one_engine": median[best] / median["rft, transformers engine"],
        "passed": median[best] >= AIM * median["rft"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="steps of each run")
    parser.add_argument("--warmup", type=int, default=5, help="steps of each run that are not counted")
    parser.add_argument("--model", type=Path, help="model folder (default: the demo's, made first)")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if not 1 <= arguments.warmup < arguments.steps - 1:
        parser.error("--warmup must be at least 1 and leave two steps to count")
    arguments.load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory(prefix="step-time-") as work:
        result = measure(arguments, Path(work))
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, seconds in result["seconds_per_step"].items():
        length = result["completion_length"][name]
        print(f"{name:<24} {seconds:.3f} s a step, completions of {length:.1f} tokens")
    print(
        f"ratio: rft is {result['ratio']:.2f}x as fast as {result['trl_best']}, "
        f"{result['ratio_with_one_engine']:.2f}x with the same engine (written to {arguments.out})"
    )


if __name__ == "__main__":
    main()
