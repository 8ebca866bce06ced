"""The state of every random number generator of a process, to go into a checkpoint and back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rft.checkpoint import CheckpointError


def seed_everything(seed: int) -> None:
    """Seed `random`, `numpy.random` and torch on every device, so that equal runs have equal states."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The states of `random`, `numpy.random`, torch's CPU generator and every visible CUDA device's.

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
    """Put every generator back to a state taken by `rng_state`.

    Raises CheckpointError where the number of visible CUDA devices is another one now: the run would
    not go on with the same random numbers.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices != len(state["cuda"]):
        raise CheckpointError(
            f"the random states are those of {len(state['cuda'])} CUDA devices, this process sees {devices}: "
            "resume on the same number of devices"
        )
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if devices:
        torch.cuda.set_rng_state_all(state["cuda"])


def save_rng_state(path: Path) -> None:
    """Write the present state of every generator to the file `path`."""
    torch.save(rng_state(), path)


def load_rng_state(path: Path) -> None:
    """Restore what `save_rng_state` wrote. Raises CheckpointError as `set_rng_state` does."""
    set_rng_state(torch.load(path, map_location="cpu", weights_only=True))
