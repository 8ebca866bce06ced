"""Config of the learner: precision, optimizer, schedule, memory."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rft.config.base import Section
from rft.config.kernels import KernelsConfig
from rft.config.strategy import AdapterConfig, StrategyConfig


class LearnerConfig(Section):
    """How the policy is updated."""

    learning_rate: float = Field(1e-6, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay; never on norms and biases")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's moment decay rates")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw",
        description="AdamW of torch, or of bitsandbytes with moments in 8 bits, in paged memory, or both",
    )
    adapter: AdapterConfig | None = Field(
        None, description="train an adapter (LoRA and others) on the frozen policy (none: the policy itself)"
    )
    quantize: Literal["nf4", "fp4", "int8"] | None = Field(
        None, description="hold the frozen policy under an adapter in 4 or 8 bits (QLoRA: nf4)"
    )
    strategy: StrategyConfig | None = Field(
        None, description="train changing or chosen parts: lisa, hft, galore, subnetwork (none: everything)"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up; linear and cosine end at final_lr_ratio"
    )
    final_lr_ratio: float = Field(0.0, ge=0, le=1, description="last learning rate over the peak")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the gradient to this norm (none: never)")
    parallel: Literal["single", "fsdp2", "deepspeed"] = Field(
        "single", description="how ranks share the policy: one process, torch's FSDP2, or DeepSpeed's ZeRO"
    )
    ranks: int = Field(1, ge=1, description="processes that train together, each on a device of its own")
    cpu_offload: bool = Field(
        False, description="fsdp2: keep weights, gradients and optimizer state in host memory between uses"
    )
    reshard_after_forward: bool = Field(
        True, description="fsdp2: free a layer's weights until its backward: less memory, more traffic"
    )
    deepspeed: dict[str, Any] = Field(
        {"zero_optimization": {"stage": 2}},
        description="deepspeed: its own config (stage, offload, buckets), but for what rft sets itself",
    )
    tokens_per_micro_batch: int = Field(
        16384, ge=1, description="tokens per forward; changes memory, never the gradient"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute precision; auto: bfloat16 on GPU, float32 on CPU"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    prefix_sharing: Literal["auto", "on", "off"] = Field(
        "auto", description="compute a prompt once per group; auto: where the predicted gain is 5 % or more"
    )
    kernels: KernelsConfig = Field(KernelsConfig(), description="which implementations compute")
    self_check: Literal["stop", "fall_back", "off"] = Field(
        "stop",
        description="where the first batch's packed hidden states differ from those of separate sequences: "
        "stop, or run unpacked from then on",
    )
    reference_logps: Literal["live", "cached"] = Field(
        "live",
        description="offline: run the reference at each step, or once, with its log-probs kept in a file",
    )
    entropy: bool = Field(True, description="measure the policy's entropy at every step")
    measure_untrained: bool = Field(
        True,
        description="run groups whose loss has no gradient (all rewards equal) forward, for policy/kl, "
        "policy/entropy and sync/logp_gap; false: skip them, and measure the trained ones alone",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="a NaN or infinite gradient stops the run, or skips the update (counted)"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads (none: one per core, up to a container's CPU quota)"
    )
    cores: str | None = Field(None, description='CPU cores to pin the learner to, such as "1" or "4-7"')
    step_timeout_s: float = Field(3600, gt=0, description="seconds that one step may take")
