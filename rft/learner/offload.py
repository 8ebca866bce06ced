"""Move all learner state between GPU and host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from rft.learner.learner import Learner


def resident(learner: Learner) -> list[Tensor]:
    """Weights, buffers, gradients, moments and the reference, each tensor once. What stays on the device is
    small: the scales of a quantised base, and what a strategy keeps beside the optimizer."""
    modules: list[object] = [learner.policy.network]
    if learner.reference is not None:
        modules.append(learner.reference.own_state())
    found: dict[int, Tensor] = {}
    for module in modules:
        if isinstance(module, nn.Module):
            for tensor in (*module.parameters(), *module.buffers()):
                found[id(tensor)] = tensor
                if tensor.grad is not None:
                    found[id(tensor.grad)] = tensor.grad
    for group in learner.optimizer.param_groups:  # a subnetwork trains parameters of its own
        found |= {id(parameter): parameter for parameter in group["params"]}
    for state in learner.optimizer.state.values():
        for name, value in state.items():
            # AdamW counts its steps on the CPU; bitsandbytes moves its paged moments itself.
            if isinstance(value, Tensor) and name != "step" and not getattr(value, "is_paged", False):
                found[id(value)] = value
    return list(found.values())


@torch.no_grad()
def move(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Put tensors on a device, in place: whoever holds one sees it there. To the CPU they go into page-locked
    memory, from which they come back several times as fast."""
    for tensor in tensors:
        if tensor.device.type == device.type:
            continue
        target = torch.empty_like(tensor.data, device=device, pin_memory=device.type == "cpu")
        tensor.data = target.copy_(tensor.data, non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
