"""vLLM's receiving end of `nccl` and `sparse_nccl` in a test's own process: rft's engine, vLLM's worker, its
transfer engine and its loaders, on a model of any names and shapes. What lies between rft's engine and the
workers, processes and their messages, is left out.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.config import ParallelConfig, VllmConfig, WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.v1.worker.gpu_worker import Worker

from rft.rollout.vllm import VLLMEngine
from rft.sync.spec import ChannelSpec, Link, Update
from tests.specs import engine_spec

_loading = threading.Lock()


def one_at_a_time(load: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's sparse loader changes torch.Tensor for the time it takes; workers are processes elsewhere."""

    def alone(*args: Any, **kwargs: Any) -> Any:
        with _loading:
            return load(*args, **kwargs)

    return alone


class Model(torch.nn.Module):
    """Parameters of given names and shapes, all zero, loaded as vLLM loads a checkpoint."""

    def __init__(self, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        for name, tensor in weights.items():
            *path, last = name.split(".")
            inner: torch.nn.Module = self
            for part in path:
                if part not in dict(inner.named_children()):
                    inner.add_module(part, torch.nn.Module())
                inner = inner.get_submodule(part)
            zeros = torch.nn.Parameter(torch.zeros_like(tensor, dtype=dtype), requires_grad=False)
            inner.register_parameter(last, zeros)
        record_metadata_for_reloading(self)

    def load_weights(self, weights: Any) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)


class ModelWorker(Worker):
    """A vLLM worker that has a transfer engine and a model, and no device to start."""

    def __init__(self, transport: str, model: Model, rank: int, ranks: int) -> None:
        parallel = ParallelConfig(tensor_parallel_size=ranks, rank=rank)
        self.vllm_config = VllmConfig(parallel_config=parallel)
        self.rank = rank
        self.model_runner: Any = SimpleNamespace(reset_lora_state=lambda: None)
        self._weight_update_active = self._weight_update_is_draft = False
        self.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=transport), self.vllm_config, torch.device("cpu"), model
        )


class VllmEnd:
    """An engine of `ranks` workers, each with a whole model. In the place of vLLM's AsyncLLM it has the calls
    that concern weights."""

    def __init__(self, spec: ChannelSpec, link: Link, weights: dict[str, Tensor], ranks: int = 1) -> None:
        dtype = getattr(torch, spec.wire_dtype)
        self.models = [Model(weights, dtype) for _ in range(ranks)]
        self.workers = [ModelWorker(spec.transport, m, rank, ranks) for rank, m in enumerate(self.models)]
        wanted = replace(engine_spec(Path(), control_timeout_s=link.timeout_s), transport=spec.transport)
        self.engine = VLLMEngine(wanted)
        self.engine._engine = self
        self.version = ""
        self.join(link)

    # -- as the channel's receivers ------------------------------------------------------------------

    def join(self, link: Link) -> None:
        asyncio.run(self.engine.join(link))

    def receive(self, update: Update) -> Iterator[tuple[str, Tensor]]:
        """Yields the first worker's weights, once the update was loaded."""
        asyncio.run(self._update(update))
        yield from ((name, p.detach()) for name, p in self.models[0].named_parameters())

    async def _update(self, update: Update) -> None:
        await self.engine.begin_update("keep")
        await self.engine.receive(update)
        await self.engine.finish_update(int(self.version or -1) + 1)

    def close(self) -> None:
        """Lets go of whatever still waits, as the end of its process would."""
        for worker in self.workers:
            assert worker.weight_transfer_engine is not None
            worker.weight_transfer_engine.shutdown()

    # -- as AsyncLLM ---------------------------------------------------------------------------------

    async def _on_all(self, method: str, *args: Any) -> None:
        """On a thread for each worker, which may be left behind: loop.run_in_executor's are waited for."""
        done = [Future[Any]() for _ in self.workers]

        def call(worker: ModelWorker, answer: Future[Any]) -> None:
            answer.set_running_or_notify_cancel()
            try:
                answer.set_result(getattr(worker, method)(*args))
            except BaseException as error:
                answer.set_exception(error)

        for pair in zip(self.workers, done, strict=True):
            threading.Thread(target=call, args=pair, daemon=True).start()
        await asyncio.gather(*map(asyncio.wrap_future, done))

    async def init_weight_transfer_engine(self, request: Any) -> None:
        await self._on_all("init_weight_transfer_engine", request.init_info)

    async def shutdown_weight_transfer_engine(self) -> None:
        await self._on_all("shutdown_weight_transfer_engine")

    @property
    def engine_core(self) -> VllmEnd:
        return self

    async def pause_scheduler_async(self, **kwargs: Any) -> None:
        pass

    async def start_weight_update(self) -> None:
        await self._on_all("start_weight_update")

    async def update_weights(self, request: Any) -> None:
        await self._on_all("update_weights", request.update_info)

    async def finish_weight_update(self, weight_version: str) -> None:
        await self._on_all("finish_weight_update")
        self.version = weight_version
