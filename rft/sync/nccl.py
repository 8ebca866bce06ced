"""Weights over NCCL: vLLM's communicator with a deadline, which NCCL lacks, and the sending end of vLLM's
packed broadcast.

NCCL waits for a lost peer until its communicator is aborted, and then raises nothing. So a group is formed on
a thread that can be abandoned, and a timer aborts a push that takes too long.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Event, Thread, Timer
from typing import Any

import torch
from torch import Tensor

from rft.errors import TransferError
from rft.sync.gloo import as_announced
from rft.sync.publisher import Sender
from rft.sync.spec import ChannelSpec, Link, Manifest, Named, Update, as_update

PACKED_BYTES = 2**30  # of tensors sent as one; both ends of vLLM's packed broadcast must agree on it


class NcclGroup:
    """The learner (NCCL rank 0, on the current CUDA device) and vLLM's workers, which join at the same time.

    Raises TransferError if they do not join, or if a broadcast is not received, within the link's deadline;
    the group cannot be used afterwards.
    """

    def __init__(self, link: Link) -> None:
        self.timeout_s = link.timeout_s
        self.overdue = Event()
        self.comm = _join(link)
        if self.comm.disabled:  # every broadcast would silently do nothing
            raise TransferError(
                "vLLM has switched its NCCL communicator off: VLLM_DISABLE_PYNCCL is set, or NCCL's library "
                "cannot be loaded; use sync.transport gloo"
            )

    @contextmanager
    def deadline(self) -> Iterator[None]:
        """Raise TransferError unless all broadcasts of the block complete in time."""
        torch.cuda.synchronize()  # vLLM packs on streams that do not wait for the learner's last step
        timer = Timer(self.timeout_s, self._abort)
        timer.daemon = True
        timer.start()
        try:
            yield
            torch.cuda.synchronize()
        finally:
            timer.cancel()
        self._check_deadline()

    def broadcast(self, tensor: Tensor, src: int = 0) -> None:
        """Broadcast like vLLM's, but on the current stream, which vLLM's would replace."""
        self._check_deadline()
        self.comm.broadcast(tensor, src=src, stream=torch.cuda.current_stream())

    def _check_deadline(self) -> None:
        if self.overdue.is_set():
            raise TransferError(
                f"an engine did not join a weight sync within {self.timeout_s:g} s (sync.timeout_s); the "
                "group was aborted"
            )

    def _abort(self) -> None:
        self.overdue.set()
        self.close()

    def close(self) -> None:
        self.comm.destroy()


def _join(link: Link) -> Any:
    """Create vLLM's communicator, joining the group."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    place = {"master_address": link.host, "master_port": link.port, "world_size": link.world_size}
    device = torch.accelerator.current_device_index()
    joined: Future[Any] = Future()

    def join() -> None:
        try:
            torch.accelerator.set_device_index(device)  # the current device is per thread
            joined.set_result(trainer_init(place))
        except BaseException as error:
            joined.set_exception(error)

    Thread(target=join, daemon=True).start()
    try:
        return joined.result(link.timeout_s)
    except TimeoutError:
        joined.add_done_callback(lambda late: late.exception() or late.result().destroy())
        raise TransferError(
            f"the engines did not join NCCL's group at {link.host}:{link.port} within {link.timeout_s:g} s"
        ) from None


class NcclSender(Sender):
    """Send with vLLM's packed NCCL broadcast."""

    def __init__(self, spec: ChannelSpec, link: Link) -> None:
        self.group = NcclGroup(link)
        self.manifest: Manifest = []

    def announce(self, version: int, manifest: Manifest, named: Named) -> Update:
        self.manifest = manifest
        return as_update(manifest)

    def send(self, named: Named) -> int:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        total = 0

        def counted() -> Iterator[tuple[str, Tensor]]:
            nonlocal total
            for name, tensor in as_announced(self.manifest, named):
                total += tensor.nbytes
                yield name, tensor

        with self.group.deadline():
            packed_nccl_broadcast_producer(
                iterator=counted(),
                group=self.group,
                src=0,
                post_iter_func=lambda item: item[1],
                buffer_size_bytes=PACKED_BYTES,
            )
        return total

    def close(self) -> None:
        self.group.close()
