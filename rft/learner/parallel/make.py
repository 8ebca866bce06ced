"""From a learner's config to its parallelism, in the rank's own process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rft.learner.model import resolve_dtype
from rft.learner.parallel.base import Parallel
from rft.learner.parallel.ranks import Rendezvous, RendezvousStore, join

if TYPE_CHECKING:
    from rft.learner.spec import LearnerSpec


def make_parallel(
    spec: LearnerSpec, address: Rendezvous | None, rank: int, store: RendezvousStore | None
) -> Parallel:
    """Join the other ranks at `address` and set up what the config asks for. Collective."""
    c = spec.config
    if c.parallel == "single" or address is None:
        return Parallel()
    join(address, rank, c.ranks, spec.device, store)
    dtype = resolve_dtype(c.dtype, spec.device)
    if c.parallel == "fsdp2":
        from rft.learner.parallel.fsdp2 import FSDP2

        return FSDP2(
            spec.device, dtype, cpu_offload=c.cpu_offload, reshard_after_forward=c.reshard_after_forward
        )
    from rft.contrib.deepspeed import ZeRO

    return ZeRO(spec.device, dtype, c.deepspeed)
