"""The offline loop: train on a dataset (SFT, preferences, reward models) through the learner, saver, guards
and evaluation of online runs.

    GroupSource (data) --groups--> Batch.build --batch--> LearnerHandle.step (Ray actors) --metrics--> RunLog
         ^                                                     | version + 1                   Saver, Guards
         '-- the next batch is built while the learner steps --'

`train_offline` prepares a run: the order of the rows, reference log-probs that are computed once, the
held-out groups. `OfflineLoop` trains; a warm start uses it as well.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rft.algorithms.extras import arrange, reads_start
from rft.batch import Batch, Completion, Group
from rft.checkpoint import Checkpoint
from rft.data import GroupSampler, GroupSource
from rft.data.aioli import Aioli
from rft.data.mixture import MixtureSampler
from rft.errors import RunStopped
from rft.learner.adapters.methods import previewed_sequences
from rft.learner.load import resolve_dtype
from rft.learner.workers import LearnerHandle
from rft.loops.evaluate import HeldOut, OfflineEvaluation, SampledEvaluation
from rft.loops.saver import Saver
from rft.metrics import Progress, RunLog
from rft.metrics.guards import Guards
from rft.plan import OfflinePlan
from rft.run_dir import RunFolder
from rft.utils.deadlines import unless_stopped
from rft.utils.files import write_atomic
from rft.utils.hashing import model_digest
from rft.work import shares_prefix

# -- a run ---------------------------------------------------------------------------------------------


async def train_offline(
    plan: OfflinePlan,
    folder: RunFolder,
    learner: LearnerHandle,
    progress: Progress,
    log: RunLog,
    stop: asyncio.Event,
    sampled: SampledEvaluation | None,
) -> dict[str, float]:
    """Train the learner on the plan's data; returns the last evaluation. Raises RunStopped."""
    config, data = plan.config, plan.data
    for line in data.lines(config):
        progress.note(line)
    share = shares_prefix(data.sample, config.learner.prefix_sharing, plan.shape.hidden)
    source = data.source(config)
    of_sources = {f"mixture/{name}": list(rows) for name, rows in data.by_source.items()}
    tests = {} if data.held_out is None else {"": list(data.held_out)}
    tests |= {name: list(rows) for name, rows in data.sets.items()} | of_sources
    cached = config.learner.reference_logps == "cached"
    if cached or reads_start(config.algorithm):
        progress.stage("reference log-probs")
        train = await unless_stopped(scored(plan, learner, data.sample, share), stop)
        for name, groups in tests.items():
            tests[name] = await unless_stopped(scored(plan, learner, groups, share), stop)
        if cached:
            await learner.release_reference()
        source = data.source(config, train)
    rearrange = partial(arrange, config.algorithm)
    held_out = {n: HeldOut(rows, config.train.batch_size, share, rearrange) for n, rows in tests.items()}
    measured = {name.removeprefix("mixture/"): held_out.pop(name) for name in of_sources}
    guards = Guards(config.guards, online=False)
    if folder.resume is not None:
        guards.resume(log.run_dir, folder.resume.step)
    loop = OfflineLoop(
        learner,
        source,
        config.train.steps,
        config.train.batch_size,
        share_prefix=share,
        progress=progress,
        saver=Saver(learner, folder.checkpoints, config, progress, log),
        arrange=rearrange,
        evaluation=OfflineEvaluation(held_out, sampled) if held_out or sampled else None,
        eval_every=config.eval.every,
        log=log,
        guards=guards,
        preview=previewed_sequences(config.learner),
        by_source=measured,
        stop=stop,
    )
    return await loop.run(folder.resume)


# -- the loop ------------------------------------------------------------------------------------------


@dataclass
class OfflineLoop:
    """Trains a learner on groups, `batch_size` per step. `step` counts finished steps.

    arrange: rearranges each step's groups before they are laid out (`Algorithm.arrange`).
    preview: sequences to show the learner before the first step, including those of the first batch.
    log, guards: None for a stage without them (a warm start). save_last: whether to save at the end.
    by_source: held-out rows of each source of a mixture whose rates are learned (`mixing: aioli`).
    stage: its name in messages; empty for the run itself.
    """

    learner: LearnerHandle
    source: GroupSource
    steps: int
    batch_size: int
    share_prefix: bool
    progress: Progress
    saver: Saver
    arrange: Callable[[list[Group]], list[Group]] | None = None
    evaluation: OfflineEvaluation | None = None
    eval_every: int = 0
    log: RunLog | None = None
    guards: Guards | None = None
    preview: int = 0
    save_last: bool = True
    by_source: Mapping[str, HeldOut] = field(default_factory=dict)
    stage: str = ""
    step: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.upcoming = self.source.state_dict()  # of the source, before the batch that was laid out last
        self.trained = self.upcoming  # and before the first batch that was not trained on
        self.line: dict[str, float] = {}  # metrics of the last step, as far as known

    async def run(self, resume: Checkpoint | None = None) -> dict[str, float]:
        """Train to the end; returns the last evaluation, or the last step's metrics where there is none.
        Raises RunStopped on a requested stop."""
        if resume is not None:
            self.step = await unless_stopped(self.learner.restore(str(resume.path)), self.stop)
            self.source.load_state_dict(resume.meta["data"])
            self.saver.saved_at = self.step
        async with self.saver.save_at_end(self):
            last = await self._evaluate_first()
            await self._learn_rates()
            batch = self._next_batch()
            self.trained = self.upcoming
            if self.step == 0 and self.preview:
                await self._show(batch.num_sequences)
            while self.step < self.steps:
                self._check_stop()
                last, batch = await self._one_step(batch, last)
            self._check_stop()
            if self.save_last:
                await self.save(final=True)
            return last

    async def _one_step(self, batch: Batch, last: dict[str, float]) -> tuple[dict[str, float], Batch]:
        """Train on a batch; returns the last evaluation (without one, the metrics) and the next batch."""
        begin = time.perf_counter()
        running = self.learner.step(batch, self.step)
        progress = self.source.metrics()
        learned = self._learned()
        if learned is None or not learned.due(self.step + 1):
            upcoming = self._next_batch()  # while the learner steps
            metrics = await running
        else:
            metrics = await running
            await self._learn_rates(1)
            upcoming = self._next_batch()
        for message in await self.learner.pop_messages():
            self.progress.note(message)
        self.step += 1  # whatever fails from here on: this step's line is written before its checkpoint
        self.line = metrics
        self.trained = self.upcoming
        metrics["time/step"] = time.perf_counter() - begin
        metrics["time/checkpoint"] = self.saver.take_seconds()
        metrics["throughput/tokens_per_s"] = float(batch.mask.sum()) / metrics["time/step"]
        metrics |= progress
        if self.evaluation is None:
            last = metrics
        elif self._evaluation_due():
            last = await self._evaluate_unless_stopped(self.evaluation)
            metrics |= last
        self._log(metrics)
        if self.saver.due(self.step):  # after the log: a kill in between repeats the step, not its line
            await self.save()
        await self.saver.poll()
        if self.guards is not None and self.log is not None:
            self.guards.enforce(self.step, metrics, self.log, self.progress)
        return last, upcoming

    def _next_batch(self) -> Batch:
        self.upcoming = self.source.state_dict()
        groups = self.source.next(self.batch_size)
        if self.arrange is not None:
            groups = self.arrange(groups)
        return Batch.build(groups, share_prefix=self.share_prefix)

    def _learned(self) -> Aioli | None:
        """Return the learned rates of the mixture, if there are some."""
        sampler = self.source.sampler if isinstance(self.source, GroupSampler) else None
        return sampler.learned if isinstance(sampler, MixtureSampler) else None

    async def _learn_rates(self, ahead: int = 0) -> None:
        """Measure the loss of each source where the mixture's rates need it. ahead: steps that are done, and
        not counted yet."""
        learned, step = self._learned(), self.step + ahead
        if learned is None or not learned.due(step) or step >= self.steps:
            return
        losses = {}
        for name, rows in self.by_source.items():
            sums = [await self.learner.evaluate(batch, step) for batch in rows.batches()]
            losses[name] = rows.metrics(sums)["loss"]
        learned.observe(step, losses)

    async def _show(self, seen: int) -> None:
        """Show the learner the batches that come next: `preview` sequences with the `seen` ones, or one pass
        over the data. They are drawn again for their steps."""
        waiting, here = self.upcoming, self.source.state_dict()
        while seen < self.preview and self.source.epochs < 1:
            batch = self._next_batch()
            await self.learner.preview(batch)
            seen += batch.num_sequences
        self.source.load_state_dict(here)
        self.upcoming = waiting

    def _log(self, metrics: dict[str, float]) -> None:
        if self.log is not None:
            self.log.log(self.step, metrics)
        self.progress.update(self.step, metrics)

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise RunStopped(self.step or None, self.stage)

    async def save(self, *, final: bool = False) -> None:
        """Save a checkpoint of this step, once, after the step's line, even where the evaluation failed. The
        batch that waits was not trained on: a resumed run draws it again."""
        if self.log is not None and self.line and self.step > self.log.last_step:
            self.log.log(self.step, self.line)
        await self.saver.save(self.step, {"step": self.step, "data": self.trained}, final=final)

    def _evaluation_due(self) -> bool:
        return self.step in (0, self.steps) or bool(self.eval_every and self.step % self.eval_every == 0)

    async def _evaluate_first(self) -> dict[str, float]:
        """Evaluate before the first step of this process, where it is due and not in the log: for a new run,
        or for one that ended before the evaluation did. Returns the evaluation of these weights; without
        held-out rows, the metrics of the last step."""
        logged: dict[str, float] = {}
        if self.log is not None:
            logged = self.log.resumed_metrics() if self.evaluation is None else self.log.resumed_evaluation()
        if logged or self.evaluation is None or not self._evaluation_due():
            return logged
        metrics = await unless_stopped(self._evaluate(self.evaluation), self.stop)
        self._log(metrics)
        return metrics

    async def _evaluate(self, evaluation: OfflineEvaluation) -> dict[str, float]:
        """Evaluate the current weights on the held-out data; return the metrics."""
        begin = time.perf_counter()
        metrics = await evaluation.run(self.learner, self.step)
        seconds = metrics["time/eval"] = time.perf_counter() - begin
        if self.log is not None:
            shown = {k: metrics[f"eval/{k}"] for k in ("loss", "accuracy") if f"eval/{k}" in metrics}
            self.log.event("eval/done", step=self.step, seconds=seconds, **shown)
        return metrics

    async def _evaluate_unless_stopped(self, evaluation: OfflineEvaluation) -> dict[str, float]:
        """Evaluate; return {} if a stop is requested meanwhile, because the loop then saves and ends."""
        try:
            return await unless_stopped(self._evaluate(evaluation), self.stop)
        except RunStopped:
            return {}


# -- log-probs of a teacher, or of the reference, that are computed once -------------------------------


async def scored(
    plan: OfflinePlan, learner: LearnerHandle, groups: Sequence[Group], share_prefix: bool
) -> list[Group]:
    """The groups with the log-probs that the config wants before training: the reference's, the start's."""
    config = plan.config
    dtype = str(resolve_dtype(config.learner.dtype, plan.device))

    async def logps(score: Callable[[Batch], Awaitable[torch.Tensor]], model: str, how: str) -> Path:
        file = cache_file(Path(config.output_dir) / ".cache", groups, model, how)
        if not file.exists():
            parts = []
            for start in range(0, len(groups), config.train.batch_size):
                some = groups[start : start + config.train.batch_size]
                batch = Batch.build(some, share_prefix=share_prefix)
                parts.append((await score(batch))[batch.mask])
            file.parent.mkdir(parents=True, exist_ok=True)
            with write_atomic(file) as temporary:
                save_file({"logps": torch.cat(parts)}, temporary)
        return file

    result = list(groups)
    if config.learner.reference_logps == "cached":
        file = await logps(learner.score_reference, plan.reference_path or plan.model, dtype)
        result = attach(result, file)
    if reads_start(config.algorithm):  # a quantised base has other log-probs than its file
        how = f"{dtype} {config.learner.adapter!r} {config.learner.strategy!r}"
        file = await logps(learner.score_policy, plan.model, how)
        result = attach(result, file, start=True)
    return result


def cache_file(folder: Path, groups: Sequence[Group], model: str, dtype: str) -> Path:
    """The file for the reference's log-probs of these groups, named by a hash of the model's weights, every
    token, and the precision."""
    digest = hashlib.sha256(f"{model_digest(model)} {dtype}\n".encode())
    for group in groups:
        digest.update(repr((group.prompt.tokens, [(c.tokens, c.mask) for c in group.completions])).encode())
    return folder / f"reference-{digest.hexdigest()[:16]}.safetensors"


def attach(groups: Sequence[Group], file: Path, *, start: bool = False) -> list[Group]:
    """The groups with the log-probs of a file at each completion: as `ref_logps`, or those of the start as
    `values["start_logps"]`. Raises ValueError where the file does not fit."""
    logps = load_file(file)["logps"].tolist()
    values = iter(logps)
    wanted = sum(sum(_mask(c)) for g in groups for c in g.completions)
    if wanted != len(logps):
        raise ValueError(
            f"{file} contains {len(logps)} reference log-probs, but the data has {wanted} tokens: "
            "delete the file, and they are computed again"
        )
    fill = _with_start if start else _filled
    return [replace(g, completions=tuple(fill(c, values) for c in g.completions)) for g in groups]


def _mask(c: Completion) -> tuple[bool, ...]:
    return c.mask if c.mask is not None else (True,) * len(c.tokens)


def _filled(c: Completion, values: Iterator[float]) -> Completion:
    return replace(c, ref_logps=tuple(next(values) if trained else 0.0 for trained in _mask(c)))


def _with_start(c: Completion, values: Iterator[float]) -> Completion:
    return replace(c, values={**c.values, "start_logps": tuple(islice(values, sum(_mask(c))))})
