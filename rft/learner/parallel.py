"""Parallelism of the learner: one process, or several ranks over torch.distributed.

Every rank runs the same code: advantages and weights on the whole batch, then its share of the
micro-batches. `Parallel` and its subclasses contain all differences between one process, FSDP2 and ZeRO.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rft.config.learner import LearnerConfig
from rft.utils.dotted import load_dotted
from rft.utils.network import use_interface_of

if TYPE_CHECKING:
    from rft.learner.model import PolicyModel

T = TypeVar("T")
MakeOptimizer = Callable[[], torch.optim.Optimizer]


class Parallel:
    """One process: `learner.parallel: single`, and the base class of the others. Methods marked *collective*
    must be called by all ranks in the same order."""

    rank = 0
    ranks = 1

    def loading_device(self, device: str) -> str:
        """Return the device on which a model's weights are loaded before they are sharded."""
        return device

    def one_rank_at_a_time(self) -> AbstractContextManager[None]:
        """Let the ranks of a machine run the block one by one: only one holds a full model. Collective."""
        return nullcontext()

    def shard(self, policy: PolicyModel) -> None:
        """Keep only this rank's shard of a policy, in place, if that does not need communication."""

    def optimizer(self, policy: PolicyModel, make: MakeOptimizer) -> Any:
        """Set up the optimizer that `make` returns for a policy in training. Collective."""
        return make()

    def freeze(self, policy: PolicyModel) -> None:
        """Set up a policy that is never trained. Collective."""

    # -- a step --------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradient; gradients are summed over ranks. last: the last micro-batch of the
        update. Collective."""
        loss.backward()

    def update(
        self, parameters: Iterable[nn.Parameter], optimizer: Any, bound: float | None
    ) -> tuple[float, bool]:
        """Clip the gradient to the norm `bound` and step. Return the norm before, and whether it was finite:
        if not, nothing is updated. The gradient is dropped. Collective."""
        norm = float(self.clip(parameters, bound or float("inf")))
        finite = bool(torch.isfinite(torch.tensor(norm)))
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def clip(self, parameters: Iterable[nn.Parameter], bound: float) -> Tensor:
        """Clip gradients by their global norm; return the norm. Collective."""
        return torch.nn.utils.clip_grad_norm_(parameters, bound)

    def discard(self, optimizer: Any) -> None:
        """Drop the accumulated gradient."""
        optimizer.zero_grad(set_to_none=True)

    # -- numbers over ranks --------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """Return every rank's plain value, in rank order, on every rank. Collective."""
        return [value]

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a CPU tensor over ranks, on every rank. Collective."""
        return tensor

    def reshard(self) -> None:
        """Reshard gathered weights, so that modules expose the trained parameters."""

    # -- weights and state ---------------------------------------------------------------------------

    def full_tensor(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a parameter (or any tensor) with all its elements, detached, on every rank; in `dtype` if
        given. Collective."""
        return tensor.detach() if dtype is None else tensor.detach().to(dtype)

    def set_full(self, tensor: Tensor, value: Tensor) -> None:
        """Set a parameter (or any tensor) to a full value; each rank keeps its shard. Collective."""
        with torch.no_grad():
            tensor.copy_(value)

    def model_state(self, module: nn.Module) -> dict[str, Tensor]:
        """Copy a module's full state to CPU; {} on all ranks but the first. Collective."""
        tensors = module.state_dict(keep_vars=True)
        copies: dict[int, Tensor] = {}  # tied parameters stay tied
        for tensor in tensors.values():
            if id(tensor) not in copies:
                copies[id(tensor)] = self.keep(self.full_tensor(tensor))
        if self.rank:
            return {}
        return {name: copies[id(tensor)] for name, tensor in tensors.items()}

    def load_model_state(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Load the result of `model_state`, on any number of ranks. Collective."""
        module.load_state_dict(state)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Copy an optimizer's full state to CPU, in torch's format; {} on all ranks but the first.
        Collective."""
        state = self.copy(optimizer.state_dict())
        return {} if self.rank else state

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Load the result of `optimizer_state`, on any number of ranks. Collective."""
        optimizer.state.clear()  # not two sets of moments at a time
        optimizer.load_state_dict(state)

    def keep(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to CPU on the first rank; return an empty tensor on the others."""
        return torch.empty(0) if self.rank else tensor.detach().to("cpu", copy=True)

    def copy(self, node: Any) -> Any:
        """Copy plain data on the first rank, tensors in full and on CPU. Collective."""
        if isinstance(node, Tensor):
            return self.keep(self.full_tensor(node))
        if isinstance(node, dict):
            return {name: self.copy(child) for name, child in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(self.copy(child) for child in node)
        return node


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
    """Form torch.distributed's default group: gloo on CPU; on GPU NCCL, with gloo for tensors in host
    memory. Raises torch.distributed.DistError if the other ranks do not join in time."""
    use_interface_of(address.host)
    timeout = timedelta(seconds=address.timeout_s)
    if own_store is None:
        store = dist.TCPStore(address.host, address.port, is_master=False, timeout=timeout)
    else:
        store = own_store.store
    # For libraries that read torchrun's variables (DeepSpeed).
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK="0",  # Ray makes only the rank's device visible
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

    @contextmanager
    def one_rank_at_a_time(self) -> Iterator[None]:
        here = self._machines[self.rank]
        place = self._machines[: self.rank].count(here)
        for current in range(max(self._machines.count(m) for m in self._machines)):
            if current == place:
                yield
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        values: list[T | None] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # each rank has set one

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total


def local_share(cores: set[int], rank: int, ranks: int) -> set[int]:
    """Return this rank's share of a machine's cores. Raises ValueError if there are fewer cores than
    ranks."""
    ordered = sorted(cores)
    part = ordered[rank * len(ordered) // ranks : (rank + 1) * len(ordered) // ranks]
    if not part:
        raise ValueError(f"{len(ordered)} cores cannot be shared by {ranks} ranks")
    return set(part)


def device_of(device: str) -> torch.device:
    """Return the device that Ray assigned to this process."""
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


PARALLEL = {"fsdp2": "rft.learner.fsdp2.FSDP2", "deepspeed": "rft.contrib.deepspeed.ZeRO"}


def make_parallel(
    config: LearnerConfig, device: str, address: Rendezvous | None, rank: int, store: RendezvousStore | None
) -> Parallel:
    """Join the other ranks at `address` and create the configured parallelism. Collective."""
    if config.parallel == "single" or address is None:
        return Parallel()
    join(address, rank, config.ranks, device, store)
    made: Parallel = load_dotted(PARALLEL[config.parallel])(config, device)
    return made
