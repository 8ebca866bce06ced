"""Checkpoints as the loop sees them: begun in passing, told when complete, missed at most so often."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rft.config.schema import Config
from rft.errors import CheckpointError
from rft.learner.workers import LearnerHandle
from rft.metrics import Progress, RunLog


class Saver:
    """Saves through the learner, which owns the weights.

    A checkpoint that cannot be written (a full disk) is a fault that the run survives
    `checkpoint.max_failures` times in a row: the older checkpoints are there, and the next one is tried as
    if nothing was.
    """

    def __init__(
        self, learner: LearnerHandle, root: Path, config: Config, log: RunLog, progress: Progress
    ) -> None:
        self.learner, self.root, self.log, self.progress = learner, root, log, progress
        self.config = config
        self.saved_at = -1  # the step of the last checkpoint that was begun
        self.failures = 0
        self._pending: tuple[int, float] | None = None  # step, when it was begun
        self._held = 0.0

    def take_seconds(self) -> float:
        """Seconds that saving has held the loop up since the last call."""
        held, self._held = self._held, 0.0
        return held

    async def save(self, step: int, meta: Mapping[str, Any], *, final: bool) -> None:
        """Begin the checkpoint of a step, once. `final`: wait for it, and let no failure pass.

        Raises CheckpointError.
        """
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
        """Tell of a checkpoint that was completed, or was not."""
        if self._pending is None:
            return
        step, begin = self._pending
        try:
            path = await self.learner.finish_save(wait)
        except CheckpointError as error:
            self._pending = None
            self._fail(step, error, final)
            return
        if path is None:
            return
        self._pending, self.failures = None, 0
        seconds = time.perf_counter() - begin
        self.log.event("checkpoint/saved", step=step, path=path, seconds=seconds, held=self._held)

    def _fail(self, step: int, error: CheckpointError, final: bool) -> None:
        self.failures += 1
        self.saved_at = -1
        limit = self.config.checkpoint.max_failures
        fatal = final or self.failures > limit
        action = "the run ends" if fatal else f"training goes on ({self.failures} of {limit} in a row)"
        self.log.event("fault/checkpoint", part="checkpoint", step=step, what=str(error), action=action)
        self.progress.note(f"{error} {action[0].upper()}{action[1:]}.")
        if fatal:
            raise error
