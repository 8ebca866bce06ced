"""Log-probs of targets without the [T, V] logits: row chunks, each reduced in cache-sized tiles.

One chunk of logits is allocated once and filled by products with `out=`; a tile of a few rows is
taken through softmax in place while it stays in cache. `logprob_autograd` makes differentiable
functions of these passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rft.kernels.logprob_common import LogitMap, accumulate_dtype, spread
from rft.kernels.logprob_linear import Head, WeightGrad

CHUNK_BYTES = 1 << 25  # logits of one chunk
MIN_CHUNK_ROWS = 64  # fewer rows make slow products
TILE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}  # the cache on CPU; on a GPU, enough to fill it

LOWEST = -1e4  # stands for -inf in p * log p: its exponential is 0 as well


@dataclass(frozen=True)
class Rows:
    """What is known of each row: its targets [T, K] and its packed support [T, ceil(V/8)] or None."""

    targets: Tensor
    support: Tensor | None = None


class Chunks:
    """A pass over row chunks: buffers, products, and tiles of logits in the accumulation dtype."""

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        low: Tensor | None,
        bias: Tensor | None,
        rows: Rows,
        f: LogitMap,
        like: Chunks | None = None,
        buffer: Tensor | None = None,
    ) -> None:
        """`like`: another pass over the same rows, to go in step with it. `buffer`: an earlier pass's."""
        self.head, self.hidden, self.low, self.rows, self.map = head, hidden, low, rows, f
        self.acc = accumulate_dtype(hidden.dtype)
        self.bias = None if bias is None else bias.to(self.acc)
        count, vocab = hidden.shape[0], head.vocab
        itemsize = head.dtype.itemsize
        # a widened head's chunk has float32 elements: half the bytes leave room for the wide blocks
        limit = CHUNK_BYTES // 2 if head.widens else CHUNK_BYTES
        self.size = max(1, min(count, max(MIN_CHUNK_ROWS, limit // (vocab * itemsize))))
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
        """Whether all rows are one chunk whose buffer, after a forward, serves the backward as it is."""
        return self.number == 1 and self.in_place and self.map.softcap is None

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
    """Logits outside the support become -inf; the targets always stay."""
    outside = unpack_support(packed, z.shape[1]).logical_not_().scatter_(1, targets, False)
    z.masked_fill_(outside, -torch.inf)


def softmax_tile_(
    z: Tensor, targets: Tensor, scratch: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z [r, V] becomes exp(z - max).

    Returns logps [r, K], logsumexp [r], sum of exp [r] and, with `scratch` [r, V], the entropy [r].
    """
    target = z.gather(1, targets)
    top = z.amax(1, keepdim=True)
    z.sub_(top)
    if scratch is None:
        total = z.exp_().sum(1)
        lse = top[:, 0] + total.log()
        return target - lse[:, None], lse, total, total
    torch.clamp(z, min=LOWEST, out=scratch)
    total = z.exp_().sum(1)
    entropy = total.log() - scratch.mul_(z).sum(1) / total
    lse = top[:, 0] + total.log()
    return target - lse[:, None], lse, total, entropy


def forward(
    chunks: Chunks, entropy: bool, totals: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """logps [T, K], logsumexp [T] and (if asked) entropies [T]; `totals` [T] takes sum exp(z - max)."""
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
    """Gradients of log-probs [T, K] and entropies [T] (or None), and what the forward knew.

    `total` [T] is the gradient's sum over all K targets, also those that lie on other ranks.
    """

    grad: Tensor
    total: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    grad_entropy: Tensor | None = None

    def grad_tile_(self, z: Tensor, rows: slice, targets: Tensor, chunks: Chunks) -> None:
        """z [r, V] becomes grad onehot - total p - grad_entropy p (log p + entropy)."""
        z.sub_(self.lse[rows, None])
        if self.grad_entropy is None or self.entropy is None:
            z.exp_().mul_(-self.total[rows, None])
        else:
            z.clamp_(min=LOWEST)
            p = torch.exp(z, out=chunks.tile("scratch", z.shape[0]))
            z.add_(self.entropy[rows, None]).mul_(self.grad_entropy[rows, None])
            z.add_(self.total[rows, None]).mul_(p).neg_()
        z.scatter_add_(1, targets, self.grad[rows])


class Gradients:
    """Gradients of hidden [T, H], low [T, r], weight, B and bias, filled in chunk by chunk."""

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

    def add(self, rows: slice, hidden: Tensor, low: Tensor | None, grad: Tensor) -> None:
        """Take in grad [n, V], the gradient of the chunk's products."""
        if self.hidden is not None:
            self.head.hidden_grad(grad, self.hidden[rows])
        if self._weight is not None:
            self._weight.add(grad, hidden)
        if self.bias is not None:
            self.bias += grad.sum(0, dtype=self.acc)
        if self.low is not None and self.head.low_rank is not None:
            self.low[rows] = grad @ self.head.low_rank
        if self.low_rank is not None and low is not None:
            self.low_rank += grad.t() @ low

    @property
    def weight(self) -> Tensor | None:
        return None if self._weight is None else self._weight.result()

    def spread(self, rows: Tensor, count: int) -> None:
        """Those of single rows become [T, ...], 0 but at the indices `rows`, which the pass was over."""
        self.hidden = None if self.hidden is None else spread(self.hidden, rows, count)
        self.low = None if self.low is None else spread(self.low, rows, count)

    def for_inputs(self, bias: Tensor | None, low_rank: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """In the order of `NAMES`, those of bias and B rounded to their inputs' dtypes."""
        of_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        of_b = None if self.low_rank is None or low_rank is None else self.low_rank.to(low_rank.dtype)
        return self.hidden, self.weight, of_bias, self.low, of_b


NAMES = ("hidden", "weight", "bias", "low", "low_rank")  # the inputs that may want gradients, in order


def backward(chunks: Chunks, up: Upstream, wants: dict[str, bool]) -> Gradients:
    """Recompute the logits and carry `up` through them."""
    grads = Gradients(chunks, wants)
    for chunk, h, low, products in chunks:
        for rows, inner, z, cap_slope in chunks.tiles(chunk, products, cap_slope=True):
            up.grad_tile_(z, rows, chunks.rows.targets[rows], chunks)
            finish_tile(z, cap_slope, products[inner])
        grads.add(chunk, h, low, products)
    return grads


def backward_from_kept(chunks: Chunks, grad: Tensor, totals: Tensor, wants: dict[str, bool]) -> Gradients:
    """Carry grad [T, K] back from a buffer that still holds exp(z - max) of the only chunk."""
    grads = Gradients(chunks, wants)
    p = chunks.buffer[: grad.shape[0]]
    for start in range(0, p.shape[0], chunks.tile_rows):
        rows = slice(start, start + chunks.tile_rows)
        p[rows].mul_((-grad[rows].sum(1) / totals[rows])[:, None])
        p[rows].scatter_add_(1, chunks.rows.targets[rows], grad[rows])
    low = None if chunks.low is None else chunks.low.to(chunks.head.dtype)
    grads.add(slice(0, p.shape[0]), chunks.hidden.to(chunks.head.dtype), low, p)
    return grads


def finish_tile(z: Tensor, cap_slope: Tensor | None, products: Tensor) -> None:
    """Gradient of logits -> gradient of products, stored over the products."""
    if cap_slope is not None:
        z.mul_(cap_slope)
    if z.data_ptr() != products.data_ptr():
        products.copy_(z)


def differentiate_forward(
    chunks: Chunks, coefficients: Tensor, wants: dict[str, bool], entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, Gradients]:
    """logps [T], logsumexp [T], entropies [T] (if asked), and the gradients of sum(coefficients * logps), in
    one pass."""
    targets = chunks.rows.targets
    logps = chunks.hidden.new_empty(targets.shape, dtype=chunks.acc)
    lse = chunks.hidden.new_empty(targets.shape[0], dtype=chunks.acc)
    entropies = torch.empty_like(lse) if entropy else None
    grads = Gradients(chunks, wants)
    c = (coefficients.to(chunks.acc) * chunks.map.slope)[:, None]
    for chunk, h, low, products in chunks:
        for rows, inner, z, cap_slope in chunks.tiles(chunk, products, cap_slope=True):
            scratch = chunks.tile("scratch", z.shape[0]) if entropies is not None else None
            logps[rows], lse[rows], total, found = softmax_tile_(z, targets[rows], scratch)
            if entropies is not None:
                entropies[rows] = found
            z.mul_(-c[rows] / total[:, None])
            z.scatter_add_(1, targets[rows], c[rows])
            finish_tile(z, cap_slope, products[inner])
        grads.add(chunk, h, low, products)
    return logps[:, 0], lse, entropies, grads
