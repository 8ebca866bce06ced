"""The supervised stage before a run. Its result is cached by all that it depends on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from rft.algorithms.sft import SFT
from rft.config import Config, WarmStartConfig, fingerprint
from rft.data import DataConfig, load_groups
from rft.learner.learner import LearnerSpec
from rft.metrics import Progress
from rft.offline import OfflineLoop
from rft.plan import Plan, threads_for
from rft.remote import call
from rft.tasks import source


def warm_start_folder(config: Config, model: str) -> Path:
    """Where the warm start of this config is (or will be) kept."""
    assert config.warm_start is not None
    stage = config.warm_start
    key = {
        "stage": stage.model_dump(mode="json", exclude={"cache"}),
        "data": _data(config, stage).model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "seed": config.seed,
        "code": source(),
        "loaded": model,
    }
    return Path(stage.cache) / f"warm-start-{fingerprint(key)}"


def _data(config: Config, stage: WarmStartConfig) -> DataConfig:
    return stage.data or config.data


async def warm_start(plan: Plan, start_learner: Any, progress: Progress) -> str:
    """Train on demonstrations, or find it done; returns the folder of the resulting model.

    `start_learner(spec)` starts a learner actor. The folder appears by a rename, so that a stage
    that was cut short is never taken for a finished one.
    """
    config = plan.config
    stage = config.warm_start
    assert stage is not None
    folder = warm_start_folder(config, plan.model)
    if (folder / "config.json").exists():
        progress.note(f"warm start: found in {folder}")
        return str(folder)
    groups = load_groups(_data(config, stage), plan.tokenizer, "sft").groups
    learner = start_learner(
        LearnerSpec(
            model=plan.model,
            tokenizer=config.model.tokenizer or plan.model,
            algorithm=SFT(),
            config=stage.learner,
            device=plan.device,
            threads=threads_for(stage.learner.threads, stage.learner.cores),
            seed=config.seed,
            total_steps=stage.steps,
            num_iterations=1,
            minibatches=1,
            max_completion_length=config.rollout.sampling.max_completion_length,
            temperature=1.0,
            max_gap_mean=None,
            max_gap=None,
            trust_remote_code=config.model.trust_remote_code,
        )
    )
    with Progress(stage.steps, f"{config.name}: warm start", display=config.tracking.display) as own:
        loop = OfflineLoop(
            learner,
            groups,
            stage.steps,
            stage.batch_size,
            config.seed,
            False,
            stage.learner.step_timeout_s,
            own,
        )
        await loop.run()
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    await call(learner.export.remote(str(temporary)), 600, "exporting the warm start")
    if folder.exists():
        shutil.rmtree(temporary)  # another run was faster
    else:
        temporary.rename(folder)
    import ray

    ray.kill(learner)
    return str(folder)
