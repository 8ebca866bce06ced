"""Config of the kernels: which implementation computes log-probs and attention."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rft.config.base import Section
from rft.kernels.logprob_liger import REMEDY, installed


class KernelsConfig(Section):
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

    def misfits(self, device: str) -> list[str]:
        """What cannot run on the learner's device, each in a sentence."""
        gpu_only = {"logprob": (("triton", "liger"), "chunked"), "attention": (("flex",), "masked")}
        found = [
            f"learner.kernels.{name}: {kernel} needs a GPU, the learner is on {device}: write auto or {other}"
            for name, (kernels, other) in gpu_only.items()
            if (kernel := getattr(self, name)) in kernels and device != "cuda"
        ]
        if self.logprob == "liger" and not installed():
            found.append(
                f"learner.kernels.logprob: liger needs liger-kernel, which is not installed: {REMEDY}, "
                "or write auto or triton"
            )
        return found
