"""Config section `learner`: trained parameters, optimizer, schedule, parallelism and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rft.config.base import ConfigModel
from rft.utils.paths import PathText

DEFAULT_MICRO_BATCH = 16384  # tokens, where the device's memory is unknown
LIGER_REMEDY = "pip install 'liger-kernel>=0.8.5,<0.9'"
# PEFT methods that export as a plain LoRA adapter, with the factor of its rank over `r`: a method that moves
# part of the base weights into the adapter needs twice the rank to restore them.
PLAIN_LORA = {"lora": 1, "eva": 1, "pissa": 2, "olora": 2, "corda": 2, "lora_ga": 2}
FROM_FIRST_BATCH = ("eva", "corda", "lora_ga")  # methods initialised from the first batch


class AdapterConfig(ConfigModel):
    """PEFT adapter on a frozen policy; the policy without the adapter is the reference."""

    method: str = Field(
        "lora",
        description="lora, dora, pissa, olora, eva, corda, lora_ga, loftq, or another PEFT method: adalora, "
        "vera, loha, lokr, miss, bone, oft, hra, ...",
    )
    r: int | None = Field(None, ge=1, description="rank (none: the method's default)")
    alpha: float | None = Field(None, gt=0, description="LoRA alpha (none: 2 r)")
    rslora: bool = Field(
        False, description="rank-stabilised LoRA: scale by alpha / sqrt(r) instead of alpha / r"
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="layer names, a regular expression, or all-linear (all linear layers except the LM head)",
    )
    options: dict[str, Any] = Field({}, description="additional fields of the method's PEFT config")
    restart_every: int = Field(
        0,
        ge=0,
        description="lora: optimizer updates between merging the adapter into the base and beginning anew "
        "(COLA, Xia et al. 2024, arXiv 2401.04151); 0: never",
    )

    @property
    def lora_rank(self) -> int:
        """Return the rank of the adapter exported as plain LoRA; 0 if the method has no such form."""
        return (self.r or 8) * PLAIN_LORA.get(self.method, 0)  # 8: PEFT's default


class LisaConfig(ConfigModel):
    """LISA: train a few layers, resampled every few updates (Pan et al. 2024, arXiv 2403.17919)."""

    name: Literal["lisa"] = Field("lisa", description="layerwise importance sampling")
    layers: int = Field(2, ge=1, description="decoder layers trained at a time, plus embeddings and head")
    every: int = Field(20, ge=1, description="optimizer updates between resampling the layers")


class HftConfig(ConfigModel):
    """HFT: train half of each layer's matrices at a time (Hui et al. 2024, arXiv 2404.18466)."""

    name: Literal["hft"] = Field("hft", description="half fine-tuning")
    every: int = Field(
        0, ge=0, description="optimizer updates between resampling the half (0: same half for the whole run)"
    )


class GaloreConfig(ConfigModel):
    """GaLore: Adam on low-rank projections of the gradients (Zhao et al. 2024, arXiv 2403.03507)."""

    name: Literal["galore"] = Field("galore", description="gradient low-rank projection")
    rank: int = Field(128, ge=1, description="rank of the projection; smaller matrices are not projected")
    every: int = Field(200, ge=1, description="optimizer updates between recomputing the projection")
    scale: float = Field(0.25, gt=0, description="scale of the projected update")


class SubnetworkConfig(ConfigModel):
    """Train only the subnetwork that an earlier RL run changed (Mukherjee et al. 2025, arXiv 2505.11711)."""

    name: Literal["subnetwork"] = Field("subnetwork", description="sparse training of masked elements")
    mask: PathText = Field(
        description="safetensors file of the mask; created from `tuned` if it does not exist"
    )
    tuned: PathText | None = Field(
        None, description="model folder of the earlier run, compared with model.path to create the mask"
    )
    tolerance: float = Field(
        1e-5, ge=0, description="minimum change of a masked element, compared in bfloat16"
    )

    @model_validator(mode="after")
    def _some_source(self) -> SubnetworkConfig:
        if self.tuned is None and not Path(self.mask).expanduser().exists():
            raise ValueError(
                f"the mask {self.mask!r} does not exist; set `tuned` to the model folder of the earlier run "
                "to create it"
            )
        return self


class LiftConfig(ConfigModel):
    """LIFT: train the principal weights of each matrix (Liu et al. 2025, arXiv 2506.00772)."""

    name: Literal["lift"] = Field("lift", description="low-rank informed sparse fine-tuning")
    share: float = Field(0.05, gt=0, le=1, description="trained fraction of each matrix of the layers")
    rank: int = Field(
        128, ge=1, description="rank of the approximation of a matrix whose largest entries are trained"
    )
    every: int = Field(
        200,
        ge=0,
        description="optimizer updates between choosing the entries (0: chosen once)",
    )


class SaftConfig(ConfigModel):
    """SAFT: train the elements with the largest gradient (Nguyen et al. 2024, arXiv 2407.03036)."""

    name: Literal["saft"] = Field("saft", description="sparse adaptation by the first batch's gradient")
    share: float = Field(0.001, gt=0, le=1, description="trained fraction of all parameters")


StrategyConfig = Annotated[
    LisaConfig | HftConfig | GaloreConfig | SubnetworkConfig | LiftConfig | SaftConfig,
    Field(discriminator="name"),
]


class PrivacyConfig(ConfigModel):
    """Differentially private training of an offline run (DP-SGD, Abadi et al. 2016, arXiv 1607.00133)."""

    clip: float = Field(
        1.0, gt=0, description="largest norm of a row's gradient; larger ones are scaled down"
    )
    noise: float = Field(1.0, gt=0, description="standard deviation of the noise, relative to `clip`")
    delta: float = Field(1e-5, gt=0, lt=1, description="delta of the metric privacy/epsilon; below 1 / rows")


class KernelsConfig(ConfigModel):
    """Kernel implementations; auto selects the fastest one that supports device and model."""

    logprob: Literal["auto", "reference", "chunked", "triton", "liger"] = Field(
        "auto",
        description="token log-probs: reference (materialises all logits), chunked, triton (GPU), liger "
        "(GPU; only scoring and frozen heads, without entropy; falls back to triton), or auto: on a GPU "
        "liger if installed, supported and measured to be faster, else triton if supported; else chunked",
    )
    attention: Literal["auto", "merge", "flex", "masked"] = Field(
        "auto",
        description="packed attention: merge (log-sum-exp merge), flex (FlexAttention, GPU), masked (one "
        "mask per tree), or auto: merge for layers that support it, else flex on a GPU and masked on a CPU",
    )


class LearnerConfig(ConfigModel):
    """Policy updates."""

    learning_rate: float = Field(1e-6, gt=0, description="peak learning rate")
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled weight decay; not applied to norms and biases"
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of AdamW's moments")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    optimizer: Literal["adamw", "muon", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw",
        description="adamw (PyTorch); muon for the layers' matrices, with adamw for the rest; or AdamW of "
        "bitsandbytes with 8-bit moments, paged moments, or both",
    )
    adapter: AdapterConfig | None = Field(
        None, description="train an adapter, e.g. LoRA, on the frozen policy (none: full fine-tuning)"
    )
    quantize: Literal["nf4", "fp4", "int8"] | None = Field(
        None, description="quantise the frozen base of an adapter to 4 or 8 bits (QLoRA: nf4)"
    )
    strategy: StrategyConfig | None = Field(
        None,
        description="full fine-tuning strategy: lisa, hft, galore, subnetwork, lift, saft (none: train all "
        "parameters)",
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear learning-rate warm-up from 0")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="learning-rate schedule after the warm-up; linear and cosine decay to final_lr_ratio",
    )
    final_lr_ratio: float = Field(0.0, ge=0, le=1, description="final learning rate, relative to the peak")
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradient clipping norm (none: no clipping)")
    privacy: PrivacyConfig | None = Field(
        None, description="offline: differentially private training (none: off)"
    )
    parallel: Literal["single", "fsdp2", "deepspeed"] = Field(
        "single", description="parallelism: single (one process), fsdp2, or deepspeed (ZeRO)"
    )
    ranks: int = Field(1, ge=1, description="number of training processes, one per device")
    cpu_offload: bool = Field(
        False, description="fsdp2: offload weights, gradients and optimizer state to host memory"
    )
    reshard_after_forward: bool = Field(
        True,
        description="fsdp2: free gathered weights between forward and backward: less memory, more traffic",
    )
    deepspeed: dict[str, Any] = Field(
        {"zero_optimization": {"stage": 2}},
        description="deepspeed: DeepSpeed config (stage, offload, buckets), except the keys that rft sets",
    )
    tokens_per_micro_batch: int | Literal["auto"] = Field(
        "auto",
        description="tokens per micro-batch; affects memory, not the gradient; auto: as many as fit the "
        "device, at most 16384",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="compute dtype; auto: bfloat16 on GPU; on CPU bfloat16 for a model above 20 M parameters "
        "if a measurement of 50 ms finds its products at least 1.5 times as fast, else float32",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    prefix_sharing: Literal["auto", "on", "off"] = Field(
        "auto", description="compute a prompt once per group; auto: if the predicted gain is 5 % or more"
    )
    kernels: KernelsConfig = Field(KernelsConfig(), description="kernel implementations")
    self_check: Literal["stop", "fall_back", "off"] = Field(
        "stop",
        description="check of packing on the first batch: if packed hidden states differ from those of "
        "separate sequences, stop, or fall_back to unpacked sequences for the rest of the run",
    )
    reference_logps: Literal["live", "cached"] = Field(
        "live",
        description="offline: compute reference log-probs at every step (live), or once before training "
        "(cached in a file)",
    )
    entropy: bool = Field(True, description="compute the policy's entropy at every step")
    measure_untrained: bool = Field(
        True,
        description="include groups without a gradient (all rewards equal) in policy/kl, policy/entropy and "
        "sync/logp_gap, at the cost of their forward pass; false: measure trained groups only",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="on a NaN or infinite gradient: stop the run, or skip and count the update"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads (none: one per core, up to a container's CPU quota)"
    )
    cores: str | None = Field(None, description='CPU cores to pin the learner to, e.g. "1" or "4-7"')
    step_timeout_s: float = Field(3600, gt=0, description="timeout of one training step, in seconds")

    @field_validator("tokens_per_micro_batch", mode="before")
    @classmethod
    def _positive_or_auto(cls, value: Any) -> Any:
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError("write a number of tokens, 1 or more, or auto")
        return value

    @property
    def micro_batch_tokens(self) -> int:
        """Return the tokens per micro-batch; the default where `auto` was not resolved for a device."""
        tokens = self.tokens_per_micro_batch
        return DEFAULT_MICRO_BATCH if tokens == "auto" else tokens
