"""The transport `ipc`: learner and engine share one GPU in turn, and weights go over as CUDA handles.

    engine samples            learner rests in host memory
    before_step               the engine sleeps (weights and KV cache are gone), the learner comes back
    push                      the engine's weights wake, are filled from the learner's own memory; the learner
                              rests, the engine's KV cache wakes

The turns are the channel's and the bytes are the sender's: on a machine without a GPU the same channel runs
over gloo, which is how its order is tested.
"""

from __future__ import annotations

import base64
import pickle
import time
from dataclasses import replace

import torch
from torch import Tensor

from rft.sync.broadcast import Manifest
from rft.sync.channel import PushChannel, PushReport
from rft.sync.spec import Named, Update


class IpcSender:
    """Every tensor as a CUDA handle, which the engine's process maps into its own memory.

    What is already in wire precision is shared as it lies; the rest exists a second time until `release`.
    """

    early = True

    def __init__(self) -> None:
        self.shared: list[Tensor] = []

    def announce(self, version: int, manifest: Manifest, named: Named) -> Update:
        """The fields of vLLM's IPCWeightTransferUpdateInfo."""
        from torch.multiprocessing.reductions import reduce_tensor

        self.release()
        gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handles = []
        for _, tensor in named:
            self.shared.append(tensor.detach().contiguous())
            handles.append({gpu: reduce_tensor(self.shared[-1])[1]})
        torch.cuda.synchronize()  # the engine reads on a stream of its own
        return {
            "names": [name for name, _, _ in manifest],
            "dtype_names": [dtype for _, dtype, _ in manifest],
            "shapes": [list(shape) for _, _, shape in manifest],
            "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
        }

    def send(self, named: Named) -> int:
        """Nothing moves: the engine reads by itself."""
        return sum(tensor.nbytes for tensor in self.shared)

    def release(self) -> None:
        """Give up what the engine has read."""
        if self.shared:
            self.shared.clear()
            torch.cuda.ipc_collect()

    def close(self) -> None:
        self.release()


class ColocatedChannel(PushChannel):
    """Learner and engine in turn on one device. Each push reports what of the device was in use at every
    switch, and how long the switches took."""

    learners_turn = True  # it loads first
    figures: dict[str, float]

    async def before_start(self) -> None:
        """The learner rests, once it has loaded, so that an engine finds the device free. Engines are awake
        when they start."""
        await self.learner.offload()
        self.learners_turn = False
        self.figures = {}

    async def before_step(self) -> None:
        if self.learners_turn:
            return
        begin = time.perf_counter()
        await self.pool.sleep()
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
        await self.pool.wake()
        self.learners_turn = False
        await self._measure("rollout", begin)
        found, self.figures = {**self.figures, "memory/learner_peak": peak}, {}
        return replace(report, seconds=time.perf_counter() - start, measured={**report.measured, **found})

    async def _measure(self, turn: str, begin: float) -> None:
        """Note the bytes in use on the device after a switch that began at `begin`."""
        self.figures["time/switch"] = self.figures.get("time/switch", 0.0) + time.perf_counter() - begin
        self.figures[f"memory/device/{turn}"] = await self.learner.device_memory()
