"""rft inside vLLM's worker process: the gloo weight-transfer engine and the worker extension.

vLLM imports this module in every worker because `worker_extension_cls` names it, before the model
loads; a transfer engine has to be registered there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rft.sync import broadcast


@dataclass
class GlooInit(WeightTransferInitInfo):
    """Where the sender listens; `rank_offset` plus the worker's own rank is its rank in the group."""

    host: str
    port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):
    """What is about to arrive: the manifest, as three lists."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInit, GlooUpdate]):
    """Receives checkpoint-format weights over gloo: vLLM's NCCL protocol, other bytes."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate
    repack_tied_head = True

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        rank = init_info.rank_offset + self.parallel_config.rank
        self.group: Any = broadcast.open_group(
            init_info.host, init_info.port, rank, init_info.world_size, init_info.timeout_s
        )

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdate) -> None:
        columns = zip(update_info.names, update_info.dtype_names, map(tuple, update_info.shapes), strict=True)
        self.model.load_weights(broadcast.receive(self.group, list(columns)))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        if self.repack_tied_head:
            _repack_heads(self.model)

    def shutdown(self) -> None:
        self.group = None


def _repack_heads(model: torch.nn.Module) -> None:
    """CPU linears run on a packed copy. A tied head shares the embedding's parameter, so the reload
    does not see it and its copy keeps the old weights: pack it again."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead" and next(module.parameters()).numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)


class Extension:
    """Methods that `collective_rpc` reaches on every worker."""

    def set_repack_tied_head(self, on: bool) -> None:
        """Switch the tied-head repair; off only in the test that proves the proof of arrival."""
        GlooWeightTransferEngine.repack_tied_head = on
