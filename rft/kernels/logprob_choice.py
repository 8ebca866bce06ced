"""Which of two kernels for log-probs is taken: Triton's or Liger's, by their measured times.

Both are timed where they run, on the caller's tensors, once for every `Kind` of call and process, and the
choice is told. A choice by time can differ between ranks and from run to run. Nothing is exchanged between
ranks inside a head, so theirs need not agree; and both kernels take softmax in float32, so results differ by
the rounding of float32 sums. Triton's block sizes are tuned by time too: a run on a GPU that must repeat bit
by bit takes "chunked".
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from rft.kernels.logprob_common import LogitMap
from rft.kernels.logprob_liger import Path

ROUNDS = 5  # timed calls of each kernel, in turns
AGREEMENT = 2e-2  # of log-probs (nats) and gradients (relative) by two right kernels, with 16 bits or tf32
NAMES = {"triton": "Triton", "liger": "Liger's kernel"}

Kernel = Literal["triton", "liger"]
Logps = Callable[[Tensor], Tensor]

_logger = logging.getLogger(__name__)
_chosen: dict[Kind, Kernel] = {}
_lines: list[str] = []


@dataclass(frozen=True)
class Kind:
    """Calls for which one kernel is chosen. `rows` is rounded up to a power of two."""

    path: Path
    rows: int
    width: int
    vocab: int
    dtype: torch.dtype
    device: torch.device
    biased: bool
    map: LogitMap

    @classmethod
    def of(cls, path: Path, hidden: Tensor, weight: Tensor, bias: Tensor | None, f: LogitMap) -> Kind:
        rows = 1 << (hidden.shape[0] - 1).bit_length()
        vocab, width = weight.shape
        return cls(path, rows, width, vocab, hidden.dtype, hidden.device, bias is not None, f)

    def __str__(self) -> str:
        path = "scoring" if self.path == "scoring" else "a frozen head"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"log-probs ({path}, up to {self.rows} rows, H={self.width}, V={self.vocab}, {dtype})"


def choose(kind: Kind, hidden: Tensor, runs: Mapping[Kernel, Logps]) -> Kernel:
    """The faster kernel for a kind of call: measured on `hidden` at the first one, remembered after that.

    `runs`: log-probs [T] of hidden by each kernel. Liger's is taken only where it agrees with Triton's. Where
    it fails (import, memory, compilation), Triton is taken, and the failure is told.
    """
    if kind not in _chosen:
        _chosen[kind], line, level = _measured(kind, hidden.detach(), runs)
        _lines.append(line)
        _logger.log(level, line)
    return _chosen[kind]


def take_lines() -> list[str]:
    """What was chosen in this process since the last call, and why: a line each, for the user."""
    lines = _lines.copy()
    _lines.clear()
    return lines


def _measured(kind: Kind, hidden: Tensor, runs: Mapping[Kernel, Logps]) -> tuple[Kernel, str, int]:
    """The kernel, the line that tells it, and the line's level."""
    expected = _call(runs["triton"], kind.path, hidden)  # compiles and tunes; if it fails, so would the call
    try:
        found = _call(runs["liger"], kind.path, hidden)
        times: dict[Kernel, list[float]] = {"triton": [], "liger": []}
        for _ in range(ROUNDS):
            for kernel, spent in times.items():
                spent.append(_seconds(partial(_call, runs[kernel], kind.path, hidden), hidden.device))
    except Exception as problem:  # whatever it is, Liger's kernel is out, and the reason is told
        failure = f"{type(problem).__name__}: {problem}"
        return "triton", f"{kind}: Triton; Liger's kernel failed: {failure}", logging.WARNING
    if not (off := _difference(found, expected)) <= AGREEMENT:
        return "triton", f"{kind}: Triton; Liger's kernel is off by {off:.1e}", logging.WARNING
    ms = {kernel: 1e3 * statistics.median(spent) for kernel, spent in times.items()}
    chosen: Kernel = "liger" if ms["liger"] < ms["triton"] else "triton"
    measured = ", ".join(f"{NAMES[kernel]} {spent:.3g} ms" for kernel, spent in ms.items())
    told = f"{kind}: {NAMES[chosen]}; measured {measured}"
    return chosen, told, logging.INFO


def _call(run: Logps, path: Path, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """A call as a training step makes it: the log-probs [T], and where the path has a backward, hidden's
    gradient [T, H] of their sum."""
    if path == "scoring":
        with torch.no_grad():
            return run(hidden), None
    with torch.enable_grad():
        x = hidden.detach().requires_grad_()
        logps = run(x)
        (grad,) = torch.autograd.grad(logps, x, torch.ones_like(logps))
    return logps.detach(), grad


def _difference(found: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> float:
    """The larger of the log-probs' largest difference and the gradients' relative one; NaN for NaN on one
    side only. Equal infinities do not differ."""
    (logps, grad), (right, right_grad) = found, expected
    same = (logps == right) | (logps.isnan() & right.isnan())
    worst = torch.where(same, 0.0, (logps - right).abs()).max()
    if grad is not None and right_grad is not None and not right.isnan().any():
        far = torch.linalg.vector_norm(grad - right_grad, dtype=torch.float32)
        worst = torch.maximum(
            worst, far / torch.linalg.vector_norm(right_grad, dtype=torch.float32).clamp_min(1e-30)
        )
    return float(worst)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3
