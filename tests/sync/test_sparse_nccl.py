"""`sparse` between GPUs: how much travels to vLLM's own sparse engine, and in how many parts. gloo is in
NCCL's place (nccl_on_cpu.py); tests/integration/test_nccl.py has a whole vLLM, and on GPUs the real NCCL."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rft.errors import TransferError
from rft.sync.spec import manifest_of
from tests.sync.wires import Wire, channel, forty_shapes, nudge, same_bits

pytestmark = pytest.mark.parametrize("transport", ["sparse_nccl"], indirect=True)


def push(wire: Wire, weights: dict[str, Tensor]) -> tuple[int, int]:
    """Returns parts and bytes, once all is there."""
    (received,), sent = wire.push(weights)
    assert same_bits(received, weights, torch.bfloat16)
    return len(wire.update["parts"]), sent.bytes


def test_every_bit_arrives_and_little_travels(transport: str) -> None:
    wire = Wire(channel(transport, None, full_every=4), size=1)
    weights = forty_shapes()
    elements = sum(tensor.numel() for tensor in weights.values())
    parts, sent = push(wire, weights)
    assert parts > 3 and sent == 6 * elements  # indices in 4 bytes, values in 2
    for seed in range(1, 4):
        nudge(weights, seed)
        parts, sent = push(wire, weights)
        assert 0 < sent < 0.1 * 6 * elements and parts == 1
        assert sent == 6 * sum(wire.publisher.sender.changed.values())
    assert push(wire, weights)[1] == 6 * elements  # every fourth


def test_a_step_that_changed_nothing_is_a_push_too(transport: str) -> None:
    wire = Wire(channel(transport, None), size=1)
    weights = forty_shapes()
    push(wire, weights)
    assert push(wire, weights) == (1, 6)
    assert set(wire.publisher.sender.changed.values()) == {0}


def test_a_tensor_beyond_int32_is_refused(transport: str) -> None:
    wire = Wire(channel(transport, None), size=1)
    giant = {"embed.weight": torch.empty(2**31, device="meta", dtype=torch.bfloat16)}
    with pytest.raises(TransferError, match=r"embed.weight has 2147483648 elements.*transport nccl"):
        wire.publisher.announce(0, manifest_of(giant.items()), giant.items())
