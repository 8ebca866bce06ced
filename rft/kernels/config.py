"""Config of the kernels: which implementation computes log-probs and attention."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rft.section import Section


class KernelsConfig(Section):
    """Implementations, to force one; auto takes the fastest that serves the device and the model."""

    logprob: Literal["auto", "reference", "chunked", "triton"] = Field(
        "auto",
        description="log-probs of tokens: the plain reference (keeps all logits), row chunks, Triton (GPU), "
        "or auto: Triton on a GPU where it serves, else chunks",
    )
    attention: Literal["auto", "merge", "flex", "masked"] = Field(
        "auto",
        description="packed attention: log-sum-exp merge, FlexAttention (GPU), masks per tree, or auto: the "
        "merge where it serves a layer, else FlexAttention on a GPU and masks on a CPU",
    )

    def misfits(self, device: str) -> list[str]:
        """What cannot run on the learner's device, each in a sentence."""
        gpu_only = {"logprob": ("triton", "chunked"), "attention": ("flex", "masked")}
        return [
            f"learner.kernels.{name}: {kernel} needs a GPU, the learner is on {device}: write auto or {other}"
            for name, (kernel, other) in gpu_only.items()
            if getattr(self, name) == kernel and device != "cuda"
        ]
