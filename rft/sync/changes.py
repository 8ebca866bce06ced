"""Measure how much of the weights a step changes in bfloat16, where most of Adam's small steps vanish."""

from __future__ import annotations

import torch
from torch import Tensor

from rft.config.sync import Measure

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Changes = tuple[dict[str, int], dict[str, int]]
"""(changed elements, elements) by tensor."""


def bits(tensor: Tensor) -> Tensor:
    """Return the tensor's bits as flat integers of its size: as bits, NaN equals NaN and 0 is not -0."""
    return tensor.reshape(-1).view(_BITS[tensor.element_size()])


class ChangeMeter:
    """Count the elements whose bfloat16 bits differ from the previous push.

    Keeps the weights in bfloat16 in the learner's host memory: 2 bytes per parameter. Cost per push: one
    cast, one comparison and one copy of every tensor.
    """

    def __init__(self) -> None:
        self.known: dict[str, Tensor] = {}
        self.sizes: dict[str, int] = {}
        self.changes: dict[str, int] = {}

    def observe(self, name: str, tensor: Tensor) -> None:
        """Compare a tensor with its stored state, then replace that."""
        now = tensor.detach().to("cpu", torch.bfloat16, copy=True)
        before = self.known.get(name)
        if before is not None:
            self.sizes[name] = now.numel()
            self.changes[name] = int((bits(before) != bits(now)).sum())
        self.known[name] = now

    def take(self) -> Changes:
        """Return the changes since the last call; empty after the first push."""
        changes, self.changes, self.sizes = (self.changes, self.sizes), {}, {}
        return changes


def change_metrics(changes: dict[str, int], sizes: dict[str, int], measure: Measure) -> dict[str, float]:
    """Return shares of changed elements: overall, the extremes over matrices, and per matrix if requested."""
    if measure == "off" or not changes:
        return {}
    shares = {name: changes[name] / sizes[name] for name in changes if sizes[name]}
    metrics = {
        "sync/changed_share": sum(changes.values()) / max(sum(sizes.values()), 1),
        "sync/changed_share_min": min(shares.values()),
        "sync/changed_share_max": max(shares.values()),
    }
    if measure == "matrices":
        metrics |= {f"sync/changed/{name}": share for name, share in shares.items()}
    return metrics
