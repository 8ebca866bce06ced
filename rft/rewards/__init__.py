"""Reward functions, one file per family, and the worker processes that run them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rft.rewards.load import BUILTINS, load_reward
from rft.rewards.types import Outcome, RewardError, RewardFunction, SampleReward, Score
from rft.utils.dotted import load_dotted

if TYPE_CHECKING:
    from rft.config.rewards import RewardConfig, RewardsConfig
    from rft.rewards.runner import RewardRunner

__all__ = [
    "BUILTINS",
    "Outcome",
    "RewardConfig",
    "RewardError",
    "RewardFunction",
    "RewardRunner",
    "RewardsConfig",
    "SampleReward",
    "Score",
    "load_reward",
]

# Imported on first use: reward workers start faster without them.
_HOMES = {
    "RewardConfig": "rft.config.rewards",
    "RewardsConfig": "rft.config.rewards",
    "RewardRunner": "rft.rewards.runner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load_dotted(f"{_HOMES[name]}.{name}")
