"""Config of the learner: what is trained, by which optimizer and schedule, and in how much memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rft.config.base import ConfigModel
from rft.utils.paths import PathText

LIGER_REMEDY = "pip install 'liger-kernel>=0.8.5,<0.9'"
# peft's methods whose result is an ordinary LoRA adapter, by factor of its rank over the config's: where the
# method moves a part of the base into the adapter, giving it back doubles the rank.
PLAIN_LORA = {"lora": 1, "eva": 1, "pissa": 2, "olora": 2, "corda": 2, "lora_ga": 2}
FROM_FIRST_BATCH = ("eva", "corda", "lora_ga")  # methods that are initialised from the first batch


class AdapterConfig(ConfigModel):
    """An adapter on a frozen policy, by any method of peft; the policy without it is the reference."""

    method: str = Field(
        "lora",
        description="lora, dora, pissa, olora, eva, corda, lora_ga, loftq, or a method of peft by its name: "
        "adalora, vera, loha, lokr, miss, bone, oft, hra, ...",
    )
    r: int | None = Field(None, ge=1, description="rank (none: the method's own default)")
    alpha: float | None = Field(None, gt=0, description="LoRA's numerator of the scale (none: 2 r)")
    rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead of alpha / r")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="names of layers, a regular expression, or all-linear (every linear layer but the head)",
    )
    options: dict[str, Any] = Field({}, description="further fields of the method's own config in peft")

    @property
    def lora_rank(self) -> int:
        """The rank of the result as an ordinary LoRA adapter; 0 where it is none."""
        return (self.r or 8) * PLAIN_LORA.get(self.method, 0)  # 8: peft's default


class LisaConfig(ConfigModel):
    """LISA: a few layers at a time, drawn anew every few updates (Pan et al. 2024, arXiv 2403.17919)."""

    name: Literal["lisa"] = Field("lisa", description="layerwise importance sampling")
    layers: int = Field(2, ge=1, description="decoder layers trained at a time, besides embeddings and head")
    every: int = Field(20, ge=1, description="optimizer updates between draws")


class HftConfig(ConfigModel):
    """HFT: one half of each layer's matrices at a time (Hui et al. 2024, arXiv 2404.18466)."""

    name: Literal["hft"] = Field("hft", description="half fine-tuning")
    every: int = Field(0, ge=0, description="optimizer updates between draws (0: one half for the whole run)")


class GaloreConfig(ConfigModel):
    """GaLore: Adam in a low-rank subspace of each gradient (Zhao et al. 2024, arXiv 2403.03507)."""

    name: Literal["galore"] = Field("galore", description="gradient low-rank projection")
    rank: int = Field(128, ge=1, description="rank of the subspace; smaller matrices are trained in full")
    every: int = Field(200, ge=1, description="optimizer updates between projections")
    scale: float = Field(0.25, gt=0, description="factor of the projected update")


class SubnetworkConfig(ConfigModel):
    """Only the elements of a mask are trained: the small part that a first run of RL changed
    (Mukherjee et al. 2025, arXiv 2505.11711)."""

    name: Literal["subnetwork"] = Field("subnetwork", description="sparse training by a mask")
    mask: PathText = Field(
        description="safetensors file of the mask; made from `tuned` where it does not exist"
    )
    tuned: PathText | None = Field(
        None, description="model folder of the first run, compared with model.path"
    )
    tolerance: float = Field(
        1e-5, ge=0, description="an element belongs to the mask if it changed by more (in bfloat16 numbers)"
    )

    @model_validator(mode="after")
    def _some_source(self) -> SubnetworkConfig:
        if self.tuned is None and not Path(self.mask).expanduser().exists():
            raise ValueError(
                f"the mask {self.mask!r} does not exist; name the first run's model folder as `tuned`, "
                "and the mask is made from it"
            )
        return self


StrategyConfig = Annotated[
    LisaConfig | HftConfig | GaloreConfig | SubnetworkConfig, Field(discriminator="name")
]


class KernelsConfig(ConfigModel):
    """Implementations, to force one; auto takes the fastest that serves the device and the model."""

    logprob: Literal["auto", "reference", "chunked", "triton", "liger"] = Field(
        "auto",
        description="log-probs of tokens: the plain reference (keeps all logits), row chunks, Triton (GPU), "
        "Liger's (GPU; scoring and frozen heads, without entropy; what it does not serve takes Triton), or "
        "auto: Triton on a GPU where it serves, or Liger's where that is installed, serves and is measured "
        "to be faster, else chunks",
    )
    attention: Literal["auto", "merge", "flex", "masked"] = Field(
        "auto",
        description="packed attention: log-sum-exp merge, FlexAttention (GPU), masks per tree, or auto: the "
        "merge where it serves a layer, else FlexAttention on a GPU and masks on a CPU",
    )


class LearnerConfig(ConfigModel):
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
