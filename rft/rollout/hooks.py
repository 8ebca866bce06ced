"""Hooks of the online loop, for algorithms that need a second learner, more than the fresh groups, or a
teacher's scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rft.batch import Batch, Group, Prompt
from rft.rollout.engine import Generate
from rft.rollout.fleet import Fleet


class LoopHooks:
    """No-op hooks. `Algorithm.hooks` is the dotted path of an algorithm's hook factory; a config's
    `teacher` has hooks too.

    fleets: engines besides the policy's, which the loop opens, monitors and closes too.
    """

    fleets: Sequence[Fleet] = ()

    def route(self, generate: Generate) -> Generate:
        """Return the function that completes training requests; `generate` uses the policy's engines."""
        return generate

    async def scored(self, group: Group) -> Group:
        """Return a group, whose rewards are known, with what else the algorithm needs of its completions."""
        return group

    def select(self, groups: list[Group]) -> list[Group]:
        """Return the groups to train the policy on, given the step's fresh ones."""
        return groups

    def step_failed(self) -> None:
        """Undo the last `select`: the step on its groups failed."""

    async def after_push(self, step: int, build: Callable[[list[Group]], Batch]) -> dict[str, float]:
        """Train other models on the groups of the last `select`; return metrics.

        Called once the policy's engines hold version `step`.
        """
        return {}

    async def save(self, step: int) -> None:
        """Save state besides the policy's, before the policy's checkpoint of `step` is started. Raises
        CheckpointError if there is no state that matches it."""

    async def restore(self, step: int) -> None:
        """Load the data that `save` wrote for `step`. Raises CheckpointError."""

    def state_dict(self) -> list[Any]:
        """Return the state to store in the policy's checkpoint, as plain JSON."""
        return []

    def load_state_dict(self, state: list[Any], prompts: Mapping[int, Prompt]) -> None:
        """Load a state returned by `state_dict`. prompts: the run's prompts by id."""

    async def export(self, folder: Path) -> None:
        """Write additional final models into the run's folder."""

    async def close(self) -> None:
        """Close additional engines."""
