"""Config of the learner: precision, optimizer, schedule, memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rft.section import Section


class LearnerConfig(Section):
    """How the policy is updated."""

    learning_rate: float = Field(1e-6, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay; never on norms and biases")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's moment decay rates")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up; linear and cosine end at final_lr_ratio"
    )
    final_lr_ratio: float = Field(0.0, ge=0, le=1, description="last learning rate over the peak")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the gradient to this norm (none: never)")
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
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="a NaN or infinite gradient stops the run, or skips the update (counted)"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads (none: all cores)")
    cores: str | None = Field(None, description='CPU cores to pin the learner to, such as "1" or "4-7"')
    step_timeout_s: float = Field(3600, gt=0, description="seconds that one step may take")
