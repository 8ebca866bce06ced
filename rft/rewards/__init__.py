"""Rewards: verifiable, sandboxed, pluggable. One file per family; a reward is a plain function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rft.rewards.load import BUILTINS, load_reward
from rft.rewards.types import Outcome, RewardError, RewardFunction, SampleReward, Score

if TYPE_CHECKING:
    from rft.rewards.check import check_reward, check_values, describe
    from rft.rewards.config import RewardConfig, RewardsConfig
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
    "check_reward",
    "check_values",
    "describe",
    "load_reward",
]

_LAZY = {  # imported on first use: worker processes start faster without them
    "RewardConfig": "config",
    "RewardsConfig": "config",
    "RewardRunner": "runner",
    "check_reward": "check",
    "check_values": "check",
    "describe": "check",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"rft.rewards.{_LAZY[name]}"), name)
