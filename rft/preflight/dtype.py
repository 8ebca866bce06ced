"""Resolve `dtype: auto`: bfloat16 on a GPU; on CPU bfloat16 for large models, where it is measured to be
faster."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache

import torch

from rft.config.dtypes import auto_sections, fill_in_dtypes
from rft.config.facts import Device
from rft.config.schema import Config

FASTER = 1.5  # speed-up of bfloat16 products that pays for its rounding
LARGE = 20_000_000  # parameters; below, a step on CPU spends its time outside of matrix products
MEASURE_S = 0.05
_SHAPE = (256, 1024, 1024)  # rows, inputs and outputs of the measured product


@dataclass(frozen=True)
class ProductRates:
    """Speed of matrix products on this machine's CPU, in floating-point operations per second."""

    float32: float
    bfloat16: float

    @property
    def ratio(self) -> float:
        return self.bfloat16 / self.float32


def resolve_dtypes(config: Config, device: Device, parameters: int) -> tuple[Config, str]:
    """Fill in `dtype: auto` of learner, rollout and warm start; return the config, and the choice with its
    reason ("" if no section says auto). parameters: size of the model."""
    sections = auto_sections(config)
    if not sections:
        return config, ""
    dtype, why = _choose(device, parameters)
    return fill_in_dtypes(config, dict.fromkeys(sections, dtype)), f"{dtype} for {', '.join(sections)}: {why}"


def _choose(device: Device, parameters: int) -> tuple[str, str]:
    if device == "cuda":
        return "bfloat16", "the default on a GPU"
    if parameters <= LARGE:
        return (
            "float32",
            f"a model of at most {LARGE / 1e6:.0f} M parameters gains nothing from bfloat16 on CPU",
        )
    rates = measure_product_rates()
    measured = (
        f"matrix products measured at {rates.bfloat16 / 1e9:.0f} GFLOP/s in bfloat16 and "
        f"{rates.float32 / 1e9:.0f} in float32 ({rates.ratio:.1f}x, bfloat16 from {FASTER}x)"
    )
    return ("bfloat16" if rates.ratio >= FASTER else "float32"), measured


@lru_cache(maxsize=1)
def measure_product_rates(seconds: float = MEASURE_S) -> ProductRates:
    """Measure both dtypes in turns, for about `seconds` after one product of each; the best of each counts.

    The rate is that of the processor time of one thread, times the number of threads: where other processes
    share the cores, the time on the clock depends on them.
    """
    rows, inputs, outputs = _SHAPE
    operands = {
        dtype: (torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype).t())
        for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(operands, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for left, right in operands.values():
            torch.mm(left, right)  # the first product compiles its kernel
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or float("inf") in best.values():
            for dtype, (left, right) in operands.items():
                begin = time.thread_time()
                torch.mm(left, right)
                best[dtype] = min(best[dtype], time.thread_time() - begin)
    finally:
        torch.set_num_threads(threads)
    work = 2.0 * rows * inputs * outputs * threads
    return ProductRates(work / best[torch.float32], work / best[torch.bfloat16])
