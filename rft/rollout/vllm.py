"""vLLM as a rollout engine: AsyncLLM with token ids in and out, and weights over vLLM's transfer API; also
with the policy as a LoRA adapter, and colocated with the learner on one device."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import util
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rft.config.rollout import InFlight
from rft.errors import EngineError
from rft.rollout.engine import CPU_BLOCK, Aborted, EngineSpec, Generated, Request, Sampling, ScoredToken
from rft.sync import nccl
from rft.sync.spec import Link, Update
from rft.utils.allocator import allocator_environment
from rft.utils.cores import threads_for
from rft.utils.deadlines import Deadline, within
from rft.utils.quick_imports import quick_imports

_INITIAL_VERSION = -1  # weights as loaded from disk: no push has arrived yet


def _version(label: str) -> int:
    """Parse the policy version from vLLM's label; vLLM's label for never-pushed weights gives -1."""
    return int(label) if label.isdigit() else _INITIAL_VERSION


def compiled_code_folder() -> str:
    """Return a folder for torch's compiled code that is used with one instruction set of the processor only.

    vLLM compiles parts of its sampler, and torch keeps the C++ code of a graph under a key without the
    instruction set. Code for AVX-512, cached by another processor or without `ATEN_CPU_CAPABILITY`, does not
    compile without vectors, and computes wrong values with the shorter ones of AVX2.
    """
    used = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folder = Path(used or Path(tempfile.gettempdir(), f"torchinductor-{os.getuid()}"))
    name = torch.backends.cpu.get_cpu_capability().lower()
    return str(folder if folder.name == name else folder / name)


@contextmanager
def _quick_processes() -> Iterator[None]:
    """Let processes spawned in the block import `rft.rollout.engine_process` as their main module."""
    main, other = sys.modules["__main__"], ModuleType("__main__")
    other.__spec__ = util.find_spec("rft.rollout.engine_process")
    sys.modules["__main__"] = other
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _scored(tokens: tuple[int, ...], logprobs: Any, top: int) -> tuple[ScoredToken, ...]:
    """Read vLLM's log-probs of a prompt: for each token a dict with its entry, and those of the likeliest."""
    scored = []
    for token, row in zip(tokens[1:], logprobs[1:], strict=True):
        ordered = sorted(((t, entry.logprob) for t, entry in row.items()), key=lambda pair: -pair[1])
        scored.append(ScoredToken(row[token].logprob, tuple(ordered[:top])))
    return tuple(scored)


class VLLMEngine:
    """A vLLM engine. Methods as in `RolloutEngine`."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._engine: Any = None
        self._version = _INITIAL_VERSION
        self._scored = count()
        self._continued = False  # the last push kept the KV cache of the previous version

    async def start(self) -> None:
        """Start vLLM. vLLM's worker processes read the environment variables."""
        config, on_cpu = self.spec.config, self.spec.device == "cpu"
        if on_cpu:
            os.environ.update(allocator_environment())
            os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would replace `kv_cache_memory_bytes`
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = config.cores or "nobind"
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled_code_folder()
        os.environ["OMP_NUM_THREADS"] = str(threads_for(config.threads, config.cores))
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

        with quick_imports():
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM

        args: dict[str, Any] = {
            "model": self.spec.model,
            "tokenizer": self.spec.tokenizer,
            "dtype": self.spec.dtype,
            "seed": self.spec.seed,
            "max_model_len": self.spec.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "tensor_parallel_size": config.tensor_parallel,
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
            "skip_tokenizer_init": not (config.sampling.stop or self.spec.stop_strings),
            "trust_remote_code": self.spec.trust_remote_code,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # the model's sampling defaults would change the log-probs
            "weight_transfer_config": {"backend": self.spec.transport},
            "worker_extension_cls": "rft.sync.vllm_worker.Extension",
            "scheduler_cls": "rft.contrib.vllm_scheduler.collecting_scheduler",
            "scheduling_policy": "priority",  # by arrival, except for `score`
            "disable_log_stats": True,
            "enable_log_requests": False,
        }
        if on_cpu:
            args["kv_cache_memory_bytes"] = config.kv_cache_bytes
            # A prompt split over two engine steps rewinds its random generator, but a CPU generator cannot be
            # rewound: seeded requests would kill the engine. So prompts are never split.
            args |= {"enable_chunked_prefill": False}
            # Only whole blocks of a prompt are shared by its completions. vLLM's default on CPU, 128 tokens,
            # computes a prompt of 99 tokens once for each of them.
            args["block_size"] = CPU_BLOCK
            args["max_num_batched_tokens"] = max(8192, self.spec.max_model_len)
            if config.tensor_parallel == 1:
                # vLLM's default on CPU is a separate worker process, for which the engine busy-waits on a
                # core that the worker needs. (vLLM rewrites "uni" to that default, but not the class.)
                from vllm.v1.executor.uniproc_executor import UniProcExecutor

                args["distributed_executor_backend"] = UniProcExecutor
        with _quick_processes():
            self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**{**args, **self.spec.engine_args}))

    async def generate(self, request: Request) -> list[Generated]:
        """Sample `request.sampling.n` completions, in sample order."""
        from vllm.inputs import tokens_input

        params = self._params(request.sampling)
        if request.scores_prompt:
            params.prompt_logprobs = request.prompt_top  # and the token's
        start_version = self._version
        # The salt prevents sharing prefixes with requests of another version, whose keys and values differ.
        prompt = tokens_input(list(request.tokens), cache_salt=str(start_version))
        output = None
        sent = self._engine.generate(prompt, params, request_id=request.id, **self._request_args())
        async for latest in sent:
            output = latest
        if output is None or not output.finished:
            raise EngineError(f"vLLM ended request {request.id} without finishing it")
        ordered = sorted(output.outputs, key=lambda o: o.index)
        cached = output.num_cached_tokens or 0
        generated = [self._generated(request.id, o, cached) for o in ordered]
        if request.scores_prompt:
            scored = _scored(request.tokens, output.prompt_logprobs, request.prompt_top)
            generated = [replace(g, prompt=scored) for g in generated]
        if self._continued and self._version != start_version:
            # Its last tokens were also sampled from keys and values of the version at its start.
            return [replace(g, versions=((start_version, 0, len(g.tokens)),)) for g in generated]
        return generated

    async def score(self, tokens: tuple[int, ...]) -> list[float]:
        """Score ahead of waiting requests. vLLM does not use the prefix cache for prompt log-probs."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        name = f"score-{self._version}-{next(self._scored)}"
        prompt = tokens_input(list(tokens), cache_salt=name)
        args = {**self._request_args(), "priority": -1}
        output = None
        async for latest in self._engine.generate(prompt, params, request_id=name, **args):
            output = latest
        if output is None or output.prompt_logprobs is None:
            raise EngineError(f"vLLM ended request {name} without the prompt's log-probs")
        rows = zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        return [row[token].logprob for token, row in rows]

    def _request_args(self) -> dict[str, Any]:
        """Additional arguments of every request to vLLM."""
        return {}

    def _params(self, s: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=s.n,
            max_tokens=s.max_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            seed=s.seed,
            stop=list(s.stop) or None,
            stop_token_ids=list({*s.stop_token_ids, *self.spec.stop_token_ids}),
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(s.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _generated(self, request_id: str, output: Any, cached: int) -> Generated:
        tokens = tuple(output.token_ids)
        if output.finish_reason == "abort":
            raise Aborted(f"request {request_id} was aborted by a weight sync")
        if output.finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended request {request_id} with reason {output.finish_reason!r}")
        spans = tuple((_version(s.version), s.start, s.end) for s in output.weight_versions or ())
        if not spans:
            spans = ((self._version, 0, len(tokens)),)
        return Generated(tokens, tuple(output.logprobs.logprobs), output.finish_reason, spans, cached)

    async def join(self, link: Link) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        info: dict[str, Any] = {"rank_offset": link.rank_offset, "world_size": link.world_size}
        if self.spec.transport == "ipc":
            info = {"packed": False}
        elif self.spec.transport in ("nccl", "sparse_nccl"):
            # Otherwise vLLM would replace the old communicator without freeing its memory.
            await self._control("shutdown_weight_transfer", self._engine.shutdown_weight_transfer_engine())
            info |= {"master_address": link.host, "master_port": link.port}
            info |= {"packed": self.spec.transport == "nccl", "packed_buffer_size_bytes": nccl.PACKED_BYTES}
        else:
            info |= {"host": link.host, "port": link.port, "timeout_s": link.timeout_s}
        await within(
            Deadline(link.timeout_s, "sync.timeout_s"),
            "joining the weight channel",
            self._engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info)),
        )

    async def begin_update(self, in_flight: InFlight) -> None:
        self._continued = in_flight == "continue"
        mode = "keep" if self._continued else in_flight
        await self._pause(mode, clear_cache=not self._continued)
        await self._control("start_weight_update", self._engine.start_weight_update())

    async def _pause(self, mode: str, *, clear_cache: bool) -> None:
        """Pause like AsyncLLM's `pause_generation` for text models, without its final 20 ms sleep, which lets
        late samples be read first: the reader here does not depend on that order."""
        pause = self._engine.engine_core.pause_scheduler_async(mode=mode, clear_cache=clear_cache)
        # Draining takes as long as the completions in flight: the caller's deadline applies, not this one.
        await (pause if mode == "wait" else self._control("pause", pause))

    async def receive(self, update: Update) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        for part in update.get("parts", [update]):  # in sending order
            request = WeightTransferUpdateRequest(part)
            await self._control("update_weights", self._engine.update_weights(request))

    async def finish_update(self, version: int) -> None:
        await self._control(
            "finish_weight_update", self._engine.finish_weight_update(weight_version=str(version))
        )
        self._version = version

    async def resume(self) -> None:
        await self._control("resume", self._engine.resume_generation())

    async def version(self) -> int:
        """The version that vLLM reports; -1 before the first push."""
        reported = await self._control("get_weight_version", self._engine.get_weight_version())
        return int(reported) if self._version >= 0 else _INITIAL_VERSION

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call a method of the worker extension on every worker of this engine."""
        return await self._control(method, self._engine.collective_rpc(method, args=args))

    async def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown(timeout=0.0)  # kill: it would wait for SIGTERM, which is blocked there
            self._engine = None

    async def _control(self, what: str, awaitable: Any) -> Any:
        deadline = Deadline(self.spec.config.control_timeout_s, "rollout.control_timeout_s")
        return await within(deadline, f"vLLM {what}", awaitable)


class VLLMAdapterEngine(VLLMEngine):
    """vLLM with the policy as a LoRA adapter on an unchanged base. Every version is a new adapter to vLLM:
    the prefix cache distinguishes adapters by name, so a stale prefix cannot be used for a fresh one.

    Completions in flight end or are aborted before the next adapter loads.
    """

    async def begin_update(self, in_flight: InFlight) -> None:
        assert in_flight in ("wait", "abort"), "the preflight refuses the others for this transport"
        await self._pause(in_flight, clear_cache=True)

    async def receive(self, update: Update) -> None:
        await self.collective_rpc("load_adapter", (update,))

    async def finish_update(self, version: int) -> None:
        held = await self.collective_rpc("adapter_version")
        self._version = held[0] if len(set(held)) == 1 else _INITIAL_VERSION

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
        version = self._version
        generated = await super().generate(request)
        return [replace(g, versions=((version, 0, len(g.tokens)),)) for g in generated]


class VLLMSleepingEngine(VLLMEngine):
    """vLLM that sleeps while the learner uses their shared device. Its weights wake up for an update, its KV
    cache only on `wake`: the learner is offloaded in between. Requests wait while it sleeps."""

    async def start(self) -> None:
        # CUDA handles are sent pickled, by this run's learner.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        if self.spec.device != "cpu":  # on CPU, sleeping is allowed without this, and frees nothing
            engine_args = {"enable_sleep_mode": True, **self.spec.engine_args}
            self.spec = replace(self.spec, engine_args=engine_args)
        await super().start()

    async def sleep(self) -> None:
        """Drop weights and KV cache: the next push sends all weights. Nothing is in flight at that time,
        since the step's last completion has arrived."""
        await self._control("sleep", self._engine.sleep(level=2, mode="wait"))

    async def begin_update(self, in_flight: InFlight) -> None:
        await self._control("wake_up", self._engine.wake_up(tags=["weights"]))
        await self._control("start_weight_update", self._engine.start_weight_update())

    async def resume(self) -> None:
        """No-op: `wake` resumes, once the KV cache exists again."""

    async def wake(self) -> None:
        """Wake the KV cache, and resume sampling."""
        awake: Any = await self._control("wake_up", self._engine.wake_up())
        if not awake:
            raise EngineError(
                "vLLM did not wake up completely: its weights or its KV cache are still offloaded"
            )
