"""Sparse weight updates: the elements whose bits changed, lossless, with a checksum.

A delta is two flat tensors, `indices` [I] int32 and `values` [V] in wire precision, and a record per
tensor that says how many of each are its own: vLLM's sparse format (flat checkpoint indices and
values), concatenated. A tensor of which so much changed that its whole is smaller travels whole.

Every state of the weights has an id: that of a full push is a digest of all its bytes, that of a delta a
digest of the id it builds on and of its own bytes. A receiver applies a delta only to the state that it
was made for, and only if its bytes are those that were sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rft.errors import TransferError

LARGEST_INDEX = 2**31 - 1  # that int32 holds
WHOLE = -1  # in place of a count: the tensor travels whole
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers of its size, flat: unlike values, NaN equals itself and 0 is not -0."""
    return tensor.reshape(-1).view(_BITS[tensor.element_size()])


def changed(old: Tensor, new: Tensor) -> Tensor:
    """Flat indices [changed] int64 of the elements whose bits differ."""
    return (bits(old) != bits(new)).nonzero()[:, 0]


def digest(base: str, tensors: Iterable[Tensor]) -> str:
    """Hex digest of `base` and the bytes of CPU tensors, in order."""
    found = hashlib.blake2b(base.encode(), digest_size=16)
    for tensor in tensors:
        found.update(bits(tensor.contiguous()).view(torch.uint8).numpy().data)
    return found.hexdigest()


@dataclass(frozen=True)
class Delta:
    """What changed. `counts[name]` is the number of changed elements, or WHOLE; unchanged tensors have
    no entry."""

    counts: dict[str, int]
    indices: Tensor
    values: Tensor

    @property
    def payload(self) -> dict[str, Tensor]:
        return {"indices": self.indices, "values": self.values}


def make_delta(known: dict[str, Tensor], new: Iterable[tuple[str, Tensor]]) -> tuple[Delta, dict[str, int]]:
    """Bring `known` (CPU tensors by name) up to `new` in place; returns what changed, and the number of
    changed elements of every tensor."""
    counts: dict[str, int] = {}
    changes: dict[str, int] = {}
    indices: list[Tensor] = []
    values: list[Tensor] = []
    dtype = torch.float32
    for name, tensor in new:
        old, dtype = known[name], tensor.dtype
        tensor = tensor.detach().cpu()
        where = changed(old, tensor)
        changes[name] = int(where.numel())
        if not changes[name]:
            continue
        flat = tensor.reshape(-1)
        sparse_bytes = where.numel() * (4 + tensor.element_size())
        if sparse_bytes < tensor.nbytes and tensor.numel() <= LARGEST_INDEX:
            counts[name] = int(where.numel())
            indices.append(where.to(torch.int32))
            values.append(flat[where])
            old.reshape(-1)[where] = values[-1]
        else:
            counts[name] = WHOLE
            values.append(flat.clone())
            old.copy_(tensor)
    empty = torch.empty(0, dtype=torch.int32)
    return (
        Delta(
            counts,
            torch.cat(indices) if indices else empty,
            torch.cat(values) if values else torch.empty(0, dtype=dtype),
        ),
        changes,
    )


def apply_delta(known: dict[str, Tensor], delta: Delta) -> None:
    """Bring `known` up to the state that the delta leads to. Raises TransferError where it cannot fit;
    nothing is changed then."""
    unknown = sorted(set(delta.counts) - set(known))
    if unknown:
        raise TransferError(f"a sparse update names tensors that no full update brought: {unknown[:3]}")
    sparse = sum(n for n in delta.counts.values() if n != WHOLE)
    whole = sum(known[name].numel() for name, n in delta.counts.items() if n == WHOLE)
    if (sparse, sparse + whole) != (delta.indices.numel(), delta.values.numel()):
        raise TransferError(
            f"a sparse update announces {sparse} indices and {sparse + whole} values, but "
            f"{delta.indices.numel()} and {delta.values.numel()} arrived"
        )
    at_index = at_value = 0
    for name, count in delta.counts.items():
        flat = known[name].view(-1)
        size = flat.numel() if count == WHOLE else count
        values = delta.values[at_value : at_value + size]
        if count == WHOLE:
            flat.copy_(values)
        else:
            flat[delta.indices[at_index : at_index + count].long()] = values
            at_index += count
        at_value += size
