"""Rewards: verifiable, sandboxed, pluggable. One file per family; a reward is a plain function."""

from __future__ import annotations

from rft.rewards.load import BUILTINS, load_reward
from rft.rewards.types import Outcome, RewardError, RewardFunction, SampleReward, Score

__all__ = [
    "BUILTINS",
    "Outcome",
    "RewardError",
    "RewardFunction",
    "SampleReward",
    "Score",
    "load_reward",
]
