"""`sparse` between GPUs: what is sent, taken apart by vLLM's own classes and written by its own loader. Only
NCCL itself is stood in for, by a list; tests/integration/test_nccl.py has the real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rft.rollout.engine import Link
from rft.sync import sparse_nccl
from rft.sync.broadcast import manifest_of
from rft.sync.delta import bits
from rft.sync.sparse_nccl import SparseNcclSender
from rft.sync.spec import TransferError
from tests.sync.wires import forty_shapes, nudge


class Recorded:
    """A group that keeps what is broadcast."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def broadcast(self, tensor: Tensor, src: int) -> None:
        assert src == 0
        self.sent.append(tensor.clone())

    def destroy(self) -> None:
        self.sent.clear()


class Model(torch.nn.Module):
    """Parameters of any names and shapes, loaded as vLLM loads a checkpoint."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in weights.items():
            *path, last = name.split(".")
            inner: torch.nn.Module = self
            for part in path:
                if part not in dict(inner.named_children()):
                    inner.add_module(part, torch.nn.Module())
                inner = inner.get_submodule(part)
            inner.register_parameter(last, torch.nn.Parameter(torch.zeros_like(tensor)))

    def load_weights(self, weights: Any) -> set[str]:
        from vllm.model_executor.models.utils import AutoWeightsLoader

        return AutoWeightsLoader(self).load_weights(weights)


@pytest.fixture
def sender(monkeypatch: pytest.MonkeyPatch) -> SparseNcclSender:
    monkeypatch.setattr(sparse_nccl, "open_nccl", lambda link: Recorded())
    return SparseNcclSender(Link("", 0, 0, 2, 30), full_every=4, part_bytes=40_000)


def push(sender: SparseNcclSender, weights: dict[str, Tensor], model: Model) -> tuple[int, int]:
    """What of the engine reads `receive_weights` reads here; returns parts and bytes."""
    from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseNCCLWeightTransferUpdateInfo
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        CheckpointWeightPatch,
        load_checkpoint_weight_patches,
    )

    sender.group.sent.clear()
    wire = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    parts = sender.announce(1, manifest_of(wire.items()), wire.items())["parts"]
    sent = sender.send(())
    arrived = iter(sender.group.sent)
    for part in parts:
        info = SparseNCCLWeightTransferUpdateInfo(**part)
        patches = []
        rows = zip(info.names, info.dtype_names, info.shapes, info.num_updates_list, strict=True)
        for name, dtype, shape, count in rows:
            indices, values = next(arrived), next(arrived)
            assert indices.shape == values.shape == (count,) and indices.dtype == torch.int32
            assert values.dtype == getattr(torch, dtype)
            patches.append(CheckpointWeightPatch(name, tuple(shape), values.dtype, values, indices))
        load_checkpoint_weight_patches(model, patches)
    assert next(arrived, None) is None
    for name, parameter in model.named_parameters():
        assert torch.equal(bits(parameter.detach()), bits(wire[name])), name
    return len(parts), sent


def test_every_bit_arrives_and_little_travels(sender: SparseNcclSender) -> None:
    weights = forty_shapes()
    model = Model({name: tensor.to(torch.bfloat16) for name, tensor in weights.items()})
    elements = sum(tensor.numel() for tensor in weights.values())
    parts, sent = push(sender, weights, model)
    assert parts > 3 and sent == 6 * elements  # indices in 4 bytes, values in 2
    for seed in range(1, 4):
        nudge(weights, seed)
        parts, sent = push(sender, weights, model)
        assert 0 < sent < 0.1 * 6 * elements and parts == 1
        assert sent == 6 * sum(sender.changes.values())
    assert push(sender, weights, model)[1] == 6 * elements  # every fourth


def test_a_step_that_changed_nothing_is_a_push_too(sender: SparseNcclSender) -> None:
    weights = forty_shapes()
    model = Model({name: tensor.to(torch.bfloat16) for name, tensor in weights.items()})
    push(sender, weights, model)
    assert push(sender, weights, model) == (1, 6)
    assert set(sender.changes.values()) == {0}


def test_a_tensor_beyond_int32_is_refused(sender: SparseNcclSender) -> None:
    giant = {"embed.weight": torch.empty(2**31, device="meta", dtype=torch.bfloat16)}
    with pytest.raises(TransferError, match=r"embed.weight has 2147483648 elements.*transport nccl"):
        sender.announce(0, manifest_of(giant.items()), giant.items())


def test_vllm_takes_what_joins_and_opens_the_group() -> None:
    """The names and fields that both ends use of vLLM, which no CPU runs."""
    from inspect import signature

    from vllm.distributed.weight_transfer import nccl_common, packed_tensor
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

    address = {"master_address": "10.0.0.1", "master_port": 29500, "world_size": 3}
    info = nccl_common.NCCLWeightTransferInitInfo(rank_offset=1, packed=True, **address)
    assert info.nccl_unique_id_bytes is None
    assert next(iter(signature(nccl_common.trainer_init).parameters)) == "init_info"
    wanted = {"iterator", "group", "src", "post_iter_func"}
    assert wanted <= set(signature(packed_tensor.packed_nccl_broadcast_producer).parameters)
    assert set(signature(NCCLWeightTransferUpdateInfo).parameters) == {"names", "dtype_names", "shapes"}
