"""Config of what is trained of a policy: adapters, quantised bases, and strategies of full fine-tuning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rft.config.base import Section
from rft.utils.paths import PathText


class AdapterConfig(Section):
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


class LisaConfig(Section):
    """LISA: a few layers at a time, drawn anew every few updates (Pan et al. 2024, arXiv 2403.17919)."""

    name: Literal["lisa"] = Field("lisa", description="layerwise importance sampling")
    layers: int = Field(2, ge=1, description="decoder layers trained at a time, besides embeddings and head")
    every: int = Field(20, ge=1, description="optimizer updates between draws")


class HftConfig(Section):
    """HFT: one half of each layer's matrices at a time (Hui et al. 2024, arXiv 2404.18466)."""

    name: Literal["hft"] = Field("hft", description="half fine-tuning")
    every: int = Field(0, ge=0, description="optimizer updates between draws (0: one half for the whole run)")


class GaloreConfig(Section):
    """GaLore: Adam in a low-rank subspace of each gradient (Zhao et al. 2024, arXiv 2403.03507)."""

    name: Literal["galore"] = Field("galore", description="gradient low-rank projection")
    rank: int = Field(128, ge=1, description="rank of the subspace; smaller matrices are trained in full")
    every: int = Field(200, ge=1, description="optimizer updates between projections")
    scale: float = Field(0.25, gt=0, description="factor of the projected update")


class SubnetworkConfig(Section):
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
        from pathlib import Path

        if self.tuned is None and not Path(self.mask).expanduser().exists():
            raise ValueError(
                f"the mask {self.mask!r} does not exist; name the first run's model folder as `tuned`, "
                "and the mask is made from it"
            )
        return self


StrategyConfig = Annotated[
    LisaConfig | HftConfig | GaloreConfig | SubnetworkConfig, Field(discriminator="name")
]
