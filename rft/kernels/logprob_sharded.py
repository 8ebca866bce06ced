"""Log-probs under a head whose rows, the vocabulary, are sharded over the ranks of a process group.

Each rank passes over its own shard; three numbers per row are exchanged for the log-probs, one sum
of the hidden gradient in the backward. Ranks hold the same hidden states and targets.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from rft.kernels import logprob_chunked as chunked
from rft.kernels.logprob_common import LogitMap, check_head, check_targets
from rft.kernels.logprob_linear import Head


def sharded_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, each [T] float32, alike on all ranks of `group` (None: the default one).

    Args:
        hidden: [T, H], the same on all ranks. Its gradient is summed over the ranks, so it is the
            whole one on each: every rank must take the same loss from the results.
        weight, bias: this rank's shard, [V_r, H] and [V_r]; shards follow one another in rank order.
        targets: [T] int64, over the whole vocabulary.
        temperature, softcap, logit_scale: as in `token_logps`.

    Raises ValueError for shapes, dtypes or targets that do not fit, on every rank alike where targets are
    the cause.
    """
    check_head(hidden, weight, bias)
    world = dist.get_world_size(group)
    sizes = torch.zeros(world, dtype=torch.int64, device=hidden.device)
    sizes[dist.get_rank(group)] = weight.shape[0]
    dist.all_reduce(sizes, group=group)
    check_targets(targets, hidden.shape[0], int(sizes.sum()))
    if targets.dim() != 1:
        raise ValueError("targets must be [T] for a sharded head")
    first = int(sizes[: dist.get_rank(group)].sum())
    f = LogitMap(temperature, softcap, logit_scale)
    result: tuple[Tensor, Tensor] = Sharded.apply(hidden, weight, bias, targets - first, f, group)
    return result


class Sharded(torch.autograd.Function):
    """(hidden, weight, bias, targets from this shard's first row, map, group) -> logps, entropies."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        f: LogitMap,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        own = (targets >= 0) & (targets < weight.shape[0])
        local = targets.where(own, 0)[:, None]
        chunks = chunked.Chunks(Head(weight, None), hidden, None, bias, chunked.Rows(local), f)
        logps, shard_lse, shard_entropy = chunked.forward(chunks, entropy=True)
        assert shard_entropy is not None
        parts = [torch.empty_like(shard_lse) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, shard_lse, group=group)
        lse = torch.stack(parts).logsumexp(0)
        # p = share * p_shard, so a shard's part of the entropy is share * (H_shard - log share)
        log_share = shard_lse - lse
        share = log_share.exp()
        part = torch.where(share > 0, share * (shard_entropy - log_share), 0.0)
        sums = torch.stack([torch.where(own, logps[:, 0] + log_share, 0.0), part])
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(hidden, weight, bias, local, own, lse, sums[1])
        ctx.map, ctx.group = f, group
        return sums[0], sums[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> Any:
        hidden, weight, bias, local, own, lse, entropy = ctx.saved_tensors
        chunks = chunked.Chunks(Head(weight, None), hidden, None, bias, chunked.Rows(local), ctx.map)
        grad, grad_entropy = grad * ctx.map.slope, grad_entropy * ctx.map.slope
        here = torch.where(own, grad, 0.0)[:, None]
        up = chunked.Upstream(here, grad, lse, entropy, grad_entropy)
        grads = chunked.backward(chunks, up, dict(zip(chunked.NAMES, ctx.needs_input_grad[:3], strict=False)))
        if grads.hidden is not None:
            total = grads.hidden.to(chunks.acc)
            dist.all_reduce(total, group=ctx.group)
            grads.hidden = total.to(hidden.dtype)
        return *grads.for_inputs(bias)[:3], None, None, None
