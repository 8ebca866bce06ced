"""Save checkpoints in the background and tolerate a bounded number of failures; for both loops."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

from rft.config.schema import Config
from rft.environments.types import EnvironmentFault
from rft.errors import (
    BrokenWeights,
    CallbackError,
    CheckpointError,
    EngineError,
    LearnerError,
    LogpGapError,
    NoSignal,
    RunStopped,
)
from rft.learner.workers import LearnerHandle
from rft.metrics import Progress, RunLog
from rft.metrics.guards import GuardStop
from rft.rewards.types import RewardError
from rft.utils.actors import ActorDied
from rft.utils.deadlines import Deadline, Overdue, within

# After these the learner is usable, and the steps since the last checkpoint are worth keeping. After
# `Overdue` it may be busy with the call: the checkpoint then has a deadline, and is refused if an overdue
# step was finished after all.
SAVE_ON = (
    GuardStop,
    RewardError,
    EnvironmentFault,
    NoSignal,
    EngineError,
    LearnerError,
    LogpGapError,
    CallbackError,
    Overdue,
)


class Loop(Protocol):
    """A loop whose last finished step can be saved."""

    step: int

    async def save(self, *, final: bool = False) -> None:
        """Save a checkpoint of the last finished step, once."""


class Saver:
    """Saves checkpoints through the learner, which owns the weights.

    log: None for a stage without a log (a warm start). A checkpoint that cannot be written (a full disk) is
    tolerated `checkpoint.max_failures` times in a row: older checkpoints stay, and the next one is tried as
    usual.
    """

    def __init__(
        self, learner: LearnerHandle, root: Path, config: Config, progress: Progress, log: RunLog | None
    ) -> None:
        self.learner, self.root, self.config = learner, root, config
        self.progress, self.log = progress, log
        self.saved_at = -1  # the step of the last checkpoint that was begun
        self.failures = 0
        self._pending: tuple[int, float] | None = None  # step, when it was begun
        self._held = 0.0

    def due(self, step: int) -> bool:
        """Whether `checkpoint.every` asks for a checkpoint of this step."""
        return self.config.checkpoint.every > 0 and step % self.config.checkpoint.every == 0

    def take_seconds(self) -> float:
        """Return the seconds that saving has delayed the loop since the last call."""
        held, self._held = self._held, 0.0
        return held

    async def save(self, step: int, meta: Mapping[str, Any], *, final: bool = False) -> None:
        """Begin the checkpoint of a step, once. final: wait until it is complete, and tolerate no failure."""
        if final:
            await self.poll(wait=True)
        if self.saved_at == step:
            return
        begin = time.perf_counter()
        await self.poll(wait=True)
        keep = self.config.checkpoint.keep
        await self.learner.begin_save(str(self.root), step, keep, dict(meta), self.config.to_dict())
        self.saved_at, self._pending = step, (step, begin)
        if final or not self.config.checkpoint.background:
            await self.poll(wait=True, final=final)
        self._held += time.perf_counter() - begin

    async def poll(self, *, wait: bool = False, final: bool = False) -> None:
        """Report a checkpoint that was completed, or that failed. Raises CheckpointError after too many."""
        if self._pending is None:
            return
        step, begin = self._pending
        try:
            path = await self.learner.finish_save(wait)
        except CheckpointError as error:
            self._pending, self.saved_at = None, -1
            self.failures += 1
            limit = self.config.checkpoint.max_failures
            fatal = final or self.failures > limit
            action = (
                "the run ends"
                if fatal
                else f"training continues (failure {self.failures} of {limit} in a row)"
            )
            self._event("fault/checkpoint", part="checkpoint", step=step, what=str(error), action=action)
            self.progress.note(f"{error} {action[0].upper()}{action[1:]}.")
            if fatal:
                raise
            return
        if path is None:
            return
        self._pending, self.failures = None, 0
        seconds = time.perf_counter() - begin
        self._event("checkpoint/saved", step=step, path=path, seconds=seconds, held=self._held)

    @asynccontextmanager
    async def save_at_end(self, loop: Loop) -> AsyncIterator[None]:
        """Save the loop's last finished step where the block raises and the learner is still usable."""
        try:
            yield
        except RunStopped:
            if loop.step:  # before the first step there is nothing to save
                await loop.save(final=True)
            raise
        except SAVE_ON as error:
            await self._save_before_the_end(loop, error)
            raise
        except ActorDied as error:  # replicas are rebuilt: this was the learner
            self._event("fault/learner", part="learner", what=str(error), action="the run ends")
            raise

    async def _save_before_the_end(self, loop: Loop, error: Exception) -> None:
        """Save, and report whether that worked; a failure to save does not replace `error`."""
        if not loop.step:
            saved = "no step is finished, so there is nothing to save"
        elif isinstance(error, BrokenWeights):
            saved = "no checkpoint is saved: the weights are not finite"
        else:
            try:
                if isinstance(error, Overdue):
                    grace = Deadline(self.config.train.stop_grace_s, "train.stop_grace_s")
                    self.progress.note(f"{error}: saving a checkpoint, within {grace:g} s ({grace.key})")
                    await within(grace, "saving a checkpoint", loop.save(final=True))
                else:
                    await loop.save(final=True)
                saved = f"a checkpoint of step {loop.step} is saved"
            except (BrokenWeights, CheckpointError, ActorDied, Overdue) as failure:
                saved = f"no checkpoint is saved: {failure}"
        if isinstance(error, LearnerError | LogpGapError | Overdue):
            self._event("fault/learner", part="learner", what=str(error), action=f"{saved}; the run ends")
        self.progress.note(f"{type(error).__name__} after step {loop.step}; {saved}")

    def _event(self, kind: str, **fields: Any) -> None:
        if self.log is not None:
            self.log.event(kind, **fields)
