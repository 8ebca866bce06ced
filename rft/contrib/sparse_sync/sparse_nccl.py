"""Sparse updates between GPUs: the sending end of vLLM's `sparse_nccl` engine, which writes flat checkpoint
indices and values into its weights in place.

That engine accepts only sparse updates, and buffers each one in memory before it writes. So a full push is
an update of all indices, and every push is sent in parts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rft.contrib.sparse_sync.delta import LARGEST_INDEX, changed
from rft.contrib.sparse_sync.sender import SparseState
from rft.errors import TransferError
from rft.sync.nccl import NcclGroup
from rft.sync.spec import ChannelSpec, Link, Manifest, Named, Update

PART_BYTES = 512 * 2**20  # of indices and values; the most that an engine buffers of an update at once
_INDEX_BYTES = 4


class SparseNcclSender(SparseState):
    """Send indices and values of a part's tensors, one after another, over NCCL.

    Keeps a copy of the weights in wire precision on the learner's GPU. The bytes carry no additional
    checksum: NCCL's transports have one, and the learner compares the next log-probs.
    """

    def __init__(self, spec: ChannelSpec, link: Link) -> None:
        super().__init__(spec)
        self.group = NcclGroup(link)
        self.indices: dict[str, Tensor | None] = {}  # indices to send; None: all

    def announce(self, version: int, manifest: Manifest, named: Named) -> Update:
        """Return `parts`: one update each, as vLLM's `update_weights` takes them, in sending order."""
        full = self.full_push()
        self.indices, self.changed = {}, {}
        for name, tensor in named:
            where = self._take(name, tensor.detach())
            if full:
                self.indices[name] = None
            elif where.numel():
                self.indices[name] = where
        if not self.indices:  # vLLM rejects an empty update
            name, tensor = next(iter(self.known.items()))
            self.indices[name] = torch.zeros(1, dtype=torch.int32, device=tensor.device)
        return {"parts": [self._describe(names) for names in self._parts()]}

    def _take(self, name: str, tensor: Tensor) -> Tensor:
        """Update the known tensor; return the flat indices [changed] int32 where it differed."""
        if tensor.numel() > LARGEST_INDEX:
            raise TransferError(
                f"{name} has {tensor.numel()} elements, more than the int32 indices of vLLM's sparse updates "
                "can name; use sync.transport nccl"
            )
        old = self.known.get(name)
        if old is None:
            self.known[name] = tensor.clone().contiguous()
            return torch.empty(0, dtype=torch.int32, device=tensor.device)
        where = changed(old, tensor)
        old.view(-1)[where] = tensor.reshape(-1)[where]
        self.changed[name] = where.numel()
        return where.to(torch.int32)

    def _count(self, name: str) -> int:
        where = self.indices[name]
        return self.known[name].numel() if where is None else where.numel()

    def _parts(self) -> Iterator[list[str]]:
        """Yield names in order, split where a part would exceed PART_BYTES; a tensor is never split."""
        part: list[str] = []
        size = 0
        for name in self.indices:
            needed = self._count(name) * (_INDEX_BYTES + self.known[name].element_size())
            if part and size + needed > PART_BYTES:
                yield part
                part, size = [], 0
            part.append(name)
            size += needed
        yield part

    def _describe(self, names: list[str]) -> Update:
        tensors = [self.known[name] for name in names]
        return {
            "names": names,
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
            "num_updates_list": [self._count(name) for name in names],
        }

    def send(self, named: Named) -> int:
        total = 0
        with self.group.deadline():
            for name, where in self.indices.items():
                tensor = self.known[name].view(-1)
                if where is None:
                    where, values = torch.arange(len(tensor), dtype=torch.int32, device=tensor.device), tensor
                else:
                    values = tensor[where.long()]
                for flat in (where, values):
                    self.group.broadcast(flat)
                    total += flat.nbytes
        return total

    def close(self) -> None:
        self.group.close()
