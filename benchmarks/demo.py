"""Sum finished demo runs up: python benchmarks/demo.py RUN [RUN ...]

Reads the run folders of `rft train examples/arithmetic.yaml seed=...`, writes
benchmarks/results/demo.json and the learning curves in docs/images/arithmetic.png.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml
from common import cpu_name

from rft.report.plots import plot_learning_curve
from rft.utils.cores import usable_cores

ROOT = Path(__file__).resolve().parent.parent


def summarise(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = yaml.safe_load((run / "config.yaml").read_text())
    if rows[-1]["step"] != config["train"]["steps"]:
        raise SystemExit(f"{run} is not finished: step {rows[-1]['step']} of {config['train']['steps']}")
    first, last, steps = rows[0], rows[-1], rows[1:]
    return {
        "seed": config["seed"],
        "before": first["eval/accuracy"],
        "after": last["eval/accuracy"],
        "greedy_before": first["eval/greedy_accuracy"],
        "greedy_after": last["eval/greedy_accuracy"],
        "largest_gap": max((r["sync/logp_gap"] for r in steps if "sync/logp_gap" in r), default=None),
        "step_seconds": statistics.median(r["time/step"] for r in steps),
    }


def main(argv: list[str]) -> None:
    runs = [Path(a) for a in argv]
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    result = {
        "machine": f"{cpu_name()}, {usable_cores()} cores",
        "problems": config["eval"]["problems"],
        "samples": config["eval"]["samples"],
        "steps": config["train"]["steps"],
        "completions": config["train"]["batch_size"] * config["train"]["num_generations"],
        "note": "Other programs ran on the same cores at times.",
        "runs": sorted((summarise(run) for run in runs), key=lambda r: r["seed"]),
    }
    (ROOT / "benchmarks/results/demo.json").write_text(json.dumps(result, indent=2) + "\n")
    plot_learning_curve(runs, ROOT / "docs/images/arithmetic.png")
    for row in result["runs"]:
        print(row)


if __name__ == "__main__":
    main(sys.argv[1:])
