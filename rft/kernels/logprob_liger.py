"""Log-probs of targets on a GPU by Liger's cross-entropy kernel, where liger-kernel is installed.

Liger Kernel (Hsu et al. 2024, arXiv:2410.10989) turns a chunk of logits in place into losses and gradients.
The products around it are the vendor library's, written in float32 from 16-bit inputs, so that log-probs
are as exact as Triton's: Liger's own fused linear cross entropy rounds its logits to the inputs' dtype, which
in bfloat16 moves a log-prob by up to 2^-9 of its logit, and old and new log-probs by different kernels apart.

It serves two paths: scoring, without gradients (2 T H V), and the frozen head, where only hidden wants a
gradient and d logp / d hidden is taken in the forward (4 T H V, to Triton's 6). A trained head, entropies,
LoRA factors, sampled support, several targets a row and float64 are not served.

`logprob_choice` decides between it and Triton. Its speed on a GPU is unmeasured so far; tests run it under
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rft.kernels.logprob_common import LogitMap

CHUNK_BYTES = 1 << 29  # of float32 logits; with a cap and a gradient, of its slope too
IGNORED = -100  # Liger's mark of rows to leave out; no target has it
REMEDY = "pip install 'liger-kernel>=0.8.5,<0.9'"

Path = Literal["scoring", "frozen"]


def installed() -> bool:
    """Whether liger-kernel is there to be imported."""
    return importlib.util.find_spec("liger_kernel") is not None


def path_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, entropy: bool) -> Path | None:
    """The path on which Liger's kernel serves a call (of one target a row, without LoRA or support, not in
    float64), None where it does not."""
    if entropy or not hidden.shape[0]:
        return None
    if not torch.is_grad_enabled():
        return "scoring"
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    return "frozen" if hidden.requires_grad else "scoring"


def token_logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, f: LogitMap) -> Tensor:
    """Log-probs [T] float32 on either path. hidden [T, H], weight [V, H], bias [V], targets [T] int64.

    Raises ImportError without liger-kernel. Liger's checks of the targets wait for the device once a chunk.
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
    """Log-probs [T]. `slopes` [T, H], if given, becomes -d logp / d hidden over the map's slope."""
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
        # it writes gradients over the logits where these require one: (p - onehot) of each row
        logits = z.detach().requires_grad_(slopes is not None)
        losses = cross_entropy_forward(logits, targets[rows], None, IGNORED, 0.0, 0.0, "none", None, False)[0]
        torch.neg(losses, out=logps[rows])
        if slopes is not None:
            if cap_slope is not None:
                z.mul_(cap_slope)
            _product(z.to(weight.dtype), weight, slopes[rows])
    return logps


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, accumulated in float32, in out's dtype."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
