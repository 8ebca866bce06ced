"""Log-probs of targets without the [T, V] logits: row chunks, each reduced in cache-sized tiles.

One chunk of logits is allocated once and filled by products with `out=`; a tile of a few rows is
taken through softmax in place while it stays in cache. Three ways to the gradient:

- recompute: any upstream gradient; the chunk's logits are computed again in the backward (8 T H V)
- known: the loss is a weighted sum of the log-probs, its gradient is taken in the forward (6 T H V)
- frozen: no head parameter wants a gradient; the forward keeps d logp / d hidden (4 T H V)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rft.kernels.logprob_common import LogitMap, accumulate_dtype
from rft.kernels.logprob_linear import Head, WeightGrad

CHUNK_BYTES = 1 << 25  # logits of one chunk
MIN_CHUNK_ROWS = 64  # fewer rows make slow products
TILE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}  # the cache on CPU; on a GPU, enough to fill it

LOWEST = -1e4  # stands for -inf in p * log p: its exponential is 0 as well


@dataclass(frozen=True)
class Rows:
    """What is known of each row: targets [T], packed support [T, ceil(V/8)] or None."""

    targets: Tensor
    support: Tensor | None


class Chunks:
    """A pass over row chunks: buffers, products, and tiles of logits in the accumulation dtype."""

    def __init__(
        self, head: Head, hidden: Tensor, low: Tensor | None, bias: Tensor | None, rows: Rows, f: LogitMap
    ) -> None:
        self.head, self.hidden, self.low, self.rows, self.map = head, hidden, low, rows, f
        self.acc = accumulate_dtype(hidden.dtype)
        self.bias = None if bias is None else bias.to(self.acc)
        count, vocab = hidden.shape[0], head.vocab
        itemsize = head.dtype.itemsize
        self.size = max(1, min(count, max(MIN_CHUNK_ROWS, CHUNK_BYTES // (vocab * itemsize))))
        self.number = -(-count // self.size)
        self.buffer = hidden.new_empty((self.size, vocab), dtype=head.dtype)
        tile_bytes = TILE_BYTES.get(hidden.device.type, TILE_BYTES["cuda"])
        self.tile_rows = max(1, min(self.size, tile_bytes // (vocab * self.acc.itemsize)))
        self.in_place = head.dtype == self.acc
        self._tiles: dict[str, Tensor] = {}

    def tile(self, name: str, n: int) -> Tensor:
        """A scratch tile [n, V] in the accumulation dtype, allocated once."""
        if name not in self._tiles:
            shape = (self.tile_rows, self.head.vocab)
            self._tiles[name] = self.hidden.new_empty(shape, dtype=self.acc)
        return self._tiles[name][:n]

    def __iter__(self) -> Any:
        """Yields (slice of rows, hidden [n, H], low [n, r] or None, logit products [n, V])."""
        dtype = self.head.dtype
        for start in range(0, self.hidden.shape[0], self.size):
            rows = slice(start, min(start + self.size, self.hidden.shape[0]))
            h = self.hidden[rows].to(dtype)
            low = None if self.low is None else self.low[rows].to(dtype)
            out = self.buffer[: rows.stop - rows.start]
            self.head.logits(h, low, out)
            yield rows, h, low, out

    def tiles(self, chunk: slice, products: Tensor, cap_slope: bool = False) -> Any:
        """Yields (slice of all rows, slice of the chunk's rows, logits [r, V], 1 - tanh^2 or None)."""
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
                keep_support_(z, self.rows.support[rows], self.rows.targets[rows])
            yield rows, inner, z, slope


def unpack_support(packed: Tensor, vocab: int) -> Tensor:
    """[n, ceil(V/8)] uint8 -> [n, V] bool; bit j of byte i is token 8 i + j."""
    bits = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab]


def keep_support_(z: Tensor, packed: Tensor, targets: Tensor) -> None:
    """Logits outside the support become -inf; the target always stays."""
    outside = unpack_support(packed, z.shape[1]).logical_not_().scatter_(1, targets[:, None], False)
    z.masked_fill_(outside, -torch.inf)


def softmax_tile_(
    z: Tensor, targets: Tensor, scratch: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z [r, V] becomes exp(z - max), or rubbish where `scratch` is given.

    Returns logps [r], logsumexp [r], sum of exp [r] and, with `scratch` [r, V], the entropy [r].
    """
    target = z.gather(1, targets[:, None])[:, 0]
    top = z.amax(1, keepdim=True)
    z.sub_(top)
    if scratch is None:
        total = z.exp_().sum(1)
        lse = top[:, 0] + total.log()
        return target - lse, lse, total, total
    z.clamp_(min=LOWEST)
    total = torch.exp(z, out=scratch).sum(1)
    entropy = total.log() - z.mul_(scratch).sum(1) / total
    lse = top[:, 0] + total.log()
    return target - lse, lse, total, entropy


def grad_tile_(
    z: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    entropy: Tensor,
    grad_entropy: Tensor,
    scratch: Tensor,
) -> None:
    """z [r, V] becomes grad * (onehot - p) - grad_entropy * p * (log p + entropy)."""
    z.sub_(lse[:, None]).clamp_(min=LOWEST)
    torch.exp(z, out=scratch)
    z.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad[:, None]).mul_(scratch).neg_()
    z.scatter_add_(1, targets[:, None], grad[:, None])


def forward(chunks: Chunks, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """logps, logsumexp and (if asked) entropies, each [T]."""
    t = chunks.hidden.shape[0]
    logps, lse = (chunks.hidden.new_empty(t, dtype=chunks.acc) for _ in range(2))
    entropies = torch.empty_like(logps) if entropy else None
    for chunk, _, _, products in chunks:
        for rows, _, z, _ in chunks.tiles(chunk, products):
            scratch = chunks.tile("scratch", z.shape[0]) if entropies is not None else None
            logps[rows], lse[rows], _, h = softmax_tile_(z, chunks.rows.targets[rows], scratch)
            if entropies is not None:
                entropies[rows] = h
    return logps, lse, entropies


class Gradients:
    """Gradients of hidden [T, H], low [T, r], weight, B and bias, filled in chunk by chunk."""

    def __init__(self, chunks: Chunks, wants: dict[str, bool]) -> None:
        head = chunks.head
        self.head, self.acc = head, chunks.acc
        empty = chunks.hidden.new_zeros if chunks.number == 0 else chunks.hidden.new_empty
        self.hidden = empty(chunks.hidden.shape) if wants["hidden"] else None
        self.weight = WeightGrad(head.weight, chunks.number) if wants["weight"] else None
        self.low = torch.empty_like(chunks.low) if wants["low"] and chunks.low is not None else None
        zeros = chunks.hidden.new_zeros
        self.bias = zeros(head.vocab, dtype=self.acc) if wants["bias"] else None
        b = head.low_rank
        self.low_rank = zeros(b.shape, dtype=self.acc) if wants["low_rank"] and b is not None else None

    def add(self, rows: slice, hidden: Tensor, low: Tensor | None, grad: Tensor) -> None:
        """Take in grad [n, V], the gradient of the chunk's products."""
        if self.hidden is not None:
            self.head.hidden_grad(grad, self.hidden[rows])
        if self.weight is not None:
            self.weight.add(grad, hidden)
        if self.bias is not None:
            self.bias += grad.sum(0, dtype=self.acc)
        if self.low is not None and self.head.low_rank is not None:
            self.low[rows] = grad @ self.head.low_rank
        if self.low_rank is not None and low is not None:
            self.low_rank += grad.t() @ low

    def weight_result(self) -> Tensor | None:
        return None if self.weight is None else self.weight.result()


class Recompute(torch.autograd.Function):
    """(hidden, weight, bias, low, low_rank, rows, map, entropy) -> logps [T], entropies [T] or None."""

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
        logps, lse, entropies = forward(chunks, entropy)
        ctx.save_for_backward(hidden, weight, bias, low, low_rank, rows.targets, rows.support, lse, entropies)
        ctx.map = f
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor | None = None) -> Any:
        hidden, weight, bias, low, low_rank, targets, support, lse, entropies = ctx.saved_tensors
        names = ("hidden", "weight", "bias", "low", "low_rank")
        wants = dict(zip(names, ctx.needs_input_grad, strict=False))
        chunks = Chunks(Head(weight, low_rank), hidden, low, bias, Rows(targets, support), ctx.map)
        grads = Gradients(chunks, wants)
        g = grad * ctx.map.slope
        ge = None if entropies is None or grad_entropy is None else grad_entropy * ctx.map.slope
        for chunk, h, lo, products in chunks:
            for r, inner, z, slope in chunks.tiles(chunk, products, cap_slope=True):
                if ge is None:
                    z.sub_(lse[r, None]).exp_().mul_(-g[r, None])
                    z.scatter_add_(1, targets[r, None], g[r, None])
                else:
                    scratch = chunks.tile("scratch", z.shape[0])
                    grad_tile_(z, targets[r], lse[r], g[r], entropies[r], ge[r], scratch)
                finish_tile(z, slope, products[inner])
            grads.add(chunk, h, lo, products)
        bias_grad = None if grads.bias is None else grads.bias.to(bias.dtype)
        low_rank_grad = None if grads.low_rank is None else grads.low_rank.to(low_rank.dtype)
        return grads.hidden, grads.weight_result(), bias_grad, grads.low, low_rank_grad, None, None, None


def finish_tile(z: Tensor, slope: Tensor | None, products: Tensor) -> None:
    """Gradient of logits -> gradient of products, stored over the products."""
    if slope is not None:
        z.mul_(slope)
    if z.data_ptr() != products.data_ptr():
        products.copy_(z)


def differentiate_forward(
    chunks: Chunks, coefficients: Tensor, wants: dict[str, bool]
) -> tuple[Tensor, Gradients]:
    """logps [T], and the gradients of sum(coefficients * logps), in one pass."""
    logps = chunks.hidden.new_empty(chunks.hidden.shape[0], dtype=chunks.acc)
    grads = Gradients(chunks, wants)
    c = coefficients * chunks.map.slope
    targets = chunks.rows.targets
    for chunk, h, lo, products in chunks:
        for r, inner, z, slope in chunks.tiles(chunk, products, cap_slope=True):
            logps[r], _, total, _ = softmax_tile_(z, targets[r], None)
            z.mul_((-c[r] / total)[:, None])
            z.scatter_add_(1, targets[r, None], c[r, None])
            finish_tile(z, slope, products[inner])
        grads.add(chunk, h, lo, products)
    return logps, grads


class Frozen(torch.autograd.Function):
    """(hidden, weight, bias, rows, map) -> logps [T]; only hidden gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, f: LogitMap
    ) -> Tensor:
        chunks = Chunks(Head(weight, None), hidden, None, bias, rows, f)
        wants = dict.fromkeys(("weight", "bias", "low", "low_rank"), False) | {"hidden": True}
        ones = hidden.new_ones(hidden.shape[0], dtype=chunks.acc)
        logps, grads = differentiate_forward(chunks, ones, wants)
        ctx.save_for_backward(grads.hidden)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return slopes * grad[:, None].to(slopes.dtype), None, None, None, None
