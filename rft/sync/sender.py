"""The learner's end of the weight channel, one class per transport."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from rft.rollout.engine import Link
from rft.sync import broadcast


class Sender(Protocol):
    """Sends named tensors, in manifest order, to the whole group."""

    def send(self, named: Iterable[tuple[str, Tensor]]) -> int: ...

    def close(self) -> None: ...


class GlooSender:
    """Tensors packed into buckets, over gloo."""

    def __init__(self, link: Link) -> None:
        self.group: Any = broadcast.open_group(link.host, link.port, 0, link.world_size, link.timeout_s)

    def send(self, named: Iterable[tuple[str, Tensor]]) -> int:
        return broadcast.send(self.group, [tensor for _, tensor in named])

    def close(self) -> None:
        self.group = None


class NcclSender:
    """vLLM's packed NCCL broadcast, sender side."""

    def __init__(self, link: Link) -> None:
        from vllm.distributed.weight_transfer.nccl_common import open_trainer_endpoint
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self.group: Any = open_trainer_endpoint(
            NCCLTrainerInitInfo(link.host, link.port, link.world_size, rank=0)
        )

    def send(self, named: Iterable[tuple[str, Tensor]]) -> int:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        total = 0

        def counted() -> Iterable[tuple[str, Tensor]]:
            nonlocal total
            for name, tensor in named:
                total += tensor.numel() * tensor.element_size()
                yield name, tensor.contiguous()

        packed_nccl_broadcast_producer(
            iterator=iter(counted()), group=self.group, src=0, post_iter_func=lambda item: item[1]
        )
        torch.cuda.synchronize()
        return total

    def close(self) -> None:
        self.group.destroy()


def open_sender(transport: str, link: Link) -> Sender:
    """The sender of a transport: gloo or nccl."""
    return NcclSender(link) if transport == "nccl" else GlooSender(link)
