"""The supervised stage before a run. Its result is cached by a hash of its inputs."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rft import checkpoint
from rft.algorithms.supervised.sft import SFT
from rft.config.schema import TrainConfig, WarmStartConfig
from rft.data import GroupSampler
from rft.data.mixture import mixture_sampler
from rft.learner.spec import LearnerSpec
from rft.learner.workers import LearnerHandle
from rft.loops.offline import OfflineLoop
from rft.loops.saver import Saver
from rft.metrics import Progress
from rft.plan import Plan
from rft.preflight.data import is_finished, warm_start_data, warm_start_folder, warm_start_groups
from rft.utils.files import folder_atomic

WARM_START_FOLDER = "warm-start"  # in a run's folder: checkpoints of a stage that is not finished


async def warm_start(
    plan: Plan,
    stage: WarmStartConfig,
    start_learner: Callable[[LearnerSpec], LearnerHandle],
    progress: Progress,
    run: Path,
    stop: asyncio.Event,
) -> str:
    """Train on demonstrations, unless the cache has the result; returns the folder of the resulting model.

    A requested stop leaves a checkpoint in the run's folder, from which the same run continues, and raises
    RunStopped.
    """
    config = plan.config
    folder = warm_start_folder(config, stage, plan.model)
    partial = run / WARM_START_FOLDER
    if is_finished(folder):
        shutil.rmtree(partial, ignore_errors=True)
        progress.note(f"warm start: reused from {folder}")
        return str(folder)
    data = warm_start_data(config, stage)
    groups = warm_start_groups(config, data, plan.tokenizer).groups
    rows, draws = [group.prompt for group in groups], stage.steps * stage.batch_size
    source = GroupSampler(groups, config.seed, sampler=mixture_sampler(data, rows, config.seed, draws))
    spec = replace(
        plan.learner_spec(),
        algorithm=SFT(),
        config=plan.learner_config(stage.learner),
        train=TrainConfig(steps=stage.steps, batch_size=stage.batch_size),
        max_gap_mean=None,
        max_gap=None,
        expects_fresh=False,
    )
    learner = start_learner(spec)
    on_a_stop = config.checkpoint.model_copy(update={"every": 0, "keep": 1})
    saves = config.model_copy(update={"checkpoint": on_a_stop})
    title = f"{config.name}: warm start"
    with Progress(stage.steps, title, display=config.tracking.display) as stage_progress:
        loop = OfflineLoop(
            learner,
            source,
            stage.steps,
            stage.batch_size,
            share_prefix=False,
            progress=stage_progress,
            saver=Saver(learner, partial, saves, stage_progress, None),
            save_last=False,
            stage="warm start",
            stop=stop,
        )
        await loop.run(checkpoint.latest(partial))
    with folder_atomic(folder, shared=True) as temporary:  # a stop waits for it: this saves the stage
        await learner.export(str(temporary))
    shutil.rmtree(partial, ignore_errors=True)
    learner.kill()
    return str(folder)
