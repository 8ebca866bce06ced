"""Predict how long `make demo-llm` takes on this machine, then train.

    .venv/bin/python scripts/demo_llm.py [key=value ...]

The prediction scales the committed run (benchmarks/results/smollm2.json) by the rate of matrix products,
which is measured here first.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from rft.preflight.dtype import FASTER, measure_product_rates
from rft.utils.cores import usable_cores

ROOT = Path(__file__).resolve().parent.parent


def main(overrides: list[str]) -> None:
    """Print the prediction and replace this process by `rft train`."""
    threads = usable_cores()
    torch.set_num_threads(threads)
    rates = measure_product_rates()
    dtype = "bfloat16" if rates.ratio >= FASTER else "float32"
    here = getattr(rates, dtype) / 1e9
    committed = json.loads((ROOT / "benchmarks" / "results" / "smollm2.json").read_text(encoding="utf-8"))
    minutes = committed["minutes"] * committed["gflops"] / here
    measured = f"{committed['minutes']:.0f} at {committed['gflops']:.0f} GFLOP/s, {committed['machine']}"
    print(
        f"[demo-llm] {threads} threads, {rates.bfloat16 / 1e9:.0f} GFLOP/s in bfloat16, "
        f"{rates.float32 / 1e9:.0f} in float32: training in {dtype} takes about {max(minutes, 1):.0f} min "
        f"(measured: {measured}). If it is stopped, the same command continues it",
        flush=True,
    )
    rft = str(Path(sys.executable).with_name("rft"))
    os.execv(rft, [rft, "train", "examples/smollm2.yaml", *overrides])


if __name__ == "__main__":
    os.chdir(ROOT)
    main(sys.argv[1:])
