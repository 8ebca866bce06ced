"""Predict how long `make demo-llm` takes on this machine, then train.

    .venv/bin/python scripts/demo_llm.py [key=value ...]

The prediction scales the committed run (benchmarks/results/smollm2.json) by the rate of matrix products,
which is measured here first.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rft.preflight.dtype import FASTER, ProductRates, measure_product_rates
from rft.utils.cores import usable_cores

ROOT = Path(__file__).resolve().parent.parent


def predict(rates: ProductRates, threads: int, committed: Mapping[str, Any]) -> str:
    """Return the line that names the measured rates, the dtype that they lead to, and the minutes."""
    dtype = "bfloat16" if rates.ratio >= FASTER else "float32"
    here = max(rates.bfloat16 if dtype == "bfloat16" else rates.float32, 1.0) / 1e9
    minutes = max(committed["minutes"] * committed["gflops"] / here, 1)
    return (
        f"[demo-llm] {threads} threads, {rates.bfloat16 / 1e9:.0f} GFLOP/s in bfloat16, "
        f"{rates.float32 / 1e9:.0f} in float32: training in {dtype} takes about {minutes:.0f} minutes "
        f"(measured: {committed['minutes']:.0f} at {committed['gflops']:.0f} GFLOP/s, "
        f"{committed['machine']}). If it is stopped, the same command continues it"
    )


def main(overrides: list[str]) -> None:
    """Print the prediction and replace this process by `rft train`."""
    threads = usable_cores()
    torch.set_num_threads(threads)
    results = ROOT / "benchmarks" / "results" / "smollm2.json"
    print(
        predict(measure_product_rates(), threads, json.loads(results.read_text(encoding="utf-8"))), flush=True
    )
    rft = str(Path(sys.executable).with_name("rft"))
    os.execv(rft, [rft, "train", "examples/smollm2.yaml", *overrides])


if __name__ == "__main__":
    os.chdir(ROOT)
    main(sys.argv[1:])
