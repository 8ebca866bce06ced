"""Sparse weight updates: the elements whose bits changed, lossless, with a checksum.

A delta is two flat tensors, `indices` [I] int32 and `values` [V] in wire precision, and a record of each
tensor's share of them: vLLM's sparse format (flat checkpoint indices and values), concatenated. A tensor
whose full data is smaller than its changes is sent whole.

Every state of the weights has an id: a full push's is a digest of all its bytes, a delta's a digest of the
base state's id and the delta's bytes. A receiver applies a delta only to the state that it was made for,
and only if its bytes match the digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rft.errors import TransferError
from rft.sync.changes import bits
from rft.sync.files import digest
from rft.sync.spec import Update

LARGEST_INDEX = 2**31 - 1  # the largest int32
WHOLE = -1  # instead of a count: the tensor is sent whole


def changed(old: Tensor, new: Tensor) -> Tensor:
    """Return the flat indices [changed] int64 of the elements whose bits differ."""
    return (bits(old) != bits(new)).nonzero()[:, 0]


@dataclass(frozen=True)
class Delta:
    """The changed elements. `counts[name]` is the number of changed elements, or WHOLE; unchanged tensors are
    not listed."""

    counts: dict[str, int]
    indices: Tensor
    values: Tensor

    @property
    def payload(self) -> dict[str, Tensor]:
        return {"indices": self.indices, "values": self.values}


def make_delta(known: dict[str, Tensor], new: Iterable[tuple[str, Tensor]]) -> tuple[Delta, dict[str, int]]:
    """Update `known` (CPU tensors by name) to `new` in place; return the changes, and the number of changed
    elements of every tensor."""
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
    """Update `known` to the delta's target state. Raises TransferError, with nothing changed, if the delta
    does not fit."""
    unknown = sorted(set(delta.counts) - set(known))
    if unknown:
        raise TransferError(f"a sparse update names tensors that no full update contained: {unknown[:3]}")
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


class SparseReceiver:
    """An engine's state for sparse updates: a copy of its weights in wire precision, since engines store
    whole layers in other formats."""

    def __init__(self) -> None:
        self.known: dict[str, Tensor] = {}
        self.state = ""

    def apply(self, update: Update, arriving: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the whole model after an update. Raises TransferError if the update was made for another
        state, or if its checksum is wrong."""
        if update["delta"] is None:
            self.known = {name: tensor.clone() for name, tensor in arriving}
            _verify("", self.known.values(), update)
        else:
            if update["base"] != self.state:
                raise TransferError(
                    f"a sparse update for state {update['base'][:8]} reached an engine in state "
                    f"{self.state[:8] or 'none'}: the engine needs a full update first"
                )
            payload = {name: tensor.clone() for name, tensor in arriving}
            _verify(self.state, payload.values(), update)
            apply_delta(self.known, Delta(update["delta"], **payload))
        self.state = update["state"]
        yield from self.known.items()


def _verify(base: str, tensors: Iterable[Tensor], update: Update) -> None:
    actual = digest(base, tensors)
    if actual != update["state"]:
        raise TransferError(f"the checksum is {actual[:8]}, but {update['state'][:8]} was sent")
