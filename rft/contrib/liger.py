"""Log-probs of targets on a GPU by Liger's cross-entropy kernel, if liger-kernel is installed and was
measured to be faster than Triton's.

Liger Kernel (Hsu et al. 2024, arXiv:2410.10989) converts a chunk of logits in place to losses and gradients.
The surrounding products are the vendor library's, written in float32 from 16-bit inputs, so that log-probs
are as exact as Triton's: Liger's fused linear cross entropy rounds its logits to the inputs' dtype, which in
bfloat16 shifts a log-prob by up to 2^-9 of its logit, and makes old and new log-probs of two kernels differ.

It supports two tasks: scoring, without gradients (2 T H V), and the frozen head, where only hidden needs a
gradient and the forward computes d logp / d hidden (4 T H V; Triton: 6). A trained head, entropies,
LoRA factors, sampled support and float64 are not supported.

The choice between Liger and Triton: both are timed in the process, on the caller's tensors, once per
`CallKind` and process, and the choice is reported. It can differ between ranks and between runs.
Ranks exchange nothing inside a head, so their choices need not agree; and both kernels compute
softmax in float32, so results differ by the rounding of float32 sums. Triton's block sizes are autotuned
by time too: a GPU run that must be reproducible bit by bit should use "chunked". Liger's speed on a GPU has
not been measured so far; tests run it under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rft.kernels.logprob_common import LogitMap, add_message

CHUNK_BYTES = 1 << 29  # of float32 logits; with a cap and a gradient, also of its slope
IGNORED = -100  # Liger's label for rows to skip; no target has it
ROUNDS = 5  # timed calls of each kernel, alternating
AGREEMENT = 2e-2  # allowed gap of log-probs (nats) and gradients (relative) in 16 bits or tf32
NAMES = {"triton": "Triton", "liger": "Liger's kernel"}

Task = Literal["scoring", "frozen"]
Choice = Literal["triton", "liger"]
Logps = Callable[[Tensor], Tensor]

_logger = logging.getLogger(__name__)
_chosen: dict[CallKind, Choice] = {}


def try_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    f: LogitMap,
    entropy: bool,
    triton: Logps | None,
) -> Tensor | None:
    """Return log-probs [T] float32, or None to use Triton: Liger does not support the call, or is slower than
    `triton` (log-probs of hidden by Triton's kernel), if that is given for comparison."""
    task = task_of(hidden, weight, bias, entropy)
    if task is None:
        return None
    if triton is not None:
        runs: dict[Choice, Logps] = {
            "triton": triton,
            "liger": lambda x: token_logps(x, weight, bias, targets, f),
        }
        if choose(CallKind.of(task, hidden, weight, bias, f), hidden, runs) == "triton":
            return None
    return token_logps(hidden, weight, bias, targets, f)


def task_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, entropy: bool) -> Task | None:
    """Return the task for which Liger supports a call (without LoRA or support, not in float64), or None."""
    if entropy or not hidden.shape[0]:
        return None
    if not torch.is_grad_enabled():
        return "scoring"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    return "frozen" if hidden.requires_grad else "scoring"


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, f: LogitMap) -> Tensor:
    """Return log-probs [T] float32 for either task. hidden [T, H], weight [V, H], bias [V], targets [T].

    Raises ImportError without liger-kernel. Liger's checks of the int64 targets synchronise once per chunk.
    """
    if torch.is_grad_enabled() and hidden.requires_grad:
        logps: Tensor = Frozen.apply(hidden, weight, bias, targets, f)
        return logps
    return _chunked(hidden, weight, bias, targets, f, None)


class Frozen(torch.autograd.Function):
    """(hidden, weight, bias, targets, map) -> logps [T]; only hidden gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, f: LogitMap
    ) -> Tensor:
        slopes = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        logps = _chunked(hidden, weight, bias, targets, f, slopes)
        ctx.save_for_backward(slopes)
        ctx.slope = f.slope
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return slopes * (grad * -ctx.slope).to(slopes.dtype)[:, None], None, None, None, None


def _chunked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, f: LogitMap, slopes: Tensor | None
) -> Tensor:
    """Return log-probs [T]. `slopes` [T, H], if given, becomes -d logp / d hidden over the map's slope."""
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    count, vocab = hidden.shape[0], weight.shape[0]
    capped = slopes is not None and f.softcap is not None
    size = min(count, max(1, CHUNK_BYTES // (4 * vocab * (2 if capped else 1))))
    buffer = hidden.new_empty((size, vocab), dtype=torch.float32)
    caps = torch.empty_like(buffer) if capped else None
    logps = hidden.new_empty(count, dtype=torch.float32)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        z = buffer[: rows.stop - start]
        _product(hidden[rows], weight.t(), z)
        if bias is not None:
            z.add_(bias)
        cap_slope = None if caps is None else caps[: rows.stop - start]
        f.apply_(z, cap_slope)
        # if the logits require a gradient, the kernel overwrites them with it: (p - onehot) of each row
        logits = z.detach().requires_grad_(slopes is not None)
        losses = cross_entropy_forward(logits, targets[rows], None, IGNORED, 0.0, 0.0, "none", None, False)[0]
        torch.neg(losses, out=logps[rows])
        if slopes is not None:
            if cap_slope is not None:
                z.mul_(cap_slope)
            _product(z.to(weight.dtype), weight, slopes[rows])
    return logps


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out = a b, accumulated in float32, in out's dtype."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


# -- the choice by measured time ------------------------------------------------------------------------


@dataclass(frozen=True)
class CallKind:
    """The key of a kernel choice; calls with equal keys share it. `rows` is rounded up to a power of two."""

    task: Task
    rows: int
    width: int
    vocab: int
    dtype: torch.dtype
    device: torch.device
    biased: bool
    map: LogitMap

    @classmethod
    def of(cls, task: Task, hidden: Tensor, weight: Tensor, bias: Tensor | None, f: LogitMap) -> CallKind:
        rows = 1 << (hidden.shape[0] - 1).bit_length()
        vocab, width = weight.shape
        return cls(task, rows, width, vocab, hidden.dtype, hidden.device, bias is not None, f)

    def __str__(self) -> str:
        task = "scoring" if self.task == "scoring" else "a frozen head"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"log-probs ({task}, up to {self.rows} rows, H={self.width}, V={self.vocab}, {dtype})"


def choose(kind: CallKind, hidden: Tensor, runs: Mapping[Choice, Logps]) -> Choice:
    """Return the faster kernel for a kind of call, measured on `hidden` at the first call and then cached.

    `runs`: log-probs [T] of hidden by each kernel. Liger is chosen only if it agrees with Triton. If it fails
    (import, memory, compilation), Triton is chosen and the failure is reported.
    """
    if kind not in _chosen:
        _chosen[kind], line, level = _measured(kind, hidden.detach(), runs)
        add_message(line)
        _logger.log(level, line)
    return _chosen[kind]


def _measured(kind: CallKind, hidden: Tensor, runs: Mapping[Choice, Logps]) -> tuple[Choice, str, int]:
    """Measure both kernels; return the chosen kernel, the line that reports it, and the line's level."""
    expected = _call(runs["triton"], kind.task, hidden)  # compiles and tunes; must not fail
    try:
        output = _call(runs["liger"], kind.task, hidden)
        times: dict[Choice, list[float]] = {"triton": [], "liger": []}
        for _ in range(ROUNDS):
            for kernel, spent in times.items():
                spent.append(_seconds(partial(_call, runs[kernel], kind.task, hidden), hidden.device))
    except Exception as problem:  # any failure rules Liger out, and the reason is reported
        failure = f"{type(problem).__name__}: {problem}"
        return "triton", f"{kind}: Triton; Liger's kernel failed: {failure}", logging.WARNING
    if not (off := _difference(output, expected)) <= AGREEMENT:
        return "triton", f"{kind}: Triton; Liger's kernel is off by {off:.1e}", logging.WARNING
    ms = {kernel: 1e3 * statistics.median(spent) for kernel, spent in times.items()}
    chosen: Choice = "liger" if ms["liger"] < ms["triton"] else "triton"
    measured = ", ".join(f"{NAMES[kernel]} {spent:.3g} ms" for kernel, spent in ms.items())
    line = f"{kind}: {NAMES[chosen]}; measured {measured}"
    return chosen, line, logging.INFO


def _call(run: Logps, task: Task, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Run a kernel as a training step would: return the log-probs [T] and, if the task has a backward, the
    gradient [T, H] of their sum with respect to hidden."""
    if task == "scoring":
        with torch.no_grad():
            return run(hidden), None
    with torch.enable_grad():
        x = hidden.detach().requires_grad_()
        logps = run(x)
        (grad,) = torch.autograd.grad(logps, x, torch.ones_like(logps))
    return logps.detach(), grad


def _difference(output: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> float:
    """Return the larger of the log-probs' largest difference and the gradients' relative difference; NaN if
    only one side is NaN. Equal infinities do not differ."""
    (logps, grad), (right, right_grad) = output, expected
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
