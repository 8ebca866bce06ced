"""Training on a dataset: the same learner, fed without rollouts (SFT, preferences, reward models)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rft.batch import Batch, Group
from rft.checkpoint import Checkpoint
from rft.data import GroupSource
from rft.errors import BrokenWeights, CheckpointError, EngineError, LearnerError, LogpGapError, RunStopped
from rft.learner.workers import LearnerHandle
from rft.loops.offline_eval import HeldOut
from rft.metrics import Progress, RunLog
from rft.rewards.types import RewardError
from rft.utils.actors import ActorDied
from rft.utils.deadlines import Overdue, unless_stopped


@dataclass
class OfflineLoop:
    """Trains a learner on groups, `batch_size` per step. `step` counts finished steps.

    `arrange` rearranges each step's groups before they are laid out (the algorithm's own).
    `save_every` 0: a checkpoint only on a stop and, with `save_last`, at the end.
    `preview`: sequences that the learner sees before the first step, beside those of its batch.
    `log` None: nothing is written (a warm start).
    """

    learner: LearnerHandle
    source: GroupSource
    steps: int
    batch_size: int
    share_prefix: bool
    progress: Progress
    checkpoints: Path
    arrange: Callable[[list[Group]], list[Group]] | None = None
    held_out: HeldOut | None = None
    log: RunLog | None = None
    preview: int = 0
    save_every: int = 0
    save_last: bool = True
    keep: int = 1
    stage: str = ""
    step: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.saved_at = -1
        self.upcoming = self.source.state_dict()  # of the source, before the batch that was laid out last
        self.trained = self.upcoming  # and before the first batch that was not trained on

    async def run(self, resume: Checkpoint | None = None) -> dict[str, float]:
        """Train to the end; returns the last evaluation, or the last step's metrics where there is none.
        Raises RunStopped on a requested stop."""
        if resume is not None:
            self.step = await unless_stopped(self.learner.restore(str(resume.path)), self.stop)
            self.source.load_state_dict(resume.meta["data"])
            self.saved_at = self.step
        last: dict[str, float] = {}
        if self.step == 0 and self.held_out is not None:
            last = await unless_stopped(self._evaluate(), self.stop)
            self._tell(last)
        try:
            return await self._train(last)
        except (LearnerError, LogpGapError, EngineError, RewardError) as error:
            await self._save_before_the_end(error)
            raise

    async def _train(self, last: dict[str, float]) -> dict[str, float]:
        """The steps that are left; returns as `run` does. `last`: the evaluation before them."""
        batch = self._next_batch()
        self.trained = self.upcoming
        if self.step == 0 and self.preview:
            await self._show(batch.num_sequences)
        while self.step < self.steps:
            await self._check_stop()
            metrics, batch = await self._one_step(batch)
            if self.held_out is not None and self.held_out.due(self.step, self.steps):
                last = await self._evaluate_unless_stopped()
                metrics |= last
            elif self.held_out is None:
                last = metrics
            self._tell(metrics)
            if self.save_every and self.step % self.save_every == 0:
                await self._save()  # after the log: a kill in between repeats the step, its line is set aside
        await self._check_stop()
        if self.held_out is not None and not last:  # the last evaluation was interrupted
            last = await self._evaluate_unless_stopped()
            await self._check_stop()
        if self.save_last:
            await self._save()
        return last

    async def _check_stop(self) -> None:
        """Save and raise RunStopped where a stop is asked for; before the first step nothing is saved."""
        if not self.stop.is_set():
            return
        if self.step:
            await self._save()
        raise RunStopped(self.step or None, self.stage)

    async def _show(self, seen: int) -> None:
        """Show the learner the batches that come next: `preview` sequences with the `seen` ones, or one pass
        over the data. They are drawn again when it is their turn."""
        waiting, here = self.upcoming, self.source.state_dict()
        while seen < self.preview and self.source.epochs < 1:
            batch = self._next_batch()
            await self.learner.preview(batch)
            seen += batch.num_sequences
        self.source.load_state_dict(here)
        self.upcoming = waiting

    async def _one_step(self, batch: Batch) -> tuple[dict[str, float], Batch]:
        """Train on a batch; returns the metrics and the next batch, laid out in the meantime."""
        begin = time.perf_counter()
        running = self.learner.step(batch, self.step)  # runs while the next batch is laid out
        passes = self.source.epochs
        upcoming = self._next_batch()
        metrics = await running
        for message in await self.learner.pop_messages():
            self.progress.note(message)
        self.step += 1
        self.trained = self.upcoming
        metrics["time/step"] = time.perf_counter() - begin
        metrics["throughput/tokens_per_s"] = float(batch.mask.sum()) / metrics["time/step"]
        metrics["data/epoch"] = passes
        return metrics, upcoming

    def _next_batch(self) -> Batch:
        self.upcoming = self.source.state_dict()
        groups = self.source.next(self.batch_size)
        if self.arrange is not None:
            groups = self.arrange(groups)
        return Batch.build(groups, share_prefix=self.share_prefix)

    def _tell(self, metrics: dict[str, float]) -> None:
        if self.log is not None:
            self.log.log(self.step, metrics)
        self.progress.update(self.step, metrics)

    async def _evaluate(self) -> dict[str, float]:
        """The held-out metrics of the present weights."""
        assert self.held_out is not None
        begin = time.perf_counter()
        sums = [await self.learner.evaluate(batch, self.step) for batch in self.held_out.batches()]
        metrics = self.held_out.metrics(sums)
        if self.held_out.generate is not None:
            metrics |= await self.held_out.generate(self.step)
        metrics["time/eval"] = time.perf_counter() - begin
        if self.log is not None:
            shown = {"accuracy": metrics["eval/accuracy"]} if "eval/accuracy" in metrics else {}
            self.log.event(
                "eval/done", step=self.step, loss=metrics["eval/loss"], seconds=metrics["time/eval"], **shown
            )
        return metrics

    async def _evaluate_unless_stopped(self) -> dict[str, float]:
        """As `_evaluate`; {} where a stop is asked for meanwhile."""
        try:
            return await unless_stopped(self._evaluate(), self.stop)
        except RunStopped:
            return {}

    async def _save(self) -> None:
        """Save once per step. The batch that waits was not trained on: a resumed run draws it again."""
        if self.saved_at == self.step:
            return
        begin = time.perf_counter()
        meta = {"step": self.step, "data": self.trained}
        await self.learner.begin_save(str(self.checkpoints), self.step, self.keep, meta)
        path = await self.learner.finish_save()
        self.saved_at = self.step
        if self.log is not None:
            seconds = time.perf_counter() - begin
            self.log.event("checkpoint/saved", step=self.step, path=path, seconds=seconds)

    async def _save_before_the_end(self, error: Exception) -> None:
        """Keep the steps since the last checkpoint where `error` has left the learner whole. A failure to
        save is told and does not take the error's place."""
        saved = f"a checkpoint of step {self.step} is saved"
        try:
            if isinstance(error, BrokenWeights):
                raise error
            await self._save()
        except (BrokenWeights, CheckpointError, ActorDied, Overdue) as failure:
            saved = f"no checkpoint is saved: {failure}"
        if self.log is not None and isinstance(error, LearnerError | LogpGapError):
            action = f"{saved}; the run ends"
            self.log.event("fault/learner", part="learner", what=str(error), action=action)
        self.progress.note(f"{type(error).__name__} after step {self.step}; {saved}")
