"""An offline run from its data to its last step: the order of the rows, the references, the evaluation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rft.batch import Group
from rft.data import GroupSampler
from rft.learner.adapters.methods import previewed_sequences
from rft.learner.model import resolve_dtype
from rft.learner.workers import LearnerHandle
from rft.loops import reference
from rft.loops.offline import OfflineLoop
from rft.loops.offline_eval import HeldOut, SampledMetrics
from rft.metrics import Progress, RunLog
from rft.packing import shares_prefix
from rft.plan import OfflinePlan
from rft.run_dir import RunFolder


async def train_offline(
    plan: OfflinePlan,
    folder: RunFolder,
    learner: LearnerHandle,
    progress: Progress,
    log: RunLog,
    stop: asyncio.Event,
    generate: SampledMetrics | None,
) -> dict[str, float]:
    """Train the learner on the plan's data; returns the last evaluation. Raises RunStopped."""
    config, data = plan.config, plan.data
    for line in data.lines(config):
        progress.note(line)
    share = shares_prefix(data.sample, config.learner.prefix_sharing, plan.shape.hidden)
    source = data.source(config)
    tests = list(data.held_out) if data.held_out is not None else []
    if config.learner.reference_logps == "cached":
        progress.stage("reference log-probs")
        train = await _with_reference(plan, learner, data.sample, share)
        tests = await _with_reference(plan, learner, tests, share) if tests else []
        await learner.release_reference()
        source = GroupSampler(train, config.seed, shuffle=config.data.shuffle)
    held_out = None
    if tests:
        arrange, size = config.algorithm.arrange, config.train.batch_size
        held_out = HeldOut(tests, config.eval.every, size, share, arrange, generate)
    loop = OfflineLoop(
        learner,
        source,
        config.train.steps,
        config.train.batch_size,
        share_prefix=share,
        progress=progress,
        checkpoints=folder.checkpoints,
        arrange=config.algorithm.arrange,
        held_out=held_out,
        preview=previewed_sequences(config.learner),
        log=log,
        save_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        stop=stop,
    )
    return await loop.run(folder.resume)


async def _with_reference(
    plan: OfflinePlan, learner: LearnerHandle, groups: Sequence[Group], share: bool
) -> list[Group]:
    """The groups with the reference's log-probs, read from the cache or computed into it."""
    config = plan.config
    dtype = str(resolve_dtype(config.learner.dtype, plan.device))
    cache = Path(config.output_dir) / ".cache"
    file = reference.cache_file(cache, groups, plan.reference_path or plan.model, dtype)

    if not file.exists():
        await reference.compute(file, groups, config.train.batch_size, share, learner.score_reference)
    return reference.attach(groups, file)
