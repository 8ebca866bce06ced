"""The second copy of the model, where an algorithm trains two (CORY): a learner, engines and a weight
channel of its own, always at the same version as the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rft import checkpoint
from rft.batch import Batch, Group
from rft.config.schema import Config
from rft.errors import CheckpointError
from rft.learner.workers import LearnerHandle
from rft.rollout.engine import Generate, Generated, Request
from rft.rollout.fleet import Fleet


def own(groups: Sequence[Group], copy: int) -> list[Group]:
    """The groups as one copy learns from them: the other one's completions are there, for the rewards that
    the two share, but the loss acts on none of their tokens."""

    def seen(group: Group) -> Group:
        completions = tuple(
            c if c.values["copy"] == copy else replace(c, mask=(False,) * len(c.tokens))
            for c in group.completions
        )
        return replace(group, completions=completions)

    return [seen(group) for group in groups]


@dataclass
class Twin:
    """root: where its checkpoints are, beside those of the first."""

    learner: LearnerHandle
    fleet: Fleet
    config: Config
    root: Path
    saved_at: int = -1
    version: int = 0  # finished steps

    def route(self, first: Fleet) -> Generate:
        """A generator that asks the engines of the copy that a request is for."""

        async def generate(request: Request) -> list[Generated]:
            return await (self.fleet if request.copy else first).generate(request)

        return generate

    async def step(self, batch: Batch, step: int) -> dict[str, float]:
        """Train on a batch and push what came of it; returns the metrics as `copy/...`."""
        async with self.fleet.gate:
            await self.fleet.before_step()
            metrics = await self.learner.step(batch, step)
            self.version = step + 1
            await self.fleet.push(step + 1)
        self.fleet.progressed()
        if self.fleet.proof is not None:
            metrics |= self.fleet.proof.metrics
        for message in await self.learner.pop_messages():
            self.fleet.progress.note(message)
        return {f"copy/{name}": value for name, value in metrics.items()}

    async def save(self, step: int) -> None:
        """Save its learner, once per step and before the first copy is saved: where that one has a
        checkpoint, there is one of the same step here."""
        if self.saved_at != step:
            keep = self.config.checkpoint.keep + 1
            await self.learner.begin_save(str(self.root), step, keep, {"step": step})
            await self.learner.finish_save()
            self.saved_at = step

    async def restore(self, step: int) -> None:
        """Take over the last checkpoint of a step. Raises CheckpointError where there is none."""
        found = [c for c in map(checkpoint.load, self.root.glob("step-*")) if c.step == step]
        if not found:
            raise CheckpointError(
                f"{self.root} has no checkpoint of step {step}, where the first copy goes on; "
                "start anew with another name"
            )
        await self.learner.restore(str(max(found, key=lambda c: c.order).path))
        self.saved_at = self.version = step
