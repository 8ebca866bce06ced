"""Weights over gloo: a process group, tensors packed into flat buckets, and the engines' receiving end.

Sender and receivers plan the same buckets from the same manifest, so only raw bytes travel.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from torch.distributed.distributed_c10d import BroadcastOptions

from rft.errors import TransferError
from rft.sync import files
from rft.sync.publisher import Sender
from rft.sync.spec import ChannelSpec, Link, Manifest, Named, Update, as_update
from rft.utils.dotted import load_dotted
from rft.utils.network import use_interface_of

BUCKET_BYTES = 64 * 2**20
CALLED_OFF = "called off"
SPARSE_RECEIVER = "rft.contrib.sparse_sync.delta.SparseReceiver"  # the engines' state for sparse updates


# -- the group ---------------------------------------------------------------------------------------------


def open_group(
    host: str, port: int, rank: int, world_size: int, timeout_s: float, name: str = "weights"
) -> Any:
    """Join (rank 0: open) a gloo group that is independent of torch.distributed's default group.

    Raises TransferError or RuntimeError if the other ranks do not join in time, or if the group is cancelled.
    """
    use_interface_of(host)
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(host, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    _wait_for_all(store, rank, world_size, timeout_s)
    return ProcessGroupGloo(PrefixStore(name, store), rank, world_size, timeout)


def _wait_for_all(store: TCPStore, rank: int, world_size: int, timeout_s: float) -> None:
    """Return once every rank has arrived. Gloo itself cannot be interrupted while it waits for a rank."""
    deadline = time.monotonic() + timeout_s
    store.set(f"here/{rank}", "")
    while not store.check([f"here/{r}" for r in range(world_size)]):
        if store.check([CALLED_OFF]):
            raise TransferError("the weight channel could not be formed: another rank failed")
        if time.monotonic() > deadline:
            missing = [r for r in range(world_size) if not store.check([f"here/{r}"])]
            raise TransferError(f"ranks {missing} did not join the weight channel within {timeout_s:g} s")
        time.sleep(0.02)


def call_off(host: str, port: int) -> None:
    """Make the ranks that wait in `open_group` raise TransferError. No error if none waits."""
    with contextlib.suppress(RuntimeError):  # torch raises it for store and network errors
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        store.set(CALLED_OFF, "")


def plan_buckets(manifest: Manifest) -> list[list[int]]:
    """Plan buckets: indices of consecutive tensors of one dtype, at most BUCKET_BYTES each (a larger tensor
    gets a separate bucket)."""
    buckets: list[list[int]] = []
    size, dtype = 0, ""
    for index, (_, tensor_dtype, shape) in enumerate(manifest):
        nbytes = getattr(torch, tensor_dtype).itemsize * _numel(shape)
        if not buckets or tensor_dtype != dtype or size + nbytes > BUCKET_BYTES:
            buckets.append([])
            size, dtype = 0, tensor_dtype
        buckets[-1].append(index)
        size += nbytes
    return buckets


def as_announced(manifest: Manifest, named: Named) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a manifest announces. Raises ValueError if one is not the manifest's next."""
    tensors = iter(named)
    for wanted in manifest:
        name, tensor = next(tensors, ("nothing", torch.empty(0)))
        described = (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        if described != wanted:
            raise ValueError(f"expected {wanted}, received {described}")
        yield name, tensor


def _broadcast(group: Any, tensor: Tensor) -> None:
    # The raw group: `torch.distributed.broadcast` would require a rank of the default group.
    options = BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor], options).wait()


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


# -- the learner's end -------------------------------------------------------------------------------------


class GlooSender(Sender):
    """Stream the tensors in `send`."""

    def __init__(self, spec: ChannelSpec, link: Link) -> None:
        self.group: Any = open_group(link.host, link.port, 0, link.world_size, link.timeout_s)
        self.manifest: Manifest = []

    def announce(self, version: int, manifest: Manifest, named: Named) -> Update:
        self.manifest = manifest
        return as_update(manifest)

    def send(self, named: Named) -> int:
        """Broadcast bucket by bucket. Raises ValueError if a tensor is not the manifest's next one."""
        total, tensors = 0, as_announced(self.manifest, named)
        for bucket in plan_buckets(self.manifest):
            flat = torch.cat([next(tensors)[1].detach().reshape(-1) for _ in bucket]).cpu()
            _broadcast(self.group, flat)
            total += flat.nbytes
        return total

    def close(self) -> None:
        self.group = None


class PayloadSender(GlooSender):
    """Read a small set of tensors (an adapter's) in `announce`, and send them in `send`."""

    reads_at_announce: ClassVar[bool] = True

    def announce(self, version: int, manifest: Manifest, named: Named) -> Update:
        self.payload = dict(named)
        return super().announce(version, manifest, ())

    def send(self, named: Named) -> int:
        return super().send(self.payload.items())


# -- the engines' end --------------------------------------------------------------------------------------


class Receiver:
    """Receive weights over the group or from files, whole or sparse, as each update says, for any engine.

    Tensors are views, which the caller must copy and never write to.
    """

    def __init__(self, link: Link) -> None:
        self.group: Any = None
        if link.host:
            self.group = open_group(link.host, link.port, link.rank_offset, link.world_size, link.timeout_s)
        self.sparse: Any = None  # the state of sparse updates, created by the first one

    def receive(self, update: Update) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the whole model. Raises TransferError if bytes or state do not match; the
        engine's weights are then undefined."""
        tensors = files.read_update(update) if "path" in update else self._receive_buckets(update)
        if "delta" in update:
            self.sparse = self.sparse or load_dotted(SPARSE_RECEIVER)()
            tensors = self.sparse.apply(update, tensors)
        yield from tensors

    def _receive_buckets(self, update: Update) -> Iterator[tuple[str, Tensor]]:
        columns = zip(update["names"], update["dtype_names"], map(tuple, update["shapes"]), strict=True)
        manifest: Manifest = list(columns)
        for bucket in plan_buckets(manifest):
            sizes = [_numel(manifest[i][2]) for i in bucket]
            flat = torch.empty(sum(sizes), dtype=getattr(torch, manifest[bucket[0]][1]))
            _broadcast(self.group, flat)
            for index, piece in zip(bucket, flat.split(sizes), strict=True):
                yield manifest[index][0], piece.view(manifest[index][2])

    def close(self) -> None:
        self.group = self.sparse = None


@torch.no_grad()
def load_into(model: torch.nn.Module, named: Iterable[tuple[str, Tensor]]) -> None:
    """Copy tensors into the parameters of the same names. Raises TransferError for an unknown name or a
    different shape."""
    parameters = dict(model.named_parameters())
    for name, tensor in named:
        if name not in parameters or parameters[name].shape != tensor.shape:
            shape = tuple(parameters[name].shape) if name in parameters else "none"
            raise TransferError(f"{name}: received shape {tuple(tensor.shape)}, the engine has {shape}")
        parameters[name].copy_(tensor)
