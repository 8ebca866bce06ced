"""Fused log-probs on CPU against the bare matrix products of the same round.

    python benchmarks/logprob.py [--cases main small ...] [--rounds 3] [--rows N] [--peers]

Every round times the bare products, each contender, and the bare products again; a contender's ratio is its
time over the products that its task needs at least (forward 1, frozen head 2, all else 3). Medians
of rounds. One thread is timed in processor time, so that other programs disturb little. Each row carries
its largest error against a float32 reference of the same inputs, and its peak memory beyond inputs and
gradients in a fresh process.

Where the processor has no bfloat16 arithmetic its bfloat16 products are emulated, many times
slower than float32 ones. There the yardstick of bfloat16 rows is the *float32* products; the emulated
products are given beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from logprob_contenders import ALL, OURS, PEERS, SEQUENCE, WRITTEN_HERE, Contender
from torch import Tensor

from rft.kernels.logprob_linear import product_dtype
from rft.kernels.logprob_reference import token_logps as reference_logps

HERE = Path(__file__).resolve().parent
CHUNK = 512  # rows of the bare products
GATES = {  # of the main case, time over the bare products
    "bfloat16": {"recompute": 1.9, "loss-known": 1.5, "frozen head": 1.75, "forward": 1.9},
    "float32": {"recompute": 1.65, "loss-known": 1.2, "frozen head": 1.25, "forward": 1.3},
}
WORKSPACE_GATES = {"bfloat16": 64.0, "float32": 100.0}  # 10^6 bytes


@dataclass(frozen=True)
class Case:
    rows: int
    width: int
    vocab: int
    threads: int = 1

    def inputs(self, dtype: torch.dtype, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden, weight (logits of standard deviation about 2), targets, coefficients."""
        torch.manual_seed(0)
        n = rows or self.rows
        weight = torch.empty(self.vocab, self.width, dtype=dtype)
        for block in weight.split(4096):
            block.copy_(torch.randn(block.shape) * (2 / self.width**0.5))
        hidden = torch.randn(n, self.width).to(dtype)
        targets = torch.randint(self.vocab, (n,))
        return hidden, weight, targets, torch.randn(n // SEQUENCE).repeat_interleave(SEQUENCE) / n


CASES = {
    "main": Case(4096, 1024, 32768),
    "small": Case(1024, 512, 16384),
    "large-vocabulary": Case(512, 1024, 151936),
    "two-threads": Case(2048, 1024, 32768, threads=2),
}


def seconds(f: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    f()
    return clock() - start


class Yardstick:
    """The bare products of a head, chunk by chunk into preallocated memory."""

    def __init__(self, case: Case, dtype: torch.dtype, chunk: int = CHUNK) -> None:
        h, w, _, _ = case.inputs(dtype)
        self.h, self.w = h[:chunk], w
        self.chunks = case.rows / self.h.shape[0]
        h = self.h
        self.out = torch.zeros(h.shape[0], case.vocab, dtype=dtype)
        self.dh, self.dw = torch.empty_like(h), torch.zeros_like(w)

    def measure(self) -> list[float]:
        """Seconds for 1, 2 and 3 products over all rows."""
        return self.scaled(max(1, round(self.chunks)))

    def scaled(self, chunks: int) -> list[float]:
        """The same from a few chunks."""
        steps = (
            lambda: torch.mm(self.h, self.w.t(), out=self.out),
            lambda: torch.mm(self.out, self.w, out=self.dh),
            lambda: self.dw.addmm_(self.out.t(), self.h),
        )
        times = [seconds(lambda f=f: [f() for _ in range(chunks)]) * self.chunks / chunks for f in steps]  # type: ignore[misc]
        return [sum(times[: n + 1]) for n in range(3)]


def run(contender: Contender, inputs: Sequence[Tensor]) -> None:
    h, w, y, c = inputs
    h.grad = w.grad = None
    h.requires_grad_(contender.differentiates)
    w.requires_grad_(contender.differentiates and not contender.frozen)
    with torch.set_grad_enabled(contender.differentiates):
        loss, _ = contender.run(h, w, y, c)
        if contender.differentiates:
            loss.backward()


def errors(case: Case, dtype: torch.dtype, contender: Contender) -> dict[str, float]:
    """On 256 rows: largest absolute error of the log-probs, relative errors of the gradients' norms."""
    h, w, y, c = case.inputs(dtype, min(256, case.rows))
    wide = [x.float().requires_grad_() for x in (h, w)]
    logps, _ = reference_logps(wide[0], wide[1], y)
    wanted = torch.autograd.grad((logps * c).sum(), wide)
    run(contender, (h, w, y, c))
    found = {}
    with torch.no_grad():
        _, got = contender.run(h, w, y, c)
    if got is not None:
        found["logps"] = (got - logps).abs().max().item()
    for name, x, grad in zip(("hidden", "weight"), (h, w), wanted, strict=True):
        if x.grad is not None:
            found[f"grad_{name}"] = ((x.grad.float() - grad).norm() / grad.norm()).item()
    return found


def workspace(case: Case, dtype: torch.dtype, contender: Contender) -> float:
    """Peak memory in 10^6 bytes beyond inputs and gradients, measured in this process."""
    run(contender, Case(SEQUENCE, 8, 16).inputs(dtype))  # libraries loaded, threads started
    inputs = case.inputs(dtype)
    base = _reset_peak()
    run(contender, inputs)
    grads = sum(x.grad.nbytes for x in inputs[:2] if x.grad is not None)
    return (_status("VmHWM") - base - grads) / 1e6


def _reset_peak() -> int:
    """Linux: the process's peak memory starts anew; returns the memory held now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def workspace_in_fresh_process(case: Case, dtype: str, name: str) -> float:
    job = json.dumps({"case": asdict(case), "dtype": dtype, "name": name})
    command = [sys.executable, __file__, "--workspace", job]
    # freed memory must go back to the system at once, or the next allocation hides in it
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return float(done.stdout)


def bench_case(
    name: str, case: Case, dtype_name: str, contenders: Sequence[Contender], rounds: int
) -> dict[str, Any]:
    dtype = getattr(torch, dtype_name)
    torch.set_num_threads(case.threads)
    products = product_dtype(torch.empty(0, dtype=dtype))
    yardstick = Yardstick(case, products)
    emulated = Yardstick(case, dtype, chunk=16).scaled(1) if products != dtype else None
    if emulated is not None:
        left = [c.name for c in contenders if c not in OURS]
        contenders = OURS
        print(f"  bfloat16 products are emulated here: float32 is the yardstick; left out: {', '.join(left)}")
    inputs = case.inputs(dtype)
    bare: list[list[float]] = []
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    ratios: dict[str, list[float]] = {c.name: [] for c in contenders}
    for c in contenders:
        run(c, case.inputs(dtype, SEQUENCE))
    for _ in range(rounds):
        before = yardstick.measure()
        taken = {c.name: seconds(lambda c=c: run(c, inputs)) for c in contenders}  # type: ignore[misc]
        after = yardstick.measure()
        bare.append([(a + b) / 2 for a, b in zip(before, after, strict=True)])
        for c in contenders:
            times[c.name].append(taken[c.name])
            ratios[c.name].append(taken[c.name] / bare[-1][c.products - 1])
    rows = []
    for c in contenders:
        gate = GATES[dtype_name].get(c.name) if name == "main" else None
        row: dict[str, Any] = {
            "contender": c.name,
            "seconds": median(times[c.name]),
            "ratio": median(ratios[c.name]),
            "ratios": ratios[c.name],
            "workspace_mb": workspace_in_fresh_process(case, dtype_name, c.name),
            "errors": errors(case, dtype, c),
            "gate": gate,
            "workspace_gate": WORKSPACE_GATES[dtype_name] if gate else None,
        }
        row["passed"] = None if gate is None else row["ratio"] <= gate
        row["workspace_passed"] = None if gate is None else row["workspace_mb"] <= row["workspace_gate"]
        rows.append(row)
        print(line(row), flush=True)
    result: dict[str, Any] = {"case": name, "dtype": dtype_name, **asdict(case), "rows_of_table": rows}
    result["yardstick"] = {
        "dtype": str(products).removeprefix("torch."),
        "seconds": [median(x) for x in zip(*bare, strict=True)],
        "seconds_emulated": emulated,
    }
    return result


def line(row: dict[str, Any]) -> str:
    gate = "" if row["gate"] is None else f"gate {row['gate']:.2f} {'hit' if row['passed'] else 'MISSED'}"
    memory = f"{row['workspace_mb']:8.1f} MB"
    if row["workspace_gate"] is not None:
        memory += f" gate {row['workspace_gate']:.0f} {'hit' if row['workspace_passed'] else 'MISSED'}"
    found = "  ".join(f"{k} {v:.1e}" for k, v in row["errors"].items())
    time_taken = f"{row['seconds']:8.2f} s  ratio {row['ratio']:6.2f} {gate:18s}"
    return f"  {row['contender']:28s} {time_taken} {memory}  {found}"


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    versions: dict[str, str | None] = {}
    for package in ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "processor": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": len(names),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_arithmetic": product_dtype(torch.empty(0, dtype=torch.bfloat16)) == torch.bfloat16,
        "python": platform.python_version(),
        "versions": versions,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=list(GATES), default=list(GATES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--rows", type=int, help=f"rows T instead of each case's own, a multiple of {SEQUENCE}"
    )
    parser.add_argument("--only-ours", action="store_true", help="leave out all but rft's own paths")
    parser.add_argument(
        "--peers", action="store_true", help="also run TRL, cut-cross-entropy, Liger if installed"
    )
    parser.add_argument("--json", type=Path, default=HERE / "results" / "logprob-cpu.json")
    parser.add_argument("--workspace", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.workspace:
        job = json.loads(args.workspace)
        case = Case(**job["case"])
        torch.set_num_threads(case.threads)
        print(workspace(case, getattr(torch, job["dtype"]), ALL[job["name"]]))
        return 0
    if args.rows is not None and (args.rows < SEQUENCE or args.rows % SEQUENCE):
        parser.error(f"--rows must be a multiple of {SEQUENCE}, got {args.rows}")
    contenders = [*OURS, *(() if args.only_ours else WRITTEN_HERE)]
    absent = [c.name for c in PEERS if not c.available] if args.peers else []
    contenders += [c for c in PEERS if args.peers and c.available]
    for name in absent:
        print(f"{name}: not installed here, left out")
    results = []
    for name in args.cases:
        case = CASES[name]
        case = Case(args.rows or case.rows, case.width, case.vocab, case.threads)
        for dtype in args.dtypes:
            print(f"{name}: T {case.rows}, H {case.width}, V {case.vocab}, {dtype}, {case.threads} threads")
            results.append(bench_case(name, case, dtype, contenders, args.rounds))
    report = {"machine": machine(), "rounds": args.rounds, "peers_absent": absent, "results": results}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {args.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
