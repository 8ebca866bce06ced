"""The environments of a run: that of the section `environment`, and those of sources of a mixture."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from rft.config.environment import EnvironmentConfig
from rft.config.rewards import RewardConfig
from rft.environments.runner import EnvironmentRunner


class Environments:
    """Runners by source; "" is the one of the rows whose source has none."""

    def __init__(self, configs: Mapping[str, EnvironmentConfig], base_dir: Path | str = ".") -> None:
        self.runners = {source: EnvironmentRunner(config, base_dir) for source, config in configs.items()}

    async def start(self) -> None:
        """Load all environments. Raises EnvironmentFault if that fails."""
        await asyncio.gather(*(runner.start() for runner in self.runners.values()))

    async def close(self) -> None:
        """Stop the workers of all environments with their children."""
        await asyncio.gather(*(runner.close() for runner in self.runners.values()))

    def call_rewards(self, rewards: list[RewardConfig]) -> None:
        """Set the rewards that read an environment, and are called where it is."""
        for runner in self.runners.values():
            runner.rewards = rewards

    def take_metrics(self) -> dict[str, float]:
        """Return and reset the metrics of all environments together."""
        return together([runner.take_metrics() for runner in self.runners.values()])


def together(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return metrics of several environments as those of one: counts are added, means are weighted by their
    episodes (the share of failed calls by calls)."""
    if len(metrics) == 1:
        return metrics[0]
    totals: dict[str, float] = {}
    for part in metrics:
        for name, value in part.items():
            totals[name] = totals.get(name, 0.0) + value * _weight(name, part)
    whole = {name: totals.get(name, 0.0) for name in (EPISODES, CALLS)}
    whole[CALLS] /= max(whole[EPISODES], 1.0)
    return {name: value / max(_weight(name, whole), 1e-9) for name, value in totals.items()}


EPISODES, CALLS = "environment/episodes", "environment/tool_calls"


def _weight(name: str, metrics: Mapping[str, float]) -> float:
    """Return what a metric is a mean over; 1 for a count."""
    if name == "environment/tool_errors":
        return metrics[EPISODES] * metrics[CALLS]
    return metrics[EPISODES] if name in (CALLS, "environment/seconds") else 1.0
