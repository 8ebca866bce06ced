"""Log-probs of targets on a GPU, in Triton: softmax inside the products, float32 accumulation.

Forward (2 T H V): each program processes a block of rows for one share of the vocabulary with a running
maximum, sum and entropy term; torch merges the shares. Backward (6 T H V): one kernel recomputes the
logits of a block of the vocabulary for all rows and writes their gradient; two products by the vendor's
library finish the block. With vocabulary blocks outermost, each row of the weight gradient is one product
over all rows, rounded once, and only the hidden gradient needs a float32 sum.

Runs on CPU tensors under TRITON_INTERPRET=1, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rft.kernels.logprob_common import LogitMap

INTERPRETED = bool(triton.knobs.runtime.interpret)
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter multiplies bfloat16's raw bits as integers
GRAD_BYTES = 1 << 29  # logits' gradients of one vocabulary block
PROGRAMS_PER_PROCESSOR = 4  # target number of forward programs, so that a partial last wave costs little


def _configs(*blocks: tuple[int, int, int, int, int]) -> list[triton.Config]:
    """Make configs from (rows, columns, depth, warps, stages); a small one if interpreted."""
    chosen = [(16, 32, 16, 4, 1)] if INTERPRETED else blocks
    return [triton.Config({"BM": m, "BN": n, "BK": k}, num_warps=w, num_stages=s) for m, n, k, w, s in chosen]


HOPPER_AND_AMPERE = _configs(
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 4, 4),
    (64, 128, 32, 4, 4),
)


@triton.jit
def _products(
    h_ptr, w_ptr, bias_ptr, rows, cols, T, V, H,
    EXACT: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, BN] float32 of h W^T + b; elements out of range are 0."""
    depth = tl.arange(0, BK)
    h = h_ptr + rows[:, None].to(tl.int64) * H + depth[None, :]
    w = w_ptr + cols[None, :].to(tl.int64) * H + depth[:, None]
    x = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, H, BK):
        inside = start + depth < H
        a = tl.load(h + start, mask=(rows < T)[:, None] & inside[None, :], other=0.0)
        b = tl.load(w + start, mask=(cols < V)[None, :] & inside[:, None], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        x = tl.dot(a, b, x, input_precision="ieee" if EXACT else "tf32")
    if BIAS:
        x += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.autotune(configs=HOPPER_AND_AMPERE, key=["V", "H"])
@triton.jit
def _forward(
    h_ptr, w_ptr, bias_ptr, target_ptr, top_ptr, total_ptr, weighted_ptr, found_ptr,
    T, V, H, splits, inner, outer,
    EXACT: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, ENTROPY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """For a block of rows and a share of the vocabulary: max z, sum e^(z - max), sum e^(z - max) (z - max)
    and the target's z, each stored at [share, row]. z = outer tanh(inner x) with CAP, else inner x."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    share = tl.program_id(1)
    span = tl.cdiv(tl.cdiv(V, BN), splits) * BN
    target = tl.load(target_ptr + rows, mask=rows < T, other=-1)
    top = tl.full((BM,), -1e30, dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    weighted = tl.zeros((BM,), dtype=tl.float32)
    target_logit = tl.zeros((BM,), dtype=tl.float32)
    for start in range(share * span, tl.minimum(share * span + span, V), BN):
        cols = start + tl.arange(0, BN)
        z = _products(h_ptr, w_ptr, bias_ptr, rows, cols, T, V, H, EXACT, BIAS, BM, BN, BK) * inner
        if CAP:
            z = _tanh(z) * outer
        target_logit += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), axis=1)
        z = tl.where((cols < V)[None, :], z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, axis=1))
        below = tl.maximum(z - new_top[:, None], -1e4)
        e = tl.exp(below)
        shrink = tl.exp(top - new_top)
        if ENTROPY:
            weighted = shrink * (weighted + total * (top - new_top)) + tl.sum(e * below, axis=1)
        total = shrink * total + tl.sum(e, axis=1)
        top = new_top
    at = share.to(tl.int64) * T + rows
    tl.store(top_ptr + at, top, mask=rows < T)
    tl.store(total_ptr + at, total, mask=rows < T)
    tl.store(found_ptr + at, target_logit, mask=rows < T)
    if ENTROPY:
        tl.store(weighted_ptr + at, weighted, mask=rows < T)


@triton.autotune(configs=HOPPER_AND_AMPERE, key=["V", "H"])
@triton.jit
def _logit_grad(
    h_ptr, w_ptr, bias_ptr, target_ptr, lse_ptr, grad_ptr, entropy_ptr, grad_entropy_ptr, out_ptr,
    T, V, H, first, width, inner, outer, slope,
    EXACT: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, ENTROPY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[t, j] = d loss / d products[t, first + j] for j < width, in out's dtype."""
    # programs close in time share weight rows: 8 row blocks per column block
    count_m, count_n = tl.cdiv(T, BM), tl.cdiv(width, BN)
    pid = tl.program_id(0)
    group = pid // (8 * count_n)
    group_m = tl.minimum(count_m - group * 8, 8)
    rows = (group * 8 + (pid % (8 * count_n)) % group_m) * BM + tl.arange(0, BM)
    local = ((pid % (8 * count_n)) // group_m) * BN + tl.arange(0, BN)
    cols = first + local
    z = _products(h_ptr, w_ptr, bias_ptr, rows, cols, T, V, H, EXACT, BIAS, BM, BN, BK) * inner
    cap_slope = 1.0
    if CAP:
        tanh = _tanh(z)
        cap_slope = 1.0 - tanh * tanh
        z = tanh * outer
    keep = rows < T
    grad = tl.load(grad_ptr + rows, mask=keep, other=0.0)
    target = tl.load(target_ptr + rows, mask=keep, other=-1)
    logp = z - tl.load(lse_ptr + rows, mask=keep, other=0.0)[:, None]
    pull = grad[:, None]
    if ENTROPY:
        surplus = tl.maximum(logp, -1e4) + tl.load(entropy_ptr + rows, mask=keep, other=0.0)[:, None]
        pull += tl.load(grad_entropy_ptr + rows, mask=keep, other=0.0)[:, None] * surplus
    d = tl.where(cols[None, :] == target[:, None], grad[:, None], 0.0) - tl.exp(logp) * pull
    d = d * slope * cap_slope
    at = rows[:, None].to(tl.int64) * width + local[None, :]
    tl.store(out_ptr + at, d.to(out_ptr.dtype.element_ty), mask=keep[:, None] & (local < width)[None, :])


def _scales(f: LogitMap) -> tuple[float, float]:
    """(inner, outer) of z = outer tanh(inner x), or z = inner x without a cap."""
    if f.softcap is None:
        return f.slope, 1.0
    return f.logit_scale / f.softcap, f.softcap / f.temperature


def _flags(hidden: Tensor, bias: Tensor | None, f: LogitMap, entropy: bool) -> dict[str, bool]:
    exact = hidden.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return {"EXACT": exact, "BIAS": bias is not None, "CAP": f.softcap is not None, "ENTROPY": entropy}


def _splits(hidden: Tensor, vocab: int) -> int:
    """Return the number of vocabulary shares, such that few rows still fill the device."""
    if not hidden.is_cuda:
        return min(3, vocab)
    processors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // max(1, -(-hidden.shape[0] // 128)))
    return max(1, min(wanted, -(-vocab // 256)))


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, f: LogitMap, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return logps, logsumexp and (if asked) entropies, each [T] float32."""
    (t, width), vocab = hidden.shape, weight.shape[0]
    splits = _splits(hidden, vocab)
    parts = hidden.new_empty((4, splits, t), dtype=torch.float32)
    top, total, weighted, target_logit = parts
    _forward[lambda meta: (max(1, triton.cdiv(t, meta["BM"])), splits)](
        hidden, weight, weight if bias is None else bias, targets, top, total, weighted, target_logit,
        t, vocab, width, splits, *_scales(f), **_flags(hidden, bias, f, entropy),
    )  # fmt: skip
    part_lse = top + total.log()
    lse = part_lse.logsumexp(0)
    entropies = None
    if entropy:
        # sum p z = sum over shares of (weighted + total top) e^top / e^lse; relative to lse, against overflow
        share = (part_lse - lse).exp()
        mean = torch.where(total > 0, weighted / total + top - lse, 0.0)
        entropies = -(share * mean).sum(0)
    return target_logit.sum(0) - lse, lse, entropies


class TritonLogps(torch.autograd.Function):
    """(hidden, weight, bias, targets [T], map, entropy) -> logps [T], entropies [T] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        f: LogitMap,
        entropy: bool,
    ) -> Any:
        hidden, weight = hidden.contiguous(), weight.contiguous()
        logps, lse, entropies = forward(hidden, weight, bias, targets, f, entropy)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropies)
        ctx.map = f
        ctx.set_materialize_grads(False)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None = None) -> Any:
        hidden, weight, bias, targets, lse, entropies = ctx.saved_tensors
        f, (t, width), vocab = ctx.map, hidden.shape, weight.shape[0]
        want_h, want_w, want_b = ctx.needs_input_grad[:3]
        entropy = entropies is not None and grad_entropy is not None
        none = grad = torch.zeros_like(lse) if grad is None else grad.contiguous()
        extra = (
            (entropies, grad_entropy.contiguous()) if entropy and grad_entropy is not None else (none, none)
        )
        size = max(128, GRAD_BYTES // max(1, t * hidden.itemsize) // 128 * 128)
        buffer = hidden.new_empty(t * min(size, vocab))
        grad_h = hidden.new_zeros(hidden.shape, dtype=torch.float32) if want_h else None
        grad_w = torch.empty_like(weight) if want_w else None
        grad_b = torch.empty_like(bias) if want_b else None
        for first in range(0, vocab, size):
            block = slice(first, min(first + size, vocab))
            n = block.stop - first
            out = buffer[: t * n].view(t, n)
            _logit_grad[lambda meta, n=n: (max(1, triton.cdiv(t, meta["BM"])) * triton.cdiv(n, meta["BN"]),)](
                hidden, weight, weight if bias is None else bias, targets, lse, grad, *extra, out,
                t, vocab, width, first, n, *_scales(f), f.slope, **_flags(hidden, bias, f, entropy),
            )  # fmt: skip
            if grad_h is not None:
                _add_product(grad_h, out, weight[block])
            if grad_w is not None:
                torch.mm(out.t(), hidden, out=grad_w[block])
            if grad_b is not None:
                grad_b[block] = out.sum(0, dtype=torch.float32)
        return None if grad_h is None else grad_h.to(hidden.dtype), grad_w, grad_b, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to total [m, n] float32, for any dtype of a and b."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        total.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        total.add_(a.float() @ b.float())
