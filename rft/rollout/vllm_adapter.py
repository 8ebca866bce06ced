"""vLLM with the policy as a LoRA adapter on a base that stays as it was loaded."""

from __future__ import annotations

from typing import Any

from rft.config.rollout import InFlight
from rft.rollout.engine import Generated, Request
from rft.rollout.vllm import VLLMEngine


class VLLMAdapterEngine(VLLMEngine):
    """Methods as in `RolloutEngine`. Every version of the policy is an adapter of its own for vLLM: the
    prefix cache knows an adapter by its name, so a stale prefix cannot be taken for a fresh one.

    No request outlives its adapter: completions in flight end or are cut off before the next one comes.
    """

    async def begin_update(self, in_flight: InFlight) -> None:
        assert in_flight in ("wait", "abort"), "the preflight refuses it for this transport"
        await self._pause(in_flight, clear_cache=True)

    async def receive(self, update: dict[str, Any]) -> None:
        await self.collective_rpc("load_adapter", (update,))

    async def finish_update(self, version: int) -> None:
        held = await self.collective_rpc("adapter_version")
        self._version = held[0] if len(set(held)) == 1 else -1

    async def version(self) -> int:
        """The version that all workers hold; -1 before the first push."""
        return self._version

    def _request_args(self) -> dict[str, Any]:
        from vllm.lora.request import LoRARequest

        if self._version < 0:
            return {}
        name = f"policy-{self._version}"
        return {"lora_request": LoRARequest(name, self._version + 1, f"memory:{name}")}

    async def generate(self, request: Request) -> list[Generated]:
        """Sample `request.sampling.n` completions, in sample order."""
        version = self._version
        found = await super().generate(request)
        return [Generated(g.tokens, g.logps, g.finish, ((version, 0, len(g.tokens)),)) for g in found]
