"""The transport `ipc`: learner and engine take turns on one GPU, and weights are sent as CUDA handles.

    engine samples            the learner is offloaded to host memory
    before_step               the engine sleeps (weights and KV cache are dropped), the learner is reloaded
    push                      the engine's weights wake and are filled from the learner's memory; the learner
                              is offloaded, the engine's KV cache wakes

`ColocatedChannel` orders the turns and `IpcSender` moves the bytes: on a machine without a GPU the same
channel runs over gloo, which lets tests check the order.
"""

from __future__ import annotations

import base64
import pickle
import time
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from rft.sync.channel import PushReport, WeightChannel
from rft.sync.publisher import Sender
from rft.sync.spec import ChannelSpec, Link, Manifest, Named, Update


class IpcSender(Sender):
    """Send every tensor as a CUDA handle, which the engine's process maps into its memory.

    Tensors in wire precision are shared without a copy; the others exist twice until `close`.
    """

    reads_at_announce: ClassVar[bool] = True

    def __init__(self, spec: ChannelSpec, link: Link) -> None:
        self.shared: list[Tensor] = []

    def announce(self, version: int, manifest: Manifest, named: Named) -> Update:
        """Return the fields of vLLM's IPCWeightTransferUpdateInfo."""
        from torch.multiprocessing.reductions import reduce_tensor

        self.close()
        gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handles = []
        for _, tensor in named:
            self.shared.append(tensor.detach().contiguous())
            handles.append({gpu: reduce_tensor(self.shared[-1])[1]})
        torch.cuda.synchronize()  # the engine reads on another stream
        return {
            "names": [name for name, _, _ in manifest],
            "dtype_names": [dtype for _, dtype, _ in manifest],
            "shapes": [list(shape) for _, _, shape in manifest],
            "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
        }

    def send(self, named: Named) -> int:
        """No-op: the engine reads the shared memory. Return its size in bytes."""
        return sum(tensor.nbytes for tensor in self.shared)

    def close(self) -> None:
        """Free the copies that the engine has read."""
        if self.shared:
            self.shared.clear()
            torch.cuda.ipc_collect()


class ColocatedChannel(WeightChannel):
    """Let learner and engine take turns on one device. Each push reports the device memory in use after every
    switch, and the duration of the switches."""

    learners_turn = True  # the learner loads first
    measured: dict[str, float]

    async def before_start(self) -> None:
        """Offload the learner once it has loaded, so that the device is free for an engine to start."""
        await self.learner.offload()
        self.learners_turn = False
        self.measured = {}

    async def before_step(self) -> None:
        if self.learners_turn:
            return
        begin = time.perf_counter()
        await self.engines.sleep()
        await self.learner.reload()
        self.learners_turn = True
        await self._measure("train", begin)

    async def push(self, version: int) -> PushReport:
        start = time.perf_counter()
        await self.before_step()
        peak = await self.learner.peak_memory()
        report = await super().push(version)
        await self._measure("push", time.perf_counter())
        begin = time.perf_counter()
        await self.learner.offload()
        await self.engines.wake()
        self.learners_turn = False
        await self._measure("rollout", begin)
        measured = {**report.measured, **self.measured, "memory/learner_peak": peak}
        self.measured = {}
        return replace(report, seconds=time.perf_counter() - start, measured=measured)

    async def _measure(self, phase: str, begin: float) -> None:
        """Record the bytes in use on the device after a switch that began at `begin`."""
        self.measured["time/switch"] = self.measured.get("time/switch", 0.0) + time.perf_counter() - begin
        self.measured[f"memory/device/{phase}"] = await self.learner.device_memory()
