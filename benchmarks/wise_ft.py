"""Accuracy against forgetting along the line between the start and the RL policy (WiSE-FT, Wortsman et al.
2022).

    python benchmarks/wise_ft.py [--warm-steps 1200] [--steps 60] [--seed 1] [--out FOLDER]

A tiny model is warm-started on sums and differences of three numbers, then trained by GRPO on sums only. Two
named held-out sets: `plus` (trained) and `minus` (forgotten or not). `rft merge wise-ft` mixes start and
policy, and `rft eval` measures every mixture on both sets. Writes results/wise-ft-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, write_result

from rft.metrics.evaluation import flips, read_evaluation
from rft.utils import yaml_files

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def config(out: Path, warm_steps: int, steps: int, seed: int) -> dict[str, Any]:
    """Return the config of the run."""
    problems = {"samples": 4, "problems": 256}
    return {
        "name": "sums",
        "output_dir": str(out),
        "seed": seed,
        "algorithm": "grpo",
        "model": {"path": "tiny"},
        "warm_start": {
            "data": {"kind": "arithmetic", "limit": 32 * warm_steps},
            "steps": warm_steps,
            "batch_size": 32,
            "cache": str(out / "warm"),
            "learner": {
                "learning_rate": 5e-3, "betas": [0.9, 0.95], "warmup_steps": 20, "schedule": "cosine",
                "final_lr_ratio": 0.05, "threads": 1, "entropy": False,
            },
        },
        "data": {"kind": "arithmetic", "options": {"operators": ["+"]}, "eval_limit": 1},
        "rewards": ["math"],
        "train": {"steps": steps, "batch_size": 32, "num_generations": 8},
        "rollout": {"threads": 1, "sampling": {"max_prompt_length": 64, "max_completion_length": 24}},
        "learner": {"learning_rate": 3e-4, "betas": [0.9, 0.99], "warmup_steps": 5, "threads": 1},
        "eval": {
            "every": 1000,
            "sets": {
                "plus": {"data": {"kind": "arithmetic", "options": {"operators": ["+"]}}, **problems},
                "minus": {"data": {"kind": "arithmetic", "options": {"operators": ["-"]}}, **problems},
            },
        },
    }  # fmt: skip


def rft(*words: str) -> str:
    """Run a command; return its output. Raises CalledProcessError."""
    done = subprocess.run(
        [sys.executable, "-m", "rft.cli", *words], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def measure(out: Path, warm_steps: int, steps: int, seed: int) -> list[dict[str, Any]]:
    """Train, merge and evaluate; return a row for each share of the policy."""
    file = out / "run.yaml"
    file.write_text(yaml_files.dump(config(out, warm_steps, steps, seed)))
    rft("train", str(file))
    (start,) = (p for p in (out / "warm").iterdir() if (p / "config.json").exists())
    policy, rows = out / "sums" / "model", []
    for alpha in ALPHAS:
        model, place = out / f"mixed-{alpha:g}", out / f"eval-{alpha:g}"
        rft("merge", "wise-ft", str(start), str(policy), "--alpha", str(alpha), "--out", str(model))
        metrics = json.loads(rft("eval", str(file), "--model", str(model), "--out", str(place)))
        first, here = read_evaluation(out / "eval-0"), read_evaluation(place)
        assert first is not None and here is not None
        row: dict[str, Any] = {"alpha": alpha}
        for name in ("plus", "minus"):
            kept = ("accuracy", "accuracy_low", "accuracy_high", "greedy_accuracy", "pass@4", "distinct_2")
            row |= {f"{name}/{key}": round(metrics[f"eval/{name}/{key}"], 4) for key in kept}
            changed = flips(first.sets[name], here.sets[name])
            row[f"{name}/negative_flips"] = round(len(changed.negative) / changed.compared, 4)
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--warm-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rft-wise-") as scratch:
        out = args.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        rows = measure(out, args.warm_steps, args.steps, args.seed)
    settings = {"warm_steps": args.warm_steps, "steps": args.steps, "seed": args.seed}
    write_result(RESULTS / "wise-ft-cpu.json", {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
