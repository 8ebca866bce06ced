"""Config of the rollout workers: which engine, how many, and how they sample."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rft.config.base import ConfigModel

InFlight = Literal["keep", "continue", "wait", "abort"]
"""What a weight push does to completions in flight: they are paused, and their keys and values are computed
again (`keep`) or stay (`continue`); they are finished first; or they are aborted."""


class SamplingConfig(ConfigModel):
    """How completions are sampled for training."""

    max_prompt_length: int = Field(512, ge=1, description="longest prompt, in tokens; none is ever cut")
    max_completion_length: int = Field(512, ge=1, description="longest completion, in tokens")
    temperature: float = Field(1.0, gt=0, description="softmax temperature; log-probs are taken at it too")
    stop: tuple[str, ...] = Field((), description="strings that end a completion (needs detokenising)")
    stop_token_ids: tuple[int, ...] = Field((), description="further token ids that end a completion")


class RolloutConfig(ConfigModel):
    """The rollout workers."""

    engine: Literal["auto", "vllm", "hf"] = Field(
        "auto", description="vllm, hf (plain transformers), or auto: vllm where it is installed"
    )
    replicas: int = Field(1, ge=1, description="independent engines, each a Ray actor")
    tensor_parallel: int = Field(1, ge=1, description="devices per replica")
    sampling: SamplingConfig = Field(SamplingConfig(), description="how completions are sampled")
    staleness: int = Field(
        0, ge=0, description="how many policy versions a rollout may lag: 0 synchronous, 1 one step off, ..."
    )
    late: Literal["wait", "drop"] = Field(
        "wait",
        description="a group still in flight when it would get older than staleness allows: the learner "
        "waits for it, or it is dropped and its prompt sampled again",
    )
    update: InFlight = Field(
        "keep",
        description="what a weight push does to completions in flight: keep them and compute their keys and "
        "values anew, continue on those that they have, wait for them, or abort and sample them again",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="engine weights; auto: bfloat16 on GPU, float32 on CPU"
    )
    max_num_seqs: int = Field(
        256, ge=1, description="completions that an engine decodes at once; it is sent twice as many at most"
    )
    gpu_memory_utilization: float = Field(0.85, gt=0, lt=1, description="share of a GPU that vLLM may take")
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of a replica on CPU, in GiB")
    threads: int | None = Field(
        None, ge=1, description="CPU threads per replica (none: one per core, up to a container's CPU quota)"
    )
    cores: str | None = Field(None, description='CPU cores to pin a replica to, such as "0" or "0-3"')
    enforce_eager: bool | None = Field(
        None, description="run vLLM without graph capture (none: eager on CPU, captured on GPU)"
    )
    start_timeout_s: float = Field(600, gt=0, description="seconds that an engine may take to start")
    control_timeout_s: float = Field(120, gt=0, description="seconds that a control call may take")
    generate_timeout_s: float = Field(
        1800,
        gt=0,
        description="seconds that an engine may work on one group; time in a queue or in a push does not "
        "count",
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="times that dead engines are rebuilt within one step before the run stops",
    )
    health_every_s: float = Field(10, gt=0, description="health-check interval in seconds")
    health_timeout_s: float = Field(
        60, gt=0, description="seconds without an answer after which an engine counts as dead"
    )
    engine_args: dict[str, Any] = Field({}, description="further arguments for vLLM's AsyncEngineArgs")

    @model_validator(mode="after")
    def _late_groups_need_staleness(self) -> RolloutConfig:
        if self.late == "drop" and self.staleness == 0:
            raise ValueError(
                "rollout.late drop has nothing to drop at staleness 0, where every step waits for all of its "
                "groups; set rollout.staleness to 1 or more, or leave late out"
            )
        return self

    @model_validator(mode="after")
    def _hf_has_no_tensor_parallel(self) -> RolloutConfig:
        if self.engine == "hf" and self.tensor_parallel > 1:
            raise ValueError(
                "rollout.engine hf runs on one device; set tensor_parallel to 1 or engine to vllm"
            )
        return self
