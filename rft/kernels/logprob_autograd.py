"""The ways from log-probs to gradients, as differentiable functions of `logprob_chunked`'s passes.

- recompute: any upstream gradient; the chunk's logits are computed again in the backward (8 T H V),
  unless all rows fit one chunk, which is kept then
- known: the loss is a weighted sum of the log-probs; its gradient is taken in the forward (6 T H V)
- expected: the upstream gradient is foretold; taken in the forward too, and computed again if it was not so
- frozen: no head parameter wants a gradient; the forward keeps d logp / d hidden (4 T H V)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rft.kernels import logprob_chunked as chunked
from rft.kernels.logprob_chunked import Chunks, Rows, Upstream
from rft.kernels.logprob_common import LogitMap, spread
from rft.kernels.logprob_linear import Head

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)
FORETOLD = 1e-5  # relative difference of an upstream gradient from the expected one that rounding explains


class Recompute(torch.autograd.Function):
    """(hidden, weight, bias, low, low_rank, rows, map, entropy) -> logps [T, K], entropies [T] or None."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        low_rank: Tensor | None,
        rows: Rows,
        f: LogitMap,
        entropy: bool,
    ) -> Any:
        chunks = Chunks(Head(weight, low_rank), hidden, low, bias, rows, f)
        totals = hidden.new_empty(hidden.shape[0], dtype=chunks.acc) if chunks.single else None
        logps, lse, entropies = chunked.forward(chunks, entropy, totals)
        ctx.kept = None if totals is None else (chunks.buffer, totals)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, low, low_rank, rows.targets, rows.support, lse, entropies)
        ctx.map = f
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None = None) -> Any:
        kept, ctx.kept = ctx.kept, None  # spent by the first backward; a second one recomputes
        return *recomputed(ctx, grad, grad_entropy, kept), *[None] * 3


def recomputed(
    ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None, kept: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor | None, ...]:
    """The gradients of what `NAMES` names, from logits computed again, or from the only chunk, `kept`: its
    exp(z - max), and their sums."""
    hidden, weight, bias, low, low_rank, targets, support, lse, entropies = ctx.saved_tensors
    grad = lse.new_zeros(targets.shape) if grad is None else grad * ctx.map.slope
    wants = dict(zip(chunked.NAMES, ctx.needs_input_grad, strict=False))
    buffer = None if kept is None else kept[0]
    count = hidden.shape[0]
    used = None if kept is not None else pulled_rows(grad, grad_entropy)
    if used is not None:
        hidden, targets, lse, grad = (_at(x, used) for x in (hidden, targets, lse, grad))
        low, support, entropies, grad_entropy = (
            _at(x, used) for x in (low, support, entropies, grad_entropy)
        )
    rows = Rows(targets, support)
    chunks = Chunks(Head(weight, low_rank), hidden, low, bias, rows, ctx.map, buffer=buffer)
    if kept is not None and grad_entropy is None:
        grads = chunked.backward_from_kept(chunks, grad, kept[1], wants)
    else:
        up = Upstream(grad, grad.sum(1), lse)
        if entropies is not None and grad_entropy is not None:
            up = replace(up, entropy=entropies, grad_entropy=grad_entropy * ctx.map.slope)
        grads = chunked.backward(chunks, up, wants)
    if used is not None:
        grads.spread(used, count)
    return grads.for_inputs(bias, low_rank)


def _at(x: MaybeTensor, index: Tensor | None) -> MaybeTensor:
    """Rows of x, or all."""
    return x if x is None or index is None else x[index]


def pulled_rows(grad: Tensor, grad_entropy: Tensor | None) -> Tensor | None:
    """Indices of the rows with an upstream gradient, [T, K] and [T]; None if all have one. Rows without
    (groups whose advantages are 0) are not recomputed. On a GPU nothing waits to find out."""
    if grad.is_cuda:
        return None
    pulled = (grad != 0).any(1)
    if grad_entropy is not None:
        pulled |= grad_entropy != 0
    return None if bool(pulled.all()) else pulled.nonzero()[:, 0]


class Expected(torch.autograd.Function):
    """(hidden, weight, bias, low, low_rank, rows, map, entropy, expected [T]) -> logps [T, 1], entropies."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        low_rank: Tensor | None,
        rows: Rows,
        f: LogitMap,
        entropy: bool,
        expected: Tensor,
    ) -> Any:
        wants = dict(zip(chunked.NAMES, ctx.needs_input_grad, strict=False))
        head, count = Head(weight, low_rank), hidden.shape[0]

        def part(index: Tensor | None) -> Chunks:
            few = Rows(_at(rows.targets, index), _at(rows.support, index))
            return Chunks(head, _at(hidden, index), _at(low, index), bias, few, f)

        used = pulled_rows(expected[:, None], None)
        logps, lse, entropies, grads = chunked.differentiate_forward(
            part(used), _at(expected, used), wants, entropy
        )
        if used is not None:  # the others have a forward only
            unused = (expected == 0).nonzero()[:, 0]
            rest, rest_lse, rest_entropies = chunked.forward(part(unused), entropy)
            logps = spread(logps, used, count).index_copy_(0, unused, rest[:, 0])
            lse = spread(lse, used, count).index_copy_(0, unused, rest_lse)
            if entropies is not None and rest_entropies is not None:
                entropies = spread(entropies, used, count).index_copy_(0, unused, rest_entropies)
            grads.spread(used, count)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, low, low_rank, rows.targets, rows.support, lse, entropies)
        ctx.map, ctx.expected = f, expected
        ctx.grads = grads.for_inputs(bias, low_rank)
        return logps[:, None], entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None = None) -> Any:
        grads, ctx.grads = ctx.grads, None
        factor = None
        if grads is not None and grad is not None and grad_entropy is None:
            factor = foretold(grad[:, 0], ctx.expected)
        if factor is None:
            grads = None  # freed before the others are made
            return *recomputed(ctx, grad, grad_entropy), *[None] * 4
        if factor != 1:
            grads = tuple(None if g is None else g.mul_(factor) for g in grads)
        return *grads, *[None] * 4


def foretold(grad: Tensor, expected: Tensor) -> float | None:
    """The factor by which the upstream gradient [T] is the expected one, None where it is another."""
    expected = expected.to(grad.dtype)
    square = float(expected.dot(expected))
    factor = float(grad.dot(expected)) / square if square else 1.0
    if abs(factor - 1) <= FORETOLD / 10:
        factor = 1.0
    wanted = factor * expected
    return factor if bool(((grad - wanted).abs() <= FORETOLD * wanted.abs()).all()) else None


class Frozen(torch.autograd.Function):
    """(hidden, weight, bias, rows, map) -> logps [T, 1]; only hidden gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, f: LogitMap
    ) -> Tensor:
        chunks = Chunks(Head(weight, None), hidden, None, bias, rows, f)
        ones = hidden.new_ones(hidden.shape[0], dtype=chunks.acc)
        logps, _, _, grads = chunked.differentiate_forward(chunks, ones, {"hidden": True})
        ctx.save_for_backward(grads.hidden)
        return logps[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return slopes * grad.to(slopes.dtype), *[None] * 4


class Known(torch.autograd.Function):
    """(hidden, weight, bias, low, low_rank, rows, map, coefficients [T]) -> loss [], logps [T]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        low_rank: Tensor | None,
        rows: Rows,
        f: LogitMap,
        coefficients: Tensor,
    ) -> Any:
        wants = dict(zip(chunked.NAMES, ctx.needs_input_grad, strict=False))
        chunks = Chunks(Head(weight, low_rank), hidden, low, bias, rows, f)
        logps, _, _, grads = chunked.differentiate_forward(chunks, coefficients, wants)
        # not `save_for_backward`: the only references must pass on, or autograd copies them once more
        ctx.grads = grads.for_inputs(bias, low_rank)
        ctx.mark_non_differentiable(logps)
        return (logps * coefficients).sum(), logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the gradients of linear_logp_loss were taken already; call it again")
        if grad.is_cuda or grad != 1:
            grads = tuple(None if g is None else g.mul_(grad) for g in grads)
        return *grads, *[None] * 3
