"""Log-probs of targets without the [T, V] logits: row chunks, each reduced in cache-sized tiles.

One chunk of logits is allocated once and filled by products with `out=`; softmax runs in place on tiles
of a few rows that stay in cache. The two autograd functions at the end get gradients by

- recomputation, for any upstream gradient: the backward computes a chunk's logits again (8 T H V),
  unless all rows fit into one chunk, which is then kept
- prediction: the forward also computes the backward for a predicted upstream gradient (6 T H V), which may
  depend on each row's log-prob; if the prediction was wrong, the logits are computed again
- a frozen head: no parameter of the head needs a gradient; the forward stores d logp / d hidden (4 T H V)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rft.kernels.logprob_common import LogitMap, RowGradient, accumulate_dtype, chunk_rows, spread
from rft.kernels.logprob_linear import HeadProducts, WeightGrad

MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)

TILE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}  # the cache size on CPU; enough to fill a GPU

LOWEST = -1e4  # replaces -inf in p * log p: its exponential is 0 as well
PREDICTED = 1e-5  # relative difference of upstream gradient and prediction that rounding explains


@dataclass(frozen=True)
class Targets:
    """Per row: the target [T] and the packed support [T, ceil(V/8)] or None."""

    targets: Tensor
    support: Tensor | None = None


class Chunks:
    """A pass over row chunks: buffers, products, and tiles of logits in the accumulation dtype."""

    def __init__(
        self,
        head: HeadProducts,
        hidden: Tensor,
        low: Tensor | None,
        bias: Tensor | None,
        rows: Targets,
        f: LogitMap,
        like: Chunks | None = None,
        buffer: Tensor | None = None,
    ) -> None:
        """`like`: another pass over the same rows, to iterate in step with. `buffer`: a buffer to reuse."""
        self.head, self.hidden, self.low, self.rows, self.map = head, hidden, low, rows, f
        self.acc = accumulate_dtype(hidden.dtype)
        self.bias = None if bias is None else bias.to(self.acc)
        count, vocab = hidden.shape[0], head.vocab
        itemsize = head.dtype.itemsize
        # a widened head's chunk is float32: half the bytes leave room for the widened blocks
        self.size = chunk_rows(count, vocab, itemsize * 2 if head.widens else itemsize)
        self.number = -(-count // self.size)
        tile_bytes = TILE_BYTES.get(hidden.device.type, TILE_BYTES["cuda"])
        self.tile_rows = max(1, min(self.size, tile_bytes // (vocab * self.acc.itemsize)))
        if like is not None:
            self.size, self.number, self.tile_rows = like.size, like.number, like.tile_rows
        self.buffer = hidden.new_empty((self.size, vocab), dtype=head.dtype) if buffer is None else buffer
        self.in_place = head.dtype == self.acc
        self._tiles: dict[str, Tensor] = {}

    @property
    def single(self) -> bool:
        """Whether all rows are one chunk, so that the forward's buffer can serve the backward unchanged."""
        return self.number == 1 and self.in_place and self.map.softcap is None

    def tile(self, name: str, n: int) -> Tensor:
        """Return a scratch tile [n, V] in the accumulation dtype, allocated once."""
        if name not in self._tiles:
            shape = (self.tile_rows, self.head.vocab)
            self._tiles[name] = self.hidden.new_empty(shape, dtype=self.acc)
        return self._tiles[name][:n]

    def __iter__(self) -> Any:
        """Yield (slice of rows, hidden [n, H], low [n, r] or None, logit products [n, V])."""
        dtype = self.head.dtype
        for start in range(0, self.hidden.shape[0], self.size):
            rows = slice(start, min(start + self.size, self.hidden.shape[0]))
            h = self.hidden[rows].to(dtype)
            low = None if self.low is None else self.low[rows].to(dtype)
            out = self.buffer[: rows.stop - rows.start]
            self.head.logits(h, low, out)
            yield rows, h, low, out

    def tiles(self, chunk: slice, products: Tensor, cap_slope: bool = False) -> Any:
        """Yield (slice of all rows, slice of the chunk's rows, logits [r, V], 1 - tanh^2 or None)."""
        for start in range(0, products.shape[0], self.tile_rows):
            inner = slice(start, min(start + self.tile_rows, products.shape[0]))
            rows = slice(chunk.start + inner.start, chunk.start + inner.stop)
            z = products[inner]
            if not self.in_place:
                z = self.tile("logits", z.shape[0]).copy_(z)
            if self.bias is not None:
                z.add_(self.bias)
            slope = self.tile("slope", z.shape[0]) if cap_slope and self.map.softcap else None
            self.map.apply_(z, slope)
            if self.rows.support is not None:
                keep_support_(z, self.rows.support[rows], self.rows.targets[rows, None])
            yield rows, inner, z, slope


def unpack_support(packed: Tensor, vocab: int) -> Tensor:
    """[n, ceil(V/8)] uint8 -> [n, V] bool; bit j of byte i is token 8 i + j."""
    bits = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab]


def keep_support_(z: Tensor, packed: Tensor, targets: Tensor) -> None:
    """Set logits [r, V] outside the support to -inf, except at the targets [r, 1]."""
    outside = unpack_support(packed, z.shape[1]).logical_not_().scatter_(1, targets, False)
    z.masked_fill_(outside, -torch.inf)


def softmax_tile_(
    z: Tensor, targets: Tensor, scratch: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Overwrite z [r, V] with exp(z - max).

    Returns logps [r], logsumexp [r], sum of exp [r] and, with `scratch` [r, V], the entropy [r].
    """
    target = z.gather(1, targets[:, None])[:, 0]
    top = z.amax(1, keepdim=True)
    z.sub_(top)
    if scratch is None:
        total = z.exp_().sum(1)
        lse = top[:, 0] + total.log()
        return target - lse, lse, total, total
    torch.clamp(z, min=LOWEST, out=scratch)
    total = z.exp_().sum(1)
    entropy = total.log() - scratch.mul_(z).sum(1) / total
    lse = top[:, 0] + total.log()
    return target - lse, lse, total, entropy


def forward(
    chunks: Chunks, entropy: bool, totals: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return logps [T], logsumexp [T] and (if asked) entropies [T]; `totals` [T] gets sum exp(z - max)."""
    targets = chunks.rows.targets
    logps = chunks.hidden.new_empty(targets.shape, dtype=chunks.acc)
    lse = chunks.hidden.new_empty(targets.shape[0], dtype=chunks.acc)
    entropies = torch.empty_like(lse) if entropy else None
    for chunk, _, _, products in chunks:
        for rows, _, z, _ in chunks.tiles(chunk, products):
            scratch = chunks.tile("scratch", z.shape[0]) if entropies is not None else None
            logps[rows], lse[rows], total, h = softmax_tile_(z, targets[rows], scratch)
            if totals is not None:
                totals[rows] = total
            if entropies is not None:
                entropies[rows] = h
    return logps, lse, entropies


@dataclass(frozen=True)
class Upstream:
    """Gradients of log-probs [T] and entropies [T] (or None), and the forward's logsumexp and entropies."""

    grad: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    grad_entropy: Tensor | None = None

    def grad_tile_(self, z: Tensor, rows: slice, targets: Tensor, chunks: Chunks) -> None:
        """Overwrite z [r, V] with grad (onehot - p) - grad_entropy p (log p + entropy)."""
        z.sub_(self.lse[rows, None])
        if self.grad_entropy is None or self.entropy is None:
            z.exp_().mul_(-self.grad[rows, None])
        else:
            z.clamp_(min=LOWEST)
            p = torch.exp(z, out=chunks.tile("scratch", z.shape[0]))
            z.add_(self.entropy[rows, None]).mul_(self.grad_entropy[rows, None])
            z.add_(self.grad[rows, None]).mul_(p).neg_()
        z.scatter_add_(1, targets[:, None], self.grad[rows, None])


class Gradients:
    """Gradients of hidden [T, H], low [T, r], weight, B and bias, accumulated chunk by chunk."""

    def __init__(self, chunks: Chunks, wants: dict[str, bool]) -> None:
        head = chunks.head
        self.head, self.acc = head, chunks.acc
        empty, zeros = chunks.hidden.new_empty, chunks.hidden.new_zeros
        self.hidden = empty(chunks.hidden.shape) if wants["hidden"] else None
        self._weight = WeightGrad(head.weight, chunks.number) if wants.get("weight") else None
        self.bias = zeros(head.vocab, dtype=self.acc) if wants.get("bias") else None
        self.low = torch.empty_like(chunks.low) if wants.get("low") and chunks.low is not None else None
        b = head.low_rank
        self.low_rank = zeros(b.shape, dtype=self.acc) if wants.get("low_rank") and b is not None else None

    def add(
        self, rows: slice, hidden: Tensor, low: Tensor | None, grad: Tensor, scale: Tensor | None = None
    ) -> None:
        """Accumulate the gradient of the chunk's products: grad [n, V], times scale [n] row by row. Factors
        of width H are scaled instead of grad."""
        if self.hidden is not None:
            self.head.hidden_grad(grad, self.hidden[rows])
            if scale is not None:
                self.hidden[rows].mul_(scale[:, None])
        if self._weight is not None:
            self._weight.add(grad, _scaled(hidden, scale))
        if self.bias is not None:
            self.bias += _scaled(grad, scale).sum(0, dtype=self.acc)
        if self.low is not None and self.head.low_rank is not None:
            self.low[rows] = _scaled(grad @ self.head.low_rank, scale)
        if self.low_rank is not None and low is not None:
            self.low_rank += grad.t() @ _scaled(low, scale)

    @property
    def weight(self) -> Tensor | None:
        return None if self._weight is None else self._weight.result()

    def spread(self, rows: Tensor, count: int) -> None:
        """Scatter per-row gradients to [count, ...], 0 except at `rows`, the indices of this pass."""
        self.hidden = None if self.hidden is None else spread(self.hidden, rows, count)
        self.low = None if self.low is None else spread(self.low, rows, count)

    def for_inputs(self, bias: Tensor | None, low_rank: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Return them in the order of `NAMES`, with bias and B rounded to their inputs' dtypes."""
        of_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        of_b = None if self.low_rank is None or low_rank is None else self.low_rank.to(low_rank.dtype)
        return self.hidden, self.weight, of_bias, self.low, of_b


NAMES = ("hidden", "weight", "bias", "low", "low_rank")  # the inputs that may need gradients, in order


def backward(chunks: Chunks, up: Upstream, wants: dict[str, bool]) -> Gradients:
    """Recompute the logits and backpropagate `up` through them."""
    grads = Gradients(chunks, wants)
    for chunk, h, low, products in chunks:
        for rows, inner, z, cap_slope in chunks.tiles(chunk, products, cap_slope=True):
            up.grad_tile_(z, rows, chunks.rows.targets[rows], chunks)
            finish_tile(z, cap_slope, products[inner])
        grads.add(chunk, h, low, products)
    return grads


def backward_from_kept(chunks: Chunks, grad: Tensor, totals: Tensor, wants: dict[str, bool]) -> Gradients:
    """Backpropagate grad [T] from a buffer that still holds exp(z - max) of the only chunk."""
    grads = Gradients(chunks, wants)
    p = chunks.buffer[: grad.shape[0]]
    for start in range(0, p.shape[0], chunks.tile_rows):
        rows = slice(start, start + chunks.tile_rows)
        p[rows].mul_((-grad[rows] / totals[rows])[:, None])
        p[rows].scatter_add_(1, chunks.rows.targets[rows, None], grad[rows, None])
    low = None if chunks.low is None else chunks.low.to(chunks.head.dtype)
    grads.add(slice(0, p.shape[0]), chunks.hidden.to(chunks.head.dtype), low, p)
    return grads


def finish_tile(z: Tensor, cap_slope: Tensor | None, products: Tensor) -> None:
    """Convert the gradient of logits to that of the products, stored over the products."""
    if cap_slope is not None:
        z.mul_(cap_slope)
    if z.data_ptr() != products.data_ptr():
        products.copy_(z)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """Multiply x [n, ...] by scale [n], in x's dtype."""
    return x if scale is None else (x * scale[:, None]).to(x.dtype)


def differentiate_forward(
    chunks: Chunks, upstream: Tensor | RowGradient, wants: dict[str, bool], entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Gradients]:
    """Return logps [T], logsumexp [T], entropies [T] (if asked), the upstream gradient [T] of the log-probs,
    and the gradients that follow from it, in one pass."""
    targets = chunks.rows.targets
    logps = chunks.hidden.new_empty(targets.shape, dtype=chunks.acc)
    lse, applied = torch.empty_like(logps), torch.empty_like(logps)
    entropies = torch.empty_like(lse) if entropy else None
    grads = Gradients(chunks, wants)
    for chunk, h, low, products in chunks:
        for rows, inner, z, cap_slope in chunks.tiles(chunk, products, cap_slope=True):
            scratch = chunks.tile("scratch", z.shape[0]) if entropies is not None else None
            logps[rows], lse[rows], total, row_entropy = softmax_tile_(z, targets[rows], scratch)
            if entropies is not None:
                entropies[rows] = row_entropy
            z.div_(total[:, None])
            z.scatter_add_(1, targets[rows, None], z.new_full((z.shape[0], 1), -1.0))
            finish_tile(z, cap_slope, products[inner])  # now p - onehot
        applied[chunk] = (
            upstream(chunk, logps[chunk]) if isinstance(upstream, RowGradient) else upstream[chunk]
        )
        grads.add(chunk, h, low, products, applied[chunk] * -chunks.map.slope)
    return logps, lse, entropies, applied, grads


# -- differentiable functions of these passes ----------------------------------------------------------


class ChunkedLogps(torch.autograd.Function):
    """(hidden, weight, bias, low, low_rank, rows, map, entropy, expected [T] or None) -> logps [T], entropies
    [T] or None. `expected` is the predicted upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        low_rank: Tensor | None,
        rows: Targets,
        f: LogitMap,
        entropy: bool,
        expected: Tensor | RowGradient | None,
    ) -> Any:
        head = HeadProducts(weight, low_rank)
        ctx.map, ctx.expected, ctx.kept, ctx.grads = f, None, None, None
        if expected is None:
            chunks = Chunks(head, hidden, low, bias, rows, f)
            totals = hidden.new_empty(hidden.shape[0], dtype=chunks.acc) if chunks.single else None
            logps, lse, entropies = forward(chunks, entropy, totals)
            ctx.kept = None if totals is None else (chunks.buffer, totals)
        else:
            count = hidden.shape[0]

            def part(index: Tensor | None) -> Chunks:
                few = Targets(_at(rows.targets, index), _at(rows.support, index))
                return Chunks(head, _at(hidden, index), _at(low, index), bias, few, f)

            wants = dict(zip(NAMES, ctx.needs_input_grad, strict=False))
            used = pulled_rows(expected, None)
            upstream = expected if used is None else expected[used]
            logps, lse, entropies, ctx.expected, grads = differentiate_forward(
                part(used), upstream, wants, entropy
            )
            if used is not None:  # the other rows have a forward only
                unused = torch.ones(count, dtype=torch.bool, device=used.device)
                unused = unused.index_fill_(0, used, False).nonzero()[:, 0]
                rest, rest_lse, rest_entropies = forward(part(unused), entropy)
                logps = spread(logps, used, count).index_copy_(0, unused, rest)
                lse = spread(lse, used, count).index_copy_(0, unused, rest_lse)
                ctx.expected = spread(ctx.expected, used, count)
                if entropies is not None and rest_entropies is not None:
                    entropies = spread(entropies, used, count).index_copy_(0, unused, rest_entropies)
                grads.spread(used, count)
            # not `save_for_backward`: with any other reference, autograd would copy the gradients again
            ctx.grads = grads.for_inputs(bias, low_rank)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, low, low_rank, rows.targets, rows.support, lse, entropies)
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None = None) -> Any:
        # the first backward consumes both; a second one recomputes
        kept, ctx.kept = ctx.kept, None
        grads, ctx.grads = ctx.grads, None
        factor = None
        if grads is not None and grad is not None and grad_entropy is None:
            factor = predicted_factor(grad, ctx.expected)
        if factor is None:
            grads = None  # freed before the new ones are allocated
            return *recomputed(ctx, grad, grad_entropy, kept), *[None] * 4
        if factor != 1:
            grads = tuple(None if g is None else g.mul_(factor) for g in grads)
        return *grads, *[None] * 4


def recomputed(
    ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None, kept: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor | None, ...]:
    """Return the gradients in the order of `NAMES`, from recomputed logits, or from `kept`: exp(z - max) of
    the only chunk, and its sums."""
    hidden, weight, bias, low, low_rank, targets, support, lse, entropies = ctx.saved_tensors
    grad = lse.new_zeros(targets.shape) if grad is None else grad * ctx.map.slope
    wants = dict(zip(NAMES, ctx.needs_input_grad, strict=False))
    buffer = None if kept is None else kept[0]
    count = hidden.shape[0]
    used = None if kept is not None else pulled_rows(grad, grad_entropy)
    if used is not None:
        hidden, targets, lse, grad = (_at(x, used) for x in (hidden, targets, lse, grad))
        low, support, entropies, grad_entropy = (
            _at(x, used) for x in (low, support, entropies, grad_entropy)
        )
    rows = Targets(targets, support)
    chunks = Chunks(HeadProducts(weight, low_rank), hidden, low, bias, rows, ctx.map, buffer=buffer)
    if kept is not None and grad_entropy is None:
        grads = backward_from_kept(chunks, grad, kept[1], wants)
    else:
        up = Upstream(grad, lse)
        if entropies is not None and grad_entropy is not None:
            up = replace(up, entropy=entropies, grad_entropy=grad_entropy * ctx.map.slope)
        grads = backward(chunks, up, wants)
    if used is not None:
        grads.spread(used, count)
    return grads.for_inputs(bias, low_rank)


def _at(x: MaybeTensor, index: Tensor | None) -> MaybeTensor:
    """Select rows of x, or all rows if `index` is None."""
    return x if x is None or index is None else x[index]


def pulled_rows(grad: Tensor | RowGradient, grad_entropy: Tensor | None) -> Tensor | None:
    """Return the indices of the rows with an upstream gradient ([T] each); None if all have one. Rows without
    (groups whose advantages are 0) are not recomputed. On a GPU: None, to avoid a synchronisation."""
    pulled = grad.pulled if isinstance(grad, RowGradient) else grad != 0
    if pulled.is_cuda:
        return None
    if grad_entropy is not None:
        pulled |= grad_entropy != 0
    return None if bool(pulled.all()) else pulled.nonzero()[:, 0]


def predicted_factor(grad: Tensor, expected: Tensor) -> float | None:
    """Return upstream gradient [T] / prediction as one factor, or None if they are not proportional."""
    expected = expected.to(grad.dtype)
    square = float(expected.dot(expected))
    factor = float(grad.dot(expected)) / square if square else 1.0
    if abs(factor - 1) <= PREDICTED / 10:
        factor = 1.0
    wanted = factor * expected
    return factor if bool(((grad - wanted).abs() <= PREDICTED * wanted.abs()).all()) else None


class FrozenLogps(torch.autograd.Function):
    """(hidden, weight, bias, rows, map) -> logps [T]; only hidden gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Targets, f: LogitMap
    ) -> Tensor:
        chunks = Chunks(HeadProducts(weight, None), hidden, None, bias, rows, f)
        ones = hidden.new_ones(hidden.shape[0], dtype=chunks.acc)
        logps, _, _, _, grads = differentiate_forward(chunks, ones, {"hidden": True})
        ctx.save_for_backward(grads.hidden)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return slopes * grad[:, None].to(slopes.dtype), *[None] * 4
