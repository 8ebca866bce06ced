"""rft inside vLLM's worker process: the weight-transfer engine and the worker extension.

vLLM imports this module in every worker because `worker_extension_cls` names it, before the model
loads; transfer engines must be registered at that point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.sample import sampler

from rft.sync.adapter import load_adapter
from rft.sync.gloo import Receiver
from rft.sync.spec import Link, Update
from rft.utils.quick_imports import collect_as_usual

collect_as_usual()  # after vLLM's imports: see rft.rollout.engine_process


@dataclass
class ChannelInit(WeightTransferInitInfo):
    """The sender's address (no host: weights are sent as files). A worker's rank in the group is
    `rank_offset` plus its rank in the engine."""

    host: str
    port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class ChannelUpdate(WeightTransferUpdateInfo):
    """The announcement of the learner's sender."""

    update: Update


class ChannelEngine(WeightTransferEngine[ChannelInit, ChannelUpdate]):
    """Receive checkpoint-format weights over rft's transports, using vLLM's protocol."""

    init_info_cls = ChannelInit
    update_info_cls = ChannelUpdate
    repack_tied_head = True

    def init_transfer_engine(self, init_info: ChannelInit) -> None:
        self.shutdown()
        rank = init_info.rank_offset + self.parallel_config.rank
        self.receiver: Receiver | None = Receiver(
            Link(init_info.host, init_info.port, rank, init_info.world_size, init_info.timeout_s)
        )

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(ChannelUpdate(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ChannelUpdate) -> None:
        assert self.receiver is not None, "init_transfer_engine comes first"
        self.model.load_weights(self.receiver.receive(update_info.update))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.repack_tied_head:
            _repack_heads(self.model)

    def shutdown(self) -> None:
        receiver = getattr(self, "receiver", None)
        if receiver is not None:
            receiver.close()


def _repack_heads(model: torch.nn.Module) -> None:
    """Repack tied heads, since CPU linears run on a packed copy: a tied head shares the embedding's
    parameter, so the reload does not see it, and its copy would keep the old weights."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead" and next(module.parameters()).numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _no_ranks(logprobs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return zeros for the ranks of sampled tokens, which no part of rft reads. vLLM compares them with the
    whole vocabulary for each token, by code that it compiles during the first request, for a second."""
    return torch.zeros(len(logprobs), dtype=torch.int64, device=logprobs.device)


assert hasattr(sampler, "batched_count_greater_than"), "vLLM counts the ranks of tokens elsewhere"
sampler.batched_count_greater_than = _no_ranks

for _transport in ("gloo", "sparse", "file", "adapter"):
    WeightTransferEngineFactory.register_engine(_transport, ChannelEngine)


class Extension:
    """Worker methods that are called with `collective_rpc`."""

    def set_repack_tied_head(self, on: bool) -> None:
        """Switch the tied-head repair; off only in the test that the proof detects wrong weights."""
        ChannelEngine.repack_tied_head = on

    def load_adapter(self, update: Update) -> None:
        """Receive an announced adapter and replace the previous one (LoRA only)."""
        worker: Any = self  # vLLM's worker, which this class is mixed into
        receiver: Receiver = worker.weight_transfer_engine.receiver
        tensors = {name: tensor.clone() for name, tensor in receiver.receive(update)}
        load_adapter(worker.model_runner.lora_manager, update["version"], tensors, update["adapter"])
        worker.held_adapter = update["version"]

    def adapter_version(self) -> int:
        """The policy version of this worker's adapter; -1 before the first."""
        return getattr(self, "held_adapter", -1)
