"""The bytes of a gloo push: a process group of its own, and tensors packed into flat buckets.

Sender and receivers plan the same buckets from the same manifest, so only raw bytes travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from torch.distributed.distributed_c10d import BroadcastOptions

from rft.utils.network import use_interface_of

Manifest = list[tuple[str, str, tuple[int, ...]]]  # (name, dtype without "torch.", shape)

BUCKET_BYTES = 64 * 2**20


def manifest_of(named: Iterable[tuple[str, Tensor]]) -> Manifest:
    """Names, dtypes and shapes of the given tensors, in order."""
    return [(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in named]


def open_group(
    host: str, port: int, rank: int, world_size: int, timeout_s: float, name: str = "weights"
) -> Any:
    """Join (rank 0: open) a gloo group that is independent of torch.distributed's default group.

    Raises torch.distributed.DistStoreError or RuntimeError when the others do not come in time.
    """
    use_interface_of(host)
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(host, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    return ProcessGroupGloo(PrefixStore(name, store), rank, world_size, timeout)


def plan_buckets(manifest: Manifest, bucket_bytes: int | None = None) -> list[list[int]]:
    """Indices of consecutive tensors of one dtype that travel together, at most `bucket_bytes` each
    (none: BUCKET_BYTES; a larger tensor travels alone)."""
    limit = BUCKET_BYTES if bucket_bytes is None else bucket_bytes
    buckets: list[list[int]] = []
    size, dtype = 0, ""
    for index, (_, tensor_dtype, shape) in enumerate(manifest):
        nbytes = getattr(torch, tensor_dtype).itemsize * _numel(shape)
        if not buckets or tensor_dtype != dtype or size + nbytes > limit:
            buckets.append([])
            size, dtype = 0, tensor_dtype
        buckets[-1].append(index)
        size += nbytes
    return buckets


def as_announced(manifest: Manifest, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a manifest announces. Raises ValueError where one is not the manifest's next."""
    tensors = iter(named)
    for wanted in manifest:
        name, tensor = next(tensors, ("nothing", torch.empty(0)))
        found = (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if found != wanted:
            raise ValueError(f"{wanted} was announced, {found} came instead")
        yield name, tensor


def send(group: Any, manifest: Manifest, named: Iterable[tuple[str, Tensor]]) -> int:
    """Broadcast tensors from rank 0, bucket by bucket as they come; returns the bytes sent per receiver.

    Raises ValueError where a tensor is not the manifest's next one.
    """
    total, tensors = 0, as_announced(manifest, named)
    for bucket in plan_buckets(manifest):
        flat = torch.cat([next(tensors)[1].detach().reshape(-1) for _ in bucket]).cpu()
        _broadcast(group, flat)
        total += flat.numel() * flat.element_size()
    return total


def receive(group: Any, manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) as the buckets arrive. The tensors are views that the caller copies."""
    for bucket in plan_buckets(manifest):
        sizes = [_numel(manifest[i][2]) for i in bucket]
        flat = torch.empty(sum(sizes), dtype=getattr(torch, manifest[bucket[0]][1]))
        _broadcast(group, flat)
        for index, piece in zip(bucket, flat.split(sizes), strict=True):
            yield manifest[index][0], piece.view(manifest[index][2])


def _broadcast(group: Any, tensor: Tensor) -> None:
    # The raw group: `torch.distributed.broadcast` would want a rank of the default group.
    options = BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor], options).wait()


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
