"""Fused log-probs on CPU against the bare matrix products of the same round.

    python benchmarks/logprob.py [--cases main small ...] [--dtypes float32] [--rounds 3] [--peers]

Every round times the bare products, each contender, and the bare products again; a contender's ratio is its
time over the products that its task needs at least (forward 1, frozen head 2, all else 3). Medians
of rounds. One thread is timed in processor time, so that other programs disturb little. Each row carries
its largest error against a float32 reference of the same inputs, and its peak memory beyond inputs and
gradients in a fresh process. Other libraries run on at most 1,024 rows, against as many rows of products.

Where the processor has no bfloat16 arithmetic its bfloat16 products are emulated, many times
slower than float32 ones. There the baseline of bfloat16 rows is the *float32* products; the emulated
products are given beside it, and other libraries are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import (
    RESULTS,
    in_fresh_process,
    merge_rows,
    peak_of,
    peer_versions,
    seconds,
    use_peer,
    write_result,
)
from logprob_contenders import ALL, OURS, PEERS, SEQUENCE, WRITTEN_HERE, Contender
from torch import Tensor

from rft.kernels.logprob_linear import product_dtype
from rft.kernels.logprob_reference import token_logps as reference_logps

CHUNK = 512  # rows of the bare products
SAMPLED = 2  # chunks timed for all
OTHERS_ROWS = 1024
PACKAGES = {"trl": ("trl",), "kernels": ("liger-kernel", "cut-cross-entropy")}  # of each peer
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
    "large-vocabulary": Case(256, 1024, 151936),
    "two-threads": Case(2048, 1024, 32768, threads=2),
}


class Baseline:
    """The bare products of a head, chunk by chunk into preallocated memory."""

    def __init__(self, case: Case, dtype: torch.dtype, chunk: int = CHUNK) -> None:
        h, w, _, _ = case.inputs(dtype)
        self.h, self.w = h[:chunk], w
        self.chunks = case.rows / self.h.shape[0]
        h = self.h
        self.out = torch.zeros(h.shape[0], case.vocab, dtype=dtype)
        self.dh, self.dw = torch.empty_like(h), torch.zeros_like(w)

    def measure(self, chunks: int = SAMPLED) -> list[float]:
        """Seconds for 1, 2 and 3 products over all rows, from a few chunks."""
        steps = (
            lambda: torch.mm(self.h, self.w.t(), out=self.out),
            lambda: torch.mm(self.out, self.w, out=self.dh),
            lambda: self.dw.addmm_(self.out.t(), self.h),
        )
        times = [seconds(lambda f=f: [f() for _ in range(chunks)]) * self.chunks / chunks for f in steps]  # type: ignore[misc]
        return [sum(times[: n + 1]) for n in range(3)]


def run(contender: Contender, inputs: Sequence[Tensor]) -> Tensor | None:
    """One turn; the log-probs [T], where the contender gives them."""
    h, w, y, c = inputs
    h.grad = w.grad = None
    h.requires_grad_(contender.differentiates)
    w.requires_grad_(contender.differentiates and not contender.frozen)
    with torch.set_grad_enabled(contender.differentiates):
        loss, logps = contender.run(h, w, y, c)
        if contender.differentiates:
            loss.backward()
    return logps


class Reference:
    """Plain float32 log-probs and gradients of at most 256 rows, which all contenders are held against."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.inputs = case.inputs(dtype, min(256, case.rows))
        h, w, y, c = self.inputs
        wide = [x.float().requires_grad_() for x in (h, w)]
        logps, _ = reference_logps(wide[0], wide[1], y)
        self.grads = torch.autograd.grad((logps * c).sum(), wide)
        self.logps = logps.detach()

    @torch.no_grad()
    def errors(self, contender: Contender) -> dict[str, float]:
        """Largest absolute error of the log-probs, relative errors of the gradients' norms."""
        logps = run(contender, self.inputs)
        found = {} if logps is None else {"logps": (logps - self.logps).abs().max().item()}
        for name, x, grad in zip(("hidden", "weight"), self.inputs, self.grads, strict=False):
            if x.grad is not None:
                found[f"grad_{name}"] = ((x.grad.float() - grad).norm() / grad.norm()).item()
        return found


def workspace(case: Case, dtype: torch.dtype, name: str) -> float:
    """Peak memory in 10^6 bytes beyond inputs and gradients, measured in this process."""
    contender = ALL[name]
    run(contender, Case(SEQUENCE, 8, 16).inputs(dtype))  # libraries loaded, threads started
    inputs = case.inputs(dtype)
    peak = peak_of(lambda: run(contender, inputs))
    return peak - sum(x.grad.nbytes for x in inputs[:2] if x.grad is not None) / 1e6


def bench_case(
    name: str, case: Case, dtype_name: str, contenders: Sequence[Contender], rounds: int
) -> dict[str, Any]:
    dtype = getattr(torch, dtype_name)
    torch.set_num_threads(case.threads)
    products = product_dtype(torch.empty(0, dtype=dtype))
    baseline = Baseline(case, products)
    reference = Reference(case, dtype)
    emulated = Baseline(case, dtype, chunk=16).measure(1) if products != dtype else None
    if emulated is not None:
        left = [c.name for c in contenders if c not in OURS]
        contenders = OURS
        print(f"  bfloat16 products are emulated here: float32 is the baseline; left out: {', '.join(left)}")
    whole, part = case.inputs(dtype), case.inputs(dtype, min(case.rows, OTHERS_ROWS))
    inputs = {c.name: whole if c in OURS else part for c in contenders}
    bare: list[list[float]] = []
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    ratios: dict[str, list[float]] = {c.name: [] for c in contenders}
    for c in contenders:
        run(c, case.inputs(dtype, SEQUENCE) if c in OURS else part)  # some compile for a size
    for _ in range(rounds):
        before = baseline.measure()
        taken = {c.name: seconds(lambda c=c: run(c, inputs[c.name])) for c in contenders}  # type: ignore[misc]
        after = baseline.measure()
        bare.append([(a + b) / 2 for a, b in zip(before, after, strict=True)])
        for c in contenders:
            times[c.name].append(taken[c.name])
            rows = inputs[c.name][0].shape[0]
            ratios[c.name].append(taken[c.name] / (bare[-1][c.products - 1] * rows / case.rows))
    rows_of_table = []
    for c in contenders:
        size = Case(inputs[c.name][0].shape[0], case.width, case.vocab, case.threads)
        row: dict[str, Any] = {
            "contender": c.name,
            "rows": size.rows,
            "seconds": median(times[c.name]),
            "ratio": median(ratios[c.name]),
            "ratios": ratios[c.name],
            "workspace_mb": in_fresh_process(workspace, size, dtype, c.name),
            "errors": reference.errors(c),
            **gates(name, dtype_name, c.name),
        }
        row["passed"] = None if row["gate"] is None else row["ratio"] <= row["gate"]
        limit = row["workspace_gate"]
        row["workspace_passed"] = None if limit is None else row["workspace_mb"] <= limit
        rows_of_table.append(row)
        print(line(row), flush=True)
    return {
        "case": name,
        "dtype": dtype_name,
        **asdict(case),
        "rounds": rounds,
        "rows_of_table": rows_of_table,
        "baseline": {
            "dtype": str(products).removeprefix("torch."),
            "seconds": [median(x) for x in zip(*bare, strict=True)],
            "seconds_emulated": emulated,
        },
    }


def gates(case: str, dtype: str, contender: str) -> dict[str, float | None]:
    gate = GATES[dtype].get(contender) if case == "main" else None
    return {"gate": gate, "workspace_gate": WORKSPACE_GATES[dtype] if gate else None}


def line(row: dict[str, Any]) -> str:
    gate = "" if row["gate"] is None else f"gate {row['gate']:.2f} {'hit' if row['passed'] else 'MISSED'}"
    memory = f"{row['workspace_mb']:8.1f} MB"
    if row["workspace_gate"] is not None:
        memory += f" gate {row['workspace_gate']:.0f} {'hit' if row['workspace_passed'] else 'MISSED'}"
    found = "  ".join(f"{k} {v:.1e}" for k, v in row["errors"].items())
    time_taken = f"{row['seconds']:8.2f} s  ratio {row['ratio']:6.2f} {gate:18s}"
    return f"  {row['contender']:28s} {time_taken} {memory}  {found}"


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
        "--peers", action="store_true", help="also TRL, cut-cross-entropy and Liger, each in its environment"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "logprob-cpu.json")
    args = parser.parse_args(argv)
    if args.rows is not None and (args.rows < SEQUENCE or args.rows % SEQUENCE):
        parser.error(f"--rows must be a multiple of {SEQUENCE}, got {args.rows}")
    contenders, found_versions = [*OURS, *(() if args.only_ours else WRITTEN_HERE)], {}
    if args.peers:
        for peer, packages in PACKAGES.items():
            use_peer(peer)
            found_versions |= peer_versions(peer, *packages)
        contenders += PEERS
    for name in args.cases:
        case = CASES[name]
        case = Case(args.rows or case.rows, case.width, case.vocab, case.threads)
        for dtype in args.dtypes:
            print(f"{name}: T {case.rows}, H {case.width}, V {case.vocab}, {dtype}, {case.threads} threads")
            found = bench_case(name, case, dtype, contenders, args.rounds)
            kept = merge_rows(args.out, ("case", "dtype"), [found | {"peers": found_versions}])
            write_result(args.out, {"results": kept})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
