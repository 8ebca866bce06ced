"""Seeds derived from names and numbers, and the states of random number generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from rft.errors import CheckpointError
from rft.utils.hashing import hash64


def derive_seed(*parts: int | str) -> int:
    """Derive a sampling seed from `parts`: equal parts give equal rollouts."""
    return hash64("/".join(map(str, parts))) >> 2  # leaves room for seed + sample index in an int64


def seed_everything(seed: int) -> None:
    """Seed `random`, `numpy.random` and torch on every device, so that equal runs have equal states."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the states of `random`, `numpy.random`, torch's CPU generator and every visible CUDA device's.

    The values are plain Python numbers and uint8 tensors, so `torch.load(weights_only=True)` reads them.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore every generator to a state taken by `rng_state`.

    Raises CheckpointError if the number of visible CUDA devices differs: the run would not continue with
    the same random numbers.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices != len(state["cuda"]):
        raise CheckpointError(
            f"the random states are those of {len(state['cuda'])} CUDA devices, but this process sees "
            f"{devices}: resume on the same number of devices"
        )
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if devices:
        torch.cuda.set_rng_state_all(state["cuda"])
