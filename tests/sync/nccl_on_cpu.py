"""What only a GPU has, stood in for on a CPU, so that all the rest of `nccl` and `sparse_nccl` runs there:
rft's senders, and of vLLM the communicator, its rendezvous, the transfer engines, packing and loading.

Stood in for is this, by `install`, and nothing else:

- NCCL's library: of vLLM's wrapper of it, the calls that a transfer makes, over gloo within one machine. As
  with NCCL, whoever waits for a peer that is gone waits for ever, and ends without an error when its own
  communicator is aborted.
- CUDA's streams: whatever a call starts is done when it returns.
- The device that is current: the CPU.

vLLM's workers on CPU also keep matrices as packed copies, which no GPU does, and a sparse update, which is
written in place, would not reach: `keep_matrices_plain` has them keep what they loaded.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from torch.distributed.distributed_c10d import AllreduceOptions, BroadcastOptions
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.device_communicators.pynccl_wrapper import ncclDataTypeEnum, ncclUniqueId

from rft.utils.network import use_interface_of

HOST = "127.0.0.1"
FOR_EVER = timedelta(seconds=60)  # longer than any deadline in the tests
DTYPES = {number: dtype for dtype, number in ncclDataTypeEnum._torch_to_nccl_map().items()}


class Communicator:
    """A gloo group whose members wait as NCCL's do."""

    def __init__(self, port: int, rank: int, world_size: int) -> None:
        use_interface_of(HOST)
        store = TCPStore(HOST, port, is_master=False, timeout=FOR_EVER)
        self.group = ProcessGroupGloo(PrefixStore("nccl", store), rank, world_size, FOR_EVER)
        self.rank = rank
        self.aborted = threading.Event()

    def finish(self, work: Any) -> bool:
        """True once it is done, False where the communicator was aborted before."""
        while not self.aborted.is_set():
            try:
                work.wait(timedelta(milliseconds=50))
                return True
            except RuntimeError:  # not yet; or gloo has noticed that a peer is gone, which NCCL would not
                if work.is_completed():
                    self.aborted.wait(0.05)
        return False


class GlooForNccl:
    """vLLM's `NCCLLibrary`. Buffers come as addresses; gloo works on copies, which outlive an abort."""

    live: ClassVar[dict[int, Communicator]] = {}  # by handle, until they are aborted
    _roots: ClassVar[list[TCPStore]] = []
    _handles: ClassVar[Any] = itertools.count(1)

    def __init__(self, path: str | None = None) -> None:
        pass

    def ncclGetRawVersion(self) -> int:
        return 22907

    def ncclGetVersion(self) -> str:
        return "2.29.7"

    def ncclGetUniqueId(self) -> ncclUniqueId:
        """As NCCL's own, it says where rank 0 listens."""
        self._roots.append(TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=FOR_EVER))
        unique = ncclUniqueId()
        port = str(self._roots[-1].port).encode()
        ctypes.memmove(unique.internal, port, len(port))
        return unique

    def ncclCommInitRank(self, world_size: int, unique_id: ncclUniqueId, rank: int) -> ctypes.c_void_p:
        port = int(bytes(unique_id.internal).rstrip(b"\0"))
        handle = next(self._handles)
        self.live[handle] = Communicator(port, rank, world_size)
        return ctypes.c_void_p(handle)

    def ncclAllReduce(
        self, send: Any, receive: Any, count: int, dtype: int, op: int, comm: Any, stream: Any
    ) -> None:
        options = AllreduceOptions()
        self._on_a_copy(send, receive, count, dtype, comm, lambda g, t: g.allreduce([t], options))

    def ncclBroadcast(
        self, send: Any, receive: Any, count: int, dtype: int, root: int, comm: Any, stream: Any
    ) -> None:
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        self._on_a_copy(send, receive, count, dtype, comm, lambda g, t: g.broadcast([t], options))

    def _on_a_copy(
        self, send: Any, receive: Any, count: int, dtype: int, comm: Any, start: Callable[[Any, Any], Any]
    ) -> None:
        """`start(group, tensor)` on what lies at `send` (none: nothing), the result to `receive`."""
        communicator = self.live[comm.value]
        tensor = torch.empty(count, dtype=DTYPES[dtype])
        if send.value:
            ctypes.memmove(tensor.data_ptr(), send.value, tensor.nbytes)
        if count and communicator.finish(start(communicator.group, tensor)):
            ctypes.memmove(receive.value, tensor.data_ptr(), tensor.nbytes)

    def ncclCommAbort(self, comm: Any) -> None:
        self.live.pop(comm.value).aborted.set()


def abort_all() -> None:
    """End every wait in this process, as its own end would."""
    for handle in list(GlooForNccl.live):
        GlooForNccl.live.pop(handle).aborted.set()


class Stream:
    """A CUDA stream on which nothing is ever left to do."""

    cuda_stream = 0

    def __init__(self, device: Any = None, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


def on_stream(stream: Stream) -> AbstractContextManager[None]:
    return nullcontext()


def nothing(device: Any = None) -> None:
    pass


def install(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Stand in for them in this process; `put` is setattr, or a monkeypatch's."""
    put(pynccl, "NCCLLibrary", GlooForNccl)
    put(pynccl, "current_stream", Stream)
    put(torch.cuda, "Stream", Stream)
    put(torch.cuda, "stream", on_stream)
    put(torch.cuda, "current_stream", Stream)
    put(torch.cuda, "synchronize", nothing)
    put(torch.accelerator, "current_device_index", lambda: "cpu")
    put(torch.accelerator, "set_device_index", nothing)
    put(torch.accelerator, "synchronize", nothing)


def keep_matrices_plain() -> None:
    """Have vLLM's layers in this process compute with what they loaded, as on a GPU. Before the model."""
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False
