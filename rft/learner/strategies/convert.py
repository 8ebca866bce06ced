"""An adapter relative to a changed base, as one relative to the original."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def as_plain_lora(
    now: dict[str, Tensor], begun: dict[str, Tensor], settings: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """LoRA of twice the rank, whose product is s (B A - B0 A0): what training changed on the original base.

    now, begun: peft's state dicts of the same adapter, A [r, in] and B [out, r] per layer.
    Returns tensors and config as plain data.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in now.items():
        if ".lora_A." in name:
            tensors[name] = torch.cat([tensor, begun[name]], 0)
        elif ".lora_B." in name:
            tensors[name] = torch.cat([tensor, -begun[name]], 1)
        else:
            tensors[name] = tensor
    config: dict[str, Any] = settings.to_dict()
    grown = math.sqrt(2) if settings.use_rslora else 2  # keeps the scale: alpha / sqrt(r), or alpha / r
    config["r"] = 2 * settings.r
    config["lora_alpha"] = grown * settings.lora_alpha
    config["rank_pattern"] = {k: 2 * v for k, v in settings.rank_pattern.items()}
    config["alpha_pattern"] = {k: grown * v for k, v in settings.alpha_pattern.items()}
    config["init_lora_weights"] = True
    for key in ("eva_config", "corda_config", "lora_ga_config"):
        config[key] = None
    return tensors, config
