"""Training on a dataset: the same learner, fed without rollouts (SFT, preferences, reward models)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rft.batch import Batch, Group
from rft.checkpoint import Checkpoint
from rft.data import Sampler
from rft.metrics import Progress, RunLog
from rft.remote import call


class RunStopped(Exception):
    """The run was asked to stop; a checkpoint of `step` is saved."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped at step {step}")
        self.step = step


@dataclass
class OfflineLoop:
    """Trains a learner on groups, `batch_size` per step. `step` counts finished steps.

    `arrange` rearranges each step's groups before they are laid out (the algorithm's own).
    `checkpoints` None: nothing is saved. `log` None: nothing is written (a warm start).
    """

    learner: Any
    groups: list[Group]
    steps: int
    batch_size: int
    seed: int
    share_prefix: bool
    timeout_s: float
    progress: Progress
    arrange: Callable[[list[Group]], list[Group]] | None = None
    log: RunLog | None = None
    checkpoints: Path | None = None
    save_every: int = 0
    keep: int = 1
    step: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.sampler = Sampler(len(self.groups), self.seed)
        self.saved_at = -1

    async def run(self, resume: Checkpoint | None = None) -> dict[str, float]:
        """Train to the end; returns the last step's metrics. Raises RunStopped on a requested stop."""
        if resume is not None:
            self.step = await self._ask("restore", str(resume.path))
            self.sampler.load_state_dict(resume.meta["sampler"])
            self.saved_at = self.step
        metrics: dict[str, float] = {}
        batch = self._next_batch()
        while self.step < self.steps:
            if self.stop.is_set():
                await self._save(ahead=1)
                raise RunStopped(self.step)
            begin = time.perf_counter()
            running = asyncio.ensure_future(self._ask("step", batch, self.step))
            await asyncio.sleep(0)  # the step is on its way before the next batch is laid out
            upcoming = self._next_batch()
            metrics = await running
            tokens = float(batch.mask.sum())
            batch, self.step = upcoming, self.step + 1
            metrics["time/step"] = time.perf_counter() - begin
            metrics["throughput/tokens_per_s"] = tokens / metrics["time/step"]
            metrics["data/epoch"] = (self.sampler.seen - self.batch_size) / self.sampler.size
            if self.save_every and self.step % self.save_every == 0:
                metrics["time/checkpoint"] = await self._save(ahead=1)
            if self.log is not None:
                self.log.log(self.step, metrics)
            self.progress.update(self.step, metrics)
        await self._save(ahead=1)
        return metrics

    def _next_batch(self) -> Batch:
        rows = self.sampler.next(self.batch_size)
        groups = [self.groups[i] for i in rows]
        if self.arrange is not None:
            groups = self.arrange(groups)
        return Batch.build(groups, share_prefix=self.share_prefix)

    async def _save(self, ahead: int) -> float:
        """Save once per step. `ahead` batches were drawn and not trained on: a resumed run draws them
        again."""
        if self.checkpoints is None or self.saved_at == self.step:
            return 0.0
        begin = time.perf_counter()
        state = Sampler(self.sampler.size, self.seed)
        state.next(self.sampler.seen - ahead * self.batch_size)
        meta = {"step": self.step, "sampler": state.state_dict()}
        path = await self._ask("save", str(self.checkpoints), self.step, self.keep, meta)
        self.saved_at = self.step
        seconds = time.perf_counter() - begin
        if self.log is not None:
            self.log.event("checkpoint/saved", step=self.step, path=path, seconds=seconds)
        return seconds

    async def _ask(self, method: str, *args: Any) -> Any:
        reference = getattr(self.learner, method).remote(*args)
        return await call(reference, self.timeout_s, f"{method} on the learner at step {self.step}")
