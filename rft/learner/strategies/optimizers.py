"""The optimizers by name: torch's AdamW, and bitsandbytes' with 8-bit or paged states."""

from __future__ import annotations

from typing import Any

import torch

from rft.config.learner import LearnerConfig
from rft.learner.model import ModelError


def make_optimizer(config: LearnerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """`config.optimizer` over parameter groups. Raises ModelError where bitsandbytes is not installed."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings)
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ModelError(
            f"learner.optimizer: {config.optimizer} needs bitsandbytes: install rft with the extra quant"
        ) from error
    kinds = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    made: torch.optim.Optimizer = kinds[config.optimizer](groups, **settings)
    return made
