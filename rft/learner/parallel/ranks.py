"""Several processes: their rendezvous, and numbers over all of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from rft.learner.parallel.base import Parallel, T
from rft.utils.network import use_interface_of


@dataclass(frozen=True)
class Rendezvous:
    """The address of the store at which the ranks form their group."""

    host: str
    port: int
    timeout_s: float


class RendezvousStore:
    """The store at which the ranks form their group, on a free port; rank 0 holds it."""

    def __init__(self, host: str, timeout_s: float) -> None:
        self.store = dist.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)
        )
        self.address = Rendezvous(host, self.store.port, timeout_s)


def join(
    address: Rendezvous, rank: int, ranks: int, device: str, own_store: RendezvousStore | None = None
) -> None:
    """Form torch.distributed's default group: gloo on CPU; on GPU NCCL, with gloo for what lies in host
    memory. Raises torch.distributed.DistError when the others do not come in time."""
    use_interface_of(address.host)
    timeout = timedelta(seconds=address.timeout_s)
    if own_store is None:
        store = dist.TCPStore(address.host, address.port, is_master=False, timeout=timeout)
    else:
        store = own_store.store
    # Libraries that look for torchrun's variables (DeepSpeed) find them.
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK="0",  # Ray shows each rank its own device only
        MASTER_ADDR=address.host,
        MASTER_PORT=str(address.port),
    )
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)


class Ranks(Parallel):
    """Several ranks over torch.distributed's default group."""

    def __init__(self) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._machines: list[str] = self.gather(socket.gethostname())

    def one_rank_at_a_time(self) -> AbstractContextManager[None]:
        return self._one_rank_at_a_time()

    @contextmanager
    def _one_rank_at_a_time(self) -> Iterator[None]:
        here = self._machines[self.rank]
        place = self._machines[: self.rank].count(here)
        for turn in range(max(self._machines.count(m) for m in self._machines)):
            if turn == place:
                yield
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        found: list[T | None] = [None] * self.ranks
        dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]  # every rank has put its own

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total


def own_part(cores: set[int], rank: int, ranks: int) -> set[int]:
    """This rank's share of the cores that all ranks of a machine are given. Raises ValueError where there
    are fewer cores than ranks."""
    ordered = sorted(cores)
    part = ordered[rank * len(ordered) // ranks : (rank + 1) * len(ordered) // ranks]
    if not part:
        raise ValueError(f"{len(ordered)} cores cannot be shared by {ranks} ranks")
    return set(part)


def device_of(device: str) -> torch.device:
    """The device that Ray gave to this process."""
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
