"""Exact attention over a forest without masks, by merging blocks through their log-sum-exp.

For one query, let block i give the output o_i and the log-sum-exp l_i of its scores. Attention over
the union of the blocks has l = log sum_i exp(l_i) and o = sum_i exp(l_i - l) o_i (the identity behind
flash attention's tiles; Dao et al. 2022, arXiv:2205.14135, section 3.1). Its backward needs, per
block, only the *merged* o and l: probabilities are exp(score - l), and the flash kernels' backward
recomputes exactly those. So the flash kernel's backward computes each block's gradient, given the
merged output instead of the block's output; nothing is materialised and no key is copied per child.

An attention sink (a learned logit per head that takes probability and gives no value) is one more
block with output 0: it only enters l.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rft.kernels.forest import Block, Forest, Stretch

_aten = torch.ops.aten


def merged_attention(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """Compute attention over the forest: [T, H, D].

    query: [T, H, D]; key, value: [T, Hk, D], with Hk a divisor of H; any float dtype on CPU, half
    precision on CUDA. sinks: [H], or None. Differentiable once.
    """
    return _Merge.apply(query, key, value, sinks, forest, scale)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, forest: Forest, scale: float
    ) -> Tensor:
        parts = _parts(forest, q.device)
        first, *rest = parts
        dtype, saved = q.dtype, (q, k, v)
        q, k, v = (_widened(x) for x in saved)
        if not rest and first.whole and sinks is None:
            out, lse = first.forward(q, k, v, scale)
        else:
            exact = _accumulation(q)
            out = torch.empty(q.shape, dtype=exact, device=q.device)
            lse = torch.empty(q.shape[:2], dtype=exact, device=q.device)
            for part in parts:
                o, s = part.forward(q, k, v, scale)
                if not part.causal:
                    o, s = _merge(part.read(out), part.read(lse), o, s)
                part.write(out, o)
                part.write(lse, s)
            if sinks is not None:
                with_sink = torch.logaddexp(lse, sinks.to(lse.dtype))
                out.mul_((lse - with_sink).exp_().unsqueeze(-1))
                lse = with_sink
        out = out.to(dtype)
        ctx.save_for_backward(*saved, out, lse, sinks)
        ctx.forest, ctx.scale = forest, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, lse, sinks = ctx.saved_tensors
        q, k, v, out, grad = (_widened(x) for x in (*inputs, out, grad.contiguous()))
        parts = _parts(ctx.forest, q.device)
        if len(parts) == 1 and parts[0].whole:
            dq, dk, dv = parts[0].backward(grad, q, k, v, out, lse, ctx.scale)
        else:
            dq, dk, dv = (torch.empty(x.shape, dtype=_accumulation(x), device=x.device) for x in (q, k, v))
            for part in parts:  # causal parts come first and cover every token once
                a, b, c = part.backward(grad, q, k, v, out, lse, ctx.scale)
                if part.causal:
                    part.write(dq, a)
                    part.write_keys(dk, b)
                    part.write_keys(dv, c)
                else:
                    part.add(dq, a)
                    part.add_keys(dk, b)
                    part.add_keys(dv, c)
        dq, dk, dv = (d.to(x.dtype) for d, x in zip((dq, dk, dv), inputs, strict=True))
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            # d loss / d sink = -p_sink (grad . out): a sink has value zero
            pull = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            dsinks = -((sinks.to(lse.dtype) - lse).exp() * pull).sum(0).to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None


def _merge(o1: Tensor, s1: Tensor, o2: Tensor, s2: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(s1, s2)
    out = o1 * (s1 - lse).exp_().unsqueeze(-1)
    return out.addcmul_(o2.to(out.dtype), (s2 - lse).exp_().unsqueeze(-1)), lse


def _widened(x: Tensor) -> Tensor:
    """Return x in float32 if it is a half-precision tensor on CPU: there PyTorch's flash backward is about
    three times slower in bfloat16 than in float32, and its forward no faster."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x


def _accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _parts(forest: Forest, device: torch.device) -> list[_CpuPart] | list[_CudaPart]:
    if device.type == "cuda":
        return [_CudaPart(s) for s in forest.stretches]
    return [_CpuPart(b, forest.num_tokens) for b in forest.blocks]


class _CpuPart:
    """One padded block through PyTorch's flash kernels for CPU, which share keys between grouped queries."""

    def __init__(self, block: Block, num_tokens: int) -> None:
        self.block = block
        self.causal = block.causal
        self.whole = block.causal and block.queries.covers(num_tokens)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        queries, keys = self.block.queries, self.block.keys
        qb, kb, vb = (_heads_first(rows.take(x)) for rows, x in ((queries, q), (keys, k), (keys, v)))
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            qb, kb, vb, 0.0, self.causal, scale=scale
        )
        return queries.flat(out.transpose(1, 2)), queries.flat(lse.transpose(1, 2))

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys = self.block.queries, self.block.keys
        g = queries.take(grad)
        if queries.valid is not None:
            g = g * queries.valid  # padding repeats a real query, which must not be counted twice
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(g),
            *(_heads_first(rows.take(x)) for rows, x in ((queries, q), (keys, k), (keys, v), (queries, out))),
            queries.take(lse).transpose(1, 2),
            0.0,
            self.causal,
            scale=scale,
        )
        return (
            queries.flat(dq.transpose(1, 2)),
            keys.flat(dk.transpose(1, 2)),
            keys.flat(dv.transpose(1, 2)),
        )

    def read(self, x: Tensor) -> Tensor:
        return self.block.queries.read(x)

    def write(self, x: Tensor, value: Tensor) -> None:
        self.block.queries.write(x, value)

    def add(self, x: Tensor, value: Tensor) -> None:
        self.block.queries.add(x, value)

    def write_keys(self, x: Tensor, value: Tensor) -> None:
        self.block.keys.write(x, value)

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        self.block.keys.add(x, value)


class _CudaPart:
    """One variable-length call of the flash kernels in PyTorch for CUDA."""

    def __init__(self, stretch: Stretch) -> None:
        self.stretch = stretch
        self.causal = stretch.causal
        self.whole = stretch.causal and stretch.queries is None

    def _take(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
        for index, x in ((self.stretch.queries, q), (self.stretch.keys, k), (self.stretch.keys, v)):
            yield (x if index is None else x.index_select(0, index)).contiguous()

    def _lengths(self) -> tuple[Tensor, Tensor, int, int, float, bool]:
        s = self.stretch
        return s.cu_queries, s.cu_keys, s.max_queries, s.max_keys, 0.0, s.causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _aten._flash_attention_forward(
            *self._take(q, k, v), *self._lengths(), False, scale=scale
        )
        return out, lse.t()  # the kernel returns the log-sum-exp as [H, n]

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, out, lse = (self.read(x).contiguous() for x in (grad, out, lse))
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # random state, unused without dropout
        dq, dk, dv = _aten._flash_attention_backward(
            grad,
            *self._take(q, k, v),
            out,
            lse.t().contiguous(),
            *self._lengths(),
            unused,
            torch.empty(0, dtype=torch.uint64, device=q.device),
            scale=scale,
        )
        return dq, dk, dv

    def read(self, x: Tensor) -> Tensor:
        return x if self.stretch.queries is None else x.index_select(0, self.stretch.queries)

    def write(self, x: Tensor, value: Tensor) -> None:
        _write(x, self.stretch.queries, value)

    def add(self, x: Tensor, value: Tensor) -> None:
        _write(x, self.stretch.queries, self.read(x) + value)

    def write_keys(self, x: Tensor, value: Tensor) -> None:
        _write(x, self.stretch.keys, value)

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        index = self.stretch.keys
        _write(x, index, (x if index is None else x.index_select(0, index)) + value)


def _write(x: Tensor, index: Tensor | None, value: Tensor) -> None:
    if index is None:
        x.copy_(value)
    else:
        x.index_copy_(0, index, value.to(x.dtype))


def _heads_first(x: Tensor) -> Tensor:
    """[B, L, H, D] -> [B, H, L, D], with the last axis contiguous as the kernels require."""
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()
