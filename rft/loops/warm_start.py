"""The supervised stage before a run. Its result is cached by all that it depends on."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rft import checkpoint
from rft.algorithms.supervised.sft import SFT
from rft.config.schema import TrainConfig, WarmStartConfig
from rft.data import GroupSampler, load_groups
from rft.learner.spec import LearnerSpec
from rft.learner.workers import LearnerHandle
from rft.loops.offline import OfflineLoop
from rft.metrics import Progress
from rft.plan import Plan
from rft.preflight.data import is_finished, warm_start_data, warm_start_folder

WARM_START_FOLDER = "warm-start"  # in a run's folder: checkpoints of a stage that is not finished


def _spec(plan: Plan, stage: WarmStartConfig) -> LearnerSpec:
    return replace(
        plan.learner_spec(),
        algorithm=SFT(),
        config=stage.learner,
        train=TrainConfig(steps=stage.steps, batch_size=stage.batch_size),
        max_gap_mean=None,
        max_gap=None,
        expects_fresh=False,
    )


async def warm_start(
    plan: Plan,
    stage: WarmStartConfig,
    start_learner: Callable[[LearnerSpec], LearnerHandle],
    progress: Progress,
    run: Path,
    stop: asyncio.Event,
) -> str:
    """Train on demonstrations, or find it done; returns the folder of the resulting model.

    The folder appears by a rename, so that a stage
    that was cut short is never taken for a finished one. A requested stop leaves a checkpoint in
    the run's folder, from which the same run goes on, and raises RunStopped.
    """
    config = plan.config
    folder = warm_start_folder(config, stage, plan.model)
    partial = run / WARM_START_FOLDER
    if is_finished(folder):
        shutil.rmtree(partial, ignore_errors=True)
        progress.note(f"warm start: found in {folder}")
        return str(folder)
    groups = load_groups(warm_start_data(config, stage), plan.tokenizer, "sft").groups
    learner = start_learner(_spec(plan, stage))
    with Progress(stage.steps, f"{config.name}: warm start", display=config.tracking.display) as own:
        loop = OfflineLoop(
            learner,
            GroupSampler(groups, config.seed),
            stage.steps,
            stage.batch_size,
            share_prefix=False,
            progress=own,
            checkpoints=partial,
            save_last=False,
            stage="warm start",
            stop=stop,
        )
        await loop.run(checkpoint.latest(partial))
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    # A stop waits for it: this is what saves the stage.
    await learner.export(str(temporary))
    if folder.exists():
        shutil.rmtree(temporary)  # another run was faster
    else:
        temporary.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)
    learner.kill()
    return str(folder)
