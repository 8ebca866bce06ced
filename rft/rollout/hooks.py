"""Hooks of the online loop, for an algorithm that needs more than one learner and its fresh groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rft.batch import Batch, Group, Prompt
from rft.rollout.engine import Generate
from rft.rollout.fleet import Fleet


class LoopHooks:
    """Hooks that change nothing. `Algorithm.hooks` names what makes the hooks of an algorithm.

    fleets: engines besides the policy's, which the loop opens, watches and closes as well.
    """

    fleets: Sequence[Fleet] = ()

    def route(self, generate: Generate) -> Generate:
        """Return what completes the requests of training; `generate` asks the policy's engines."""
        return generate

    def select(self, groups: list[Group]) -> list[Group]:
        """Return the groups to train the policy on, given the step's fresh ones."""
        return groups

    def step_failed(self) -> None:
        """Undo the last `select`: no step was taken on its groups."""

    async def after_push(self, step: int, build: Callable[[list[Group]], Batch]) -> dict[str, float]:
        """Train anything else on the groups of the last `select`; return its metrics.

        Called once the policy's engines hold version `step`.
        """
        return {}

    async def save(self, step: int) -> None:
        """Save anything besides the policy, before the policy's checkpoint of `step` is begun. Raises
        CheckpointError where there is nothing that fits it."""

    async def restore(self, step: int) -> None:
        """Load what `save` wrote for `step`. Raises CheckpointError."""

    def state_dict(self) -> list[Any]:
        """Return the state that goes into the policy's checkpoint, as plain JSON."""
        return []

    def load_state_dict(self, state: list[Any], prompts: Mapping[int, Prompt]) -> None:
        """Load what `state_dict` returned. prompts: the run's prompts by id."""

    async def export(self, folder: Path) -> None:
        """Write further final models into the run's folder."""

    async def close(self) -> None:
        """End further engines."""
