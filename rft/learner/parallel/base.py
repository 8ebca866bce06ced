"""What the learner leaves to its parallelism; here for one process, which shares nothing.

The learner computes the same on every rank: advantages and weights on the whole batch, then its own
micro-batches. What differs between one process, FSDP2 and ZeRO is below and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rft.learner.forward import PolicyModel

T = TypeVar("T")
MakeOptimizer = Callable[[], torch.optim.Optimizer]


class Parallel:
    """One process: `learner.parallel: single`, and the base of the others.

    Methods marked *collective* must be called by all ranks in the same order.
    """

    rank = 0
    ranks = 1

    def loading_device(self, device: str) -> str:
        """Where a model's weights are loaded before they are spread."""
        return device

    def one_rank_at_a_time(self) -> AbstractContextManager[None]:
        """Within, this rank is the only one of its machine to hold a whole model. Collective."""
        return nullcontext()

    def shard(self, policy: PolicyModel) -> None:
        """Keep this rank's part of a policy only, in place, where ranks can do that each by itself."""

    def optimizer(self, policy: PolicyModel, make: MakeOptimizer) -> Any:
        """The optimizer of a policy in training, which `make` makes of its parameters. Collective."""
        return make()

    def freeze(self, policy: PolicyModel) -> None:
        """Set up a policy that is never trained. Collective."""

    # -- a step --------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradient; gradients are summed over ranks. `last` of its update.
        Collective."""
        loss.backward()

    def update(
        self, parameters: Iterable[nn.Parameter], optimizer: Any, bound: float | None
    ) -> tuple[float, bool]:
        """Clip the gradient to the norm `bound` and step; returns its norm before, and whether it was
        finite: if not, nothing is updated. The gradient is gone afterwards. Collective."""
        norm = float(self.clip(parameters, bound or float("inf")))
        finite = bool(torch.isfinite(torch.tensor(norm)))
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def clip(self, parameters: Iterable[nn.Parameter], bound: float) -> Tensor:
        """Clip gradients by their global norm, which is returned. Collective."""
        return torch.nn.utils.clip_grad_norm_(parameters, bound)

    def discard(self, optimizer: Any) -> None:
        """Drop the gradient that was accumulated."""
        optimizer.zero_grad(set_to_none=True)

    # -- numbers over ranks --------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """Every rank's plain value, in rank order, on every rank. Collective."""
        return [value]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a CPU tensor over ranks, on every rank. Collective."""
        return tensor

    def reshard(self) -> None:
        """Reshard gathered weights, so that modules show the parameters that are trained."""

    # -- weights and state ---------------------------------------------------------------------------

    def full_tensor(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A parameter (or anything else) with all its elements, detached, on every rank; in `dtype` if given.
        Collective."""
        return tensor.detach() if dtype is None else tensor.detach().to(dtype)

    def set_full(self, tensor: Tensor, value: Tensor) -> None:
        """Set a parameter (or anything else) to a whole value; each rank keeps its part. Collective."""
        with torch.no_grad():
            tensor.copy_(value)

    def model_state(self, module: nn.Module) -> dict[str, Tensor]:
        """A copy of a module's whole state on CPU; {} on all ranks but the first. Collective."""
        tensors = module.state_dict(keep_vars=True)
        copies: dict[int, Tensor] = {}  # tied parameters stay one
        for tensor in tensors.values():
            if id(tensor) not in copies:
                whole = self.full_tensor(tensor)
                copies[id(tensor)] = self.keep(whole)
        if self.rank:
            return {}
        return {name: copies[id(tensor)] for name, tensor in tensors.items()}

    def load_model_state(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Take over what `model_state` gave, whatever the number of ranks was. Collective."""
        module.load_state_dict(state)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """A copy of an optimizer's whole state on CPU, in torch's format; {} on all ranks but the first.
        Collective."""
        state = self.copy(optimizer.state_dict())
        return {} if self.rank else state

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Take over what `optimizer_state` gave, whatever the number of ranks was. Collective."""
        optimizer.load_state_dict(state)

    def keep(self, whole: Tensor) -> Tensor:
        """A copy on CPU on the first rank; nothing on the others."""
        return torch.empty(0) if self.rank else whole.detach().to("cpu", copy=True)

    def copy(self, node: Any) -> Any:
        """A copy of plain data on the first rank, tensors whole and on CPU. Collective."""
        if isinstance(node, Tensor):
            return self.keep(self.full_tensor(node))
        if isinstance(node, dict):
            return {name: self.copy(child) for name, child in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(self.copy(child) for child in node)
        return node
