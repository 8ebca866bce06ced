"""The second copy of the model for algorithms that train two (CORY): a learner with engines, always at the
same version as the first copy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rft import checkpoint
from rft.batch import Batch, Group
from rft.config.schema import Config
from rft.errors import CheckpointError
from rft.learner.workers import LearnerHandle
from rft.rollout.engine import Generate, Generated, Request
from rft.rollout.fleet import Fleet
from rft.rollout.hooks import LoopHooks
from rft.utils.files import folder_atomic

StartPolicy = Callable[[str], Awaitable[tuple[LearnerHandle, Fleet]]]


async def start(config: Config, folder: Path, start_policy: StartPolicy) -> SecondPolicy:
    """Start the second copy. folder: the run's folder."""
    learner, fleet = await start_policy("the second learner")
    return SecondPolicy(learner, fleet, config, folder / "checkpoints-second")


def masked_to(groups: Sequence[Group], copy: int) -> list[Group]:
    """Return the groups as one copy trains on them: the other copy's completions stay, for the shared
    rewards, but the loss masks out all their tokens."""

    def masked(group: Group) -> Group:
        completions = tuple(
            c if c.values["copy"] == copy else replace(c, mask=(False,) * len(c.tokens))
            for c in group.completions
        )
        return replace(group, completions=completions)

    return [masked(group) for group in groups]


class SecondPolicy(LoopHooks):
    """Train and serve the second copy. root: folder of its checkpoints, next to those of the first copy."""

    def __init__(self, learner: LearnerHandle, fleet: Fleet, config: Config, root: Path) -> None:
        self.learner, self.fleet, self.config, self.root = learner, fleet, config, root
        self.fleets = [fleet]
        self.version = 0  # finished steps
        self.saved_at = -1
        self._groups: list[Group] = []

    def route(self, generate: Generate) -> Generate:
        """Send each request to the engines of the copy that it is meant for."""

        async def routed(request: Request) -> list[Generated]:
            return await (self.fleet.generate if request.copy else generate)(request)

        return routed

    def select(self, groups: list[Group]) -> list[Group]:
        self._groups = groups
        return masked_to(groups, 0)

    async def after_push(self, step: int, build: Callable[[list[Group]], Batch]) -> dict[str, float]:
        """Train on the same groups and push the result; return the metrics as `copy/...`."""
        batch = build(masked_to(self._groups, 1))
        async with self.fleet.gate:
            await self.fleet.before_step()
            metrics = await self.learner.step(batch, step - 1)
            self.version = step
            await self.fleet.push(step)
        self.fleet.progressed()
        if self.fleet.proof is not None:
            metrics |= self.fleet.proof.metrics
        for message in await self.learner.pop_messages():
            self.fleet.progress.note(message)
        return {f"copy/{name}": value for name, value in metrics.items()}

    async def save(self, step: int) -> None:
        """Save its learner, once per step and before the first copy, so that for every checkpoint of the
        first copy there is one of the same step here."""
        if self.version != step:
            raise CheckpointError("the second copy has not finished this step")
        if self.saved_at != step:
            keep = self.config.checkpoint.keep + 1
            await self.learner.begin_save(str(self.root), step, keep, {"step": step})
            await self.learner.finish_save()
            self.saved_at = step

    async def restore(self, step: int) -> None:
        """Load the last checkpoint of a step. Raises CheckpointError if there is none."""
        checkpoints = [c for c in map(checkpoint.load, self.root.glob("step-*")) if c.step == step]
        if not checkpoints:
            raise CheckpointError(
                f"{self.root} has no checkpoint of step {step}, from which the first copy resumes; start a "
                "new run with another name"
            )
        await self.learner.restore(str(max(checkpoints, key=lambda c: c.order).path))
        self.saved_at = self.version = step

    async def export(self, folder: Path) -> None:
        with folder_atomic(folder / "model-second") as temporary:
            await self.learner.export(str(temporary))
        await self.fleet.channel.close()

    async def close(self) -> None:
        await self.fleet.pool.close()
