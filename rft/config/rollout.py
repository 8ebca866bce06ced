"""Config section `rollout`: inference engine, replicas, sampling and staleness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rft.config.base import UNLISTED, ConfigModel
from rft.config.rewards import RewardsConfig, list_as_functions

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")

InFlight = Literal["keep", "continue", "wait", "abort"]
"""Treatment of in-flight completions at a weight sync: paused, then resumed with a recomputed (`keep`) or the
old (`continue`) KV cache; finished before the sync (`wait`); or aborted and sampled again (`abort`)."""


class SamplingConfig(ConfigModel):
    """Sampling parameters of training rollouts."""

    max_prompt_length: int = Field(
        512, ge=1, description="maximum prompt length, in tokens; prompts are never truncated"
    )
    max_completion_length: int = Field(512, ge=1, description="maximum completion length, in tokens")
    temperature: float = Field(1.0, gt=0, description="softmax temperature, of sampling and of log-probs")
    top_p: float = Field(
        1.0, gt=0, le=1, description="nucleus sampling: the fewest likely tokens that sum to this probability"
    )
    top_k: int = Field(0, ge=0, description="sample from this many most likely tokens (0: all)")
    min_p: float = Field(
        0.0, ge=0, lt=1, description="sample from tokens with at least this share of the largest probability"
    )
    stop: tuple[str, ...] = Field((), description="stop strings (require detokenisation)")
    stop_token_ids: tuple[int, ...] = Field((), description="additional stop token ids")

    @model_validator(mode="before")
    @classmethod
    def _no_penalties(cls, values: Any) -> Any:
        """Refuse what makes the sampled distribution depend on the tokens before, beyond the policy's."""
        for name in PENALTIES:
            if isinstance(values, Mapping) and name in values:
                raise ValueError(
                    f"{name} is not supported in training: it changes the probability of a token by what was "
                    "sampled before, so that log-probs and ratios would be of another distribution than the "
                    "policy's. Remove it, and add the reward `repetition` instead"
                )
        return values

    @property
    def truncated(self) -> bool:
        """Return whether some tokens are never sampled, so that log-probs are over the others only."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


class AlignConfig(ConfigModel):
    """Decoding-time alignment with a reward, in `rft eval` and `rft serve`."""

    method: Literal["best_of_n", "qalign"] = Field(
        description="best_of_n: the best of n completions; qalign: a Markov chain of n proposals, which "
        "samples in proportion to p(y) exp(reward / beta)"
    )
    n: int = Field(8, ge=1, description="completions of which the best is chosen, or proposals of a chain")
    beta: float = Field(
        1.0, gt=0, description="qalign: temperature of the reward; lower values favour high rewards more"
    )
    rewards: RewardsConfig = Field(
        description="reward functions that align, as the section `rewards`", json_schema_extra=UNLISTED
    )

    @field_validator("rewards", mode="before")
    @classmethod
    def _list_of_rewards(cls, value: Any) -> Any:
        return list_as_functions(value)

    @model_validator(mode="after")
    def _has_rewards(self) -> AlignConfig:
        if not self.rewards.functions:
            raise ValueError("rewards: name at least one reward, for example `rewards: [math]`")
        return self


class RolloutConfig(ConfigModel):
    """Rollout engines and their replicas."""

    engine: Literal["auto", "vllm", "hf"] = Field(
        "auto", description="vllm, hf (transformers), or auto: vllm if installed, else hf"
    )
    replicas: int = Field(1, ge=1, description="number of engine replicas, each a Ray actor")
    tensor_parallel: int = Field(1, ge=1, description="devices per replica")
    sampling: SamplingConfig = Field(SamplingConfig(), description="sampling parameters of training rollouts")
    staleness: int = Field(
        0,
        ge=0,
        description="maximum policy versions a rollout may lag behind; 0: synchronous, 1: one-step off",
    )
    late: Literal["wait", "drop"] = Field(
        "wait",
        description="treatment of an in-flight group that would exceed staleness: wait for it before the "
        "update, or drop it and sample its prompt again",
    )
    turns: Literal["free", "lockstep"] = Field(
        "free",
        description="when the model calls of sessions are sent: each at once (free), or those of a turn "
        "together and in sample order, once every session is ready (lockstep; needs staleness 0)",
    )
    update: InFlight = Field(
        "keep",
        description="treatment of in-flight completions at a weight sync: keep (pause, recompute the KV "
        "cache, resume), continue (resume with the old KV cache), wait (finish them first), or abort (sample "
        "them again)",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the engine's weights; auto: as `learner.dtype`"
    )
    max_num_seqs: int = Field(
        256,
        ge=1,
        description="maximum concurrent completions per engine; at most twice as many are dispatched",
    )
    gpu_memory_utilization: float = Field(
        0.85, gt=0, lt=1, description="fraction of GPU memory that vLLM may use"
    )
    kv_cache_gib: float = Field(1.0, gt=0, description="KV cache size of a CPU replica, in GiB")
    threads: int | None = Field(
        None, ge=1, description="CPU threads per replica (none: one per core, up to a container's CPU quota)"
    )
    cores: str | None = Field(None, description='CPU cores to pin a replica to, e.g. "0" or "0-3"')
    enforce_eager: bool | None = Field(
        None, description="run vLLM without CUDA graphs (none: eager on CPU, graphs on GPU)"
    )
    start_timeout_s: float = Field(600, gt=0, description="timeout of an engine start, in seconds")
    control_timeout_s: float = Field(120, gt=0, description="timeout of a control call, in seconds")
    generate_timeout_s: float = Field(
        1800,
        gt=0,
        description="timeout of one group's generation, in seconds, excluding queueing and weight syncs",
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="engine rebuilds allowed within one step before the run stops",
    )
    health_every_s: float = Field(10, gt=0, description="health-check interval in seconds")
    health_timeout_s: float = Field(
        60, gt=0, description="health-check timeout in seconds, after which an engine counts as dead"
    )
    fusion: dict[str, float] = Field(
        {},
        description="rft eval and rft serve on the hf engine: models whose logits are added to those of the "
        "model, by folder or hub name, with their weights, e.g. {tuned-small: 1, small: -1}",
    )
    align: AlignConfig | None = Field(
        None, description="rft eval and rft serve: align completions with a reward at decoding time"
    )
    engine_args: dict[str, Any] = Field({}, description="additional arguments of vLLM's AsyncEngineArgs")

    @property
    def kv_cache_bytes(self) -> int:
        """The bytes for keys and values of vLLM on CPU, which reserves them at its start."""
        return round(self.kv_cache_gib * 2**30)

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
