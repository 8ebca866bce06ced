"""vLLM that sleeps while the learner has the device that the two share."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from rft.config.rollout import InFlight
from rft.errors import EngineError
from rft.rollout.vllm import VLLMEngine


class VLLMSleepingEngine(VLLMEngine):
    """Methods as in `RolloutEngine`, and `sleep` and `wake`. Its weights wake for an update, its KV cache
    with `wake` only: in between the learner moves out. Requests that come while it sleeps wait."""

    async def start(self) -> None:
        # CUDA handles travel pickled, from this run's own learner.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        if self.spec.device != "cpu":  # where vLLM goes through the motions and frees nothing
            sleeping = {"enable_sleep_mode": True, **self.spec.engine_args}
            self.spec = replace(self.spec, engine_args=sleeping)
        await super().start()

    async def sleep(self) -> None:
        """Drop weights and KV cache: the next push brings all weights. Nothing is in flight by then, since a
        step's last completion has come."""
        await self._control("sleep", self._engine.sleep(level=2, mode="wait"))

    async def begin_update(self, in_flight: InFlight) -> None:
        await self._control("wake_up", self._engine.wake_up(tags=["weights"]))
        await self._control("start_weight_update", self._engine.start_weight_update())

    async def resume(self) -> None:
        """Not yet: `wake` does, once there is a KV cache again."""

    async def wake(self) -> None:
        """Wake what still sleeps, and sample again."""
        awake: Any = await self._control("wake_up", self._engine.wake_up())
        if not awake:
            raise EngineError("vLLM woke up in part only: its weights or its KV cache are still asleep")
