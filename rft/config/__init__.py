"""Config of a run: its sections (`schema` and one module per section), loading, and cross-section checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rft.utils.dotted import load_dotted

if TYPE_CHECKING:
    from rft.config.data import DataConfig
    from rft.config.environment import EnvironmentConfig
    from rft.config.evaluation import EvalConfig
    from rft.config.learner import LearnerConfig
    from rft.config.load import apply_overrides, describe_fields, load_config, parse_config
    from rft.config.metrics import GuardsConfig, TrackingConfig
    from rft.config.rewards import RewardConfig, RewardsConfig
    from rft.config.rollout import RolloutConfig
    from rft.config.schema import (
        CheckpointConfig,
        Config,
        ModelConfig,
        RayConfig,
        TrainConfig,
        WarmStartConfig,
    )
    from rft.config.sync import SyncConfig
    from rft.config.teacher import TeacherConfig
    from rft.errors import ConfigError

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "GuardsConfig",
    "LearnerConfig",
    "ModelConfig",
    "RayConfig",
    "RewardConfig",
    "RewardsConfig",
    "RolloutConfig",
    "SyncConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TrainConfig",
    "WarmStartConfig",
    "apply_overrides",
    "describe_fields",
    "load_config",
    "parse_config",
]

# Imported on first use: packages that need one section only do not load all of them.
_HOMES = {
    "ConfigError": "rft.errors",
    "DataConfig": "rft.config.data",
    "EnvironmentConfig": "rft.config.environment",
    "EvalConfig": "rft.config.evaluation",
    "GuardsConfig": "rft.config.metrics",
    "LearnerConfig": "rft.config.learner",
    "RewardConfig": "rft.config.rewards",
    "RewardsConfig": "rft.config.rewards",
    "RolloutConfig": "rft.config.rollout",
    "SyncConfig": "rft.config.sync",
    "TeacherConfig": "rft.config.teacher",
    "TrackingConfig": "rft.config.metrics",
    **dict.fromkeys(("apply_overrides", "describe_fields", "load_config", "parse_config"), "rft.config.load"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load_dotted(f"{_HOMES.get(name, 'rft.config.schema')}.{name}")
