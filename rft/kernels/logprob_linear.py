"""The matrix products of a linear head, chunk by chunk, with 16-bit inputs and accumulation in float32.

Processors without bfloat16 arithmetic run bfloat16 products 4 to 100 times slower than float32 ones.
There, blocks of the weight are widened to float32 on the fly, which is exact and costs a few percent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rft.kernels.logprob_common import accumulate_dtype

BLOCK_ELEMENTS = 1 << 19  # weight elements widened, or weight-gradient elements accumulated, at a time


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the fastest dtype for products with `x`: x's dtype, or float32 where 16 bits are emulated."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    native = {
        torch.bfloat16: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        torch.float16: torch.cpu._is_amx_fp16_supported(),
    }
    return x.dtype if native[x.dtype] else torch.float32


def wide_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [n, H] weight^T [V, H], differentiable: [n, V] in the accumulation dtype, which is float32 for
    16-bit operands."""
    product: Tensor = _WideProduct.apply(hidden, weight)
    return product


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        wide = accumulate_dtype(hidden.dtype)
        if hidden.is_cuda and hidden.dtype != wide:
            return torch.mm(hidden, weight.t(), out_dtype=wide)
        return hidden.to(wide) @ weight.to(wide).t()  # on CPU, 16-bit products cannot return float32

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        dtype = product_dtype(hidden)
        grad = grad.to(dtype)
        of_hidden, of_weight = ctx.needs_input_grad
        return (
            (grad @ weight.to(dtype)).to(hidden.dtype) if of_hidden else None,
            (grad.t() @ hidden.to(dtype)).to(weight.dtype) if of_weight else None,
        )


class HeadProducts:
    """Compute logits of row chunks, and the gradients of the products, for a weight [V, H].

    `low_rank` is LoRA's B [V, r] (the caller applies A to all rows at once).
    """

    def __init__(self, weight: Tensor, low_rank: Tensor | None) -> None:
        self.weight = weight
        self.dtype = product_dtype(weight)
        self.low_rank = None if low_rank is None else low_rank.to(self.dtype)
        self.widens = self.dtype != weight.dtype
        self._wide: Tensor | None = None

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, weight rows in the products' dtype); native dtypes yield the whole weight."""
        if not self.widens:
            yield slice(0, self.vocab), self.weight
            return
        step = block_rows(self.weight)
        if self._wide is None:
            self._wide = self.weight.new_empty((step, self.weight.shape[1]), dtype=self.dtype)
        for start in range(0, self.vocab, step):
            rows = slice(start, min(start + step, self.vocab))
            block = self._wide[: rows.stop - rows.start]
            yield rows, block.copy_(self.weight[rows])

    def logits(self, hidden: Tensor, low: Tensor | None, out: Tensor) -> None:
        """out [n, V] = hidden [n, H] W^T + low [n, r] B^T."""
        for rows, block in self.blocks():
            torch.mm(hidden, block.t(), out=out[:, rows])
        if low is not None and self.low_rank is not None:
            out.addmm_(low, self.low_rank.t())

    def hidden_grad(self, grad_logits: Tensor, out: Tensor) -> None:
        """out [n, H] = grad_logits [n, V] W."""
        if not self.widens:
            torch.mm(grad_logits, self.weight, out=out)
            return
        total = grad_logits.new_zeros(out.shape)
        for rows, block in self.blocks():
            total.addmm_(grad_logits[:, rows], block)
        out.copy_(total)


def block_rows(weight: Tensor) -> int:
    return max(1, min(weight.shape[0], BLOCK_ELEMENTS // max(1, weight.shape[1])))


class WeightGrad:
    """Sum over chunks of grad_logits^T hidden, [V, H], in the weight's dtype, with extra accumulation bits.

    float32 and float64 are summed in place. bfloat16 is accumulated in 24 bits: the gradient tensor
    holds the upper half of a float32, one extra byte per element the next 8 bits. That is 2^-17
    relative per addition, far below the final rounding of 2^-9, for half the memory of the gradient.
    float16 is summed in a float32 buffer. A single chunk needs none of this.
    """

    def __init__(self, weight: Tensor, chunks: int) -> None:
        self.grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
        self.first = True
        self.low: Tensor | None = None
        self.total: Tensor | None = None
        if chunks > 1 and weight.dtype == torch.bfloat16:
            self.low = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        elif chunks > 1 and weight.dtype == torch.float16:
            self.total = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Add grad_logits [n, V]^T hidden [n, H]."""
        beta = 0 if self.first else 1
        if self.grad.dtype in (torch.float32, torch.float64):
            self.grad.addmm_(grad_logits.t(), hidden, beta=beta)
        else:
            step = block_rows(self.grad)
            for start in range(0, self.grad.shape[0], step):
                self._add_block(slice(start, start + step), grad_logits, hidden)
        self.first = False

    def _add_block(self, rows: slice, grad_logits: Tensor, hidden: Tensor) -> None:
        product = torch.mm(grad_logits[:, rows].t(), hidden)
        if self.total is not None:
            part = self.total[rows]
            part.copy_(product) if self.first else part.add_(product)
        elif self.low is None:
            self.grad[rows].copy_(product)
        else:
            total = product.float()
            if not self.first:
                total.add_(_join(self.grad[rows], self.low[rows]))
            _split(total, self.grad[rows], self.low[rows])

    def result(self) -> Tensor:
        """Return the gradient [V, H], rounded once to the weight's dtype."""
        if self.first:
            self.grad.zero_()
        elif self.total is not None:
            self.grad.copy_(self.total)
        elif self.low is not None:
            step = block_rows(self.grad)
            for start in range(0, self.grad.shape[0], step):
                rows = slice(start, start + step)
                self.grad[rows].copy_(_join(self.grad[rows], self.low[rows]))
        return self.grad


def _join(high: Tensor, low: Tensor) -> Tensor:
    """Return float32 whose bits 31..16 are `high` (bfloat16) and bits 15..8 `low` (uint8)."""
    bits = high.view(torch.int16).to(torch.int32).bitwise_left_shift_(8)
    return bits.bitwise_or_(low).bitwise_left_shift_(8).view(torch.float32)


def _split(x: Tensor, high: Tensor, low: Tensor) -> None:
    """Invert `_join`, rounding to nearest at bit 8. Overwrites x."""
    bits = x.view(torch.int32).add_(0x80).bitwise_right_shift_(8)
    low.copy_(bits)  # keeps the lowest byte
    high.view(torch.int16).copy_(bits.bitwise_right_shift_(8))
