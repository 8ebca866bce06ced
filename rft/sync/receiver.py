"""The engine's end of the weight channel: from an announcement to named tensors, whatever the engine.

vLLM's workers and the plain engine use the same receivers; both feed what comes out to their model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rft.contrib.sparse_sync.delta import Delta, apply_delta, digest
from rft.errors import TransferError
from rft.sync import broadcast, files
from rft.sync.link import Link
from rft.sync.spec import Update


class Receiver:
    """Receives over a process group or from files, whole or sparse, as each update says.

    Tensors are views that the caller copies and never writes to. For sparse updates it keeps the
    weights as they stand in wire precision: engines load whole layers, in formats of their own.
    """

    def __init__(self, link: Link) -> None:
        self.group: Any = None
        if link.host:
            self.group = broadcast.open_group(
                link.host, link.port, link.rank_offset, link.world_size, link.timeout_s
            )
        self.known: dict[str, Tensor] = {}
        self.state = ""

    def receive(self, update: Update) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the whole model. Raises TransferError where bytes or state do not fit;
        the engine's weights are undefined then."""
        if "delta" not in update:
            yield from self._fetch(update)
            return
        if update["delta"] is None:
            self.known = {name: tensor.clone() for name, tensor in self._fetch(update)}
            self._verify("", self.known.values(), update)
        else:
            self._apply(update)
        self.state = update["state"]
        yield from self.known.items()

    def _apply(self, update: Update) -> None:
        if update["base"] != self.state:
            raise TransferError(
                f"a sparse update for state {update['base'][:8]} met an engine in state "
                f"{self.state[:8] or 'none'}: it needs a full one first"
            )
        payload = {name: tensor.clone() for name, tensor in self._fetch(update)}
        self._verify(self.state, payload.values(), update)
        apply_delta(self.known, Delta(update["delta"], **payload))

    @staticmethod
    def _verify(base: str, tensors: Any, update: Update) -> None:
        found = digest(base, tensors)
        if found != update["state"]:
            raise TransferError(f"the checksum is {found[:8]}, but {update['state'][:8]} was sent")

    def _fetch(self, update: Update) -> Iterator[tuple[str, Tensor]]:
        if "path" in update:
            yield from self._read(update)
            return
        columns = zip(update["names"], update["dtype_names"], map(tuple, update["shapes"]), strict=True)
        yield from broadcast.receive(self.group, list(columns))

    @staticmethod
    def _read(update: Update) -> Iterator[tuple[str, Tensor]]:
        tensors = dict(files.read(Path(update["path"]), update["names"]))
        found = digest("", tensors.values())
        if found != update["digest"]:
            raise TransferError(
                f"{update['path']} has the checksum {found[:8]}, but {update['digest'][:8]} was written"
            )
        yield from tensors.items()

    def close(self) -> None:
        self.group = None
        self.known, self.state = {}, ""


@torch.no_grad()
def load_into(model: torch.nn.Module, named: Iterator[tuple[str, Tensor]]) -> None:
    """Copy tensors into the parameters of the same names. Raises TransferError for an unknown name or
    another shape."""
    own = dict(model.named_parameters())
    for name, tensor in named:
        if name not in own or own[name].shape != tensor.shape:
            shape = tuple(own[name].shape) if name in own else "none"
            raise TransferError(f"{name}: {tuple(tensor.shape)} arrived, the engine has {shape}")
        own[name].copy_(tensor)
