"""The learning-rate schedule."""

from __future__ import annotations

import math

from rft.config.learner import LearnerConfig


def learning_rate(config: LearnerConfig, step: int, total: int) -> float:
    """Return the learning rate of update `step` (from 0) of `total`.

    Linear warm-up over `warmup_steps`, then constant, linear or cosine decay down to
    `final_lr_ratio` of the peak, reached at the last step.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    span = max(total - config.warmup_steps - 1, 1)
    done = min((step - config.warmup_steps) / span, 1.0)
    shape = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * (config.final_lr_ratio + (1 - config.final_lr_ratio) * shape)
