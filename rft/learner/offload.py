"""Move all learner state between GPU and host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rft.learner.state import TrainState


def resident(learner: TrainState) -> list[Tensor]:
    """List weights, buffers, gradients, moments and the reference, each tensor once. Two small parts are left
    out: the scales of a quantised base, and strategy state outside the optimizer."""
    reference = None if learner.reference is None else learner.reference.unshared_state()
    tensors: dict[int, Tensor] = {}
    for module in (learner.policy.network, reference):
        for tensor in () if module is None else (*module.parameters(), *module.buffers()):
            tensors[id(tensor)] = tensor
            if tensor.grad is not None:
                tensors[id(tensor.grad)] = tensor.grad
    for group in learner.optimizer.param_groups:  # a subnetwork trains its gathered elements instead
        tensors |= {id(parameter): parameter for parameter in group["params"]}
    for state in learner.optimizer.state.values():
        for name, value in state.items():
            # AdamW counts its steps on the CPU; bitsandbytes moves its paged moments itself.
            if isinstance(value, Tensor) and name != "step" and not getattr(value, "is_paged", False):
                tensors[id(value)] = value
    return list(tensors.values())


@torch.no_grad()
def move(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Move tensors to a device in place, so that all references see the move. On the CPU they are put into
    page-locked memory, from which they are copied back several times as fast."""
    for tensor in tensors:
        if tensor.device.type == device.type:
            continue
        target = torch.empty_like(tensor.data, device=device, pin_memory=device.type == "cpu")
        tensor.data = target.copy_(tensor.data, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
