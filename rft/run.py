"""A run from plan to final model: starts the parts, hands them to the loop, ends them all."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rft import runfolder
from rft.checkpoint import CheckpointError
from rft.config import Config
from rft.controller import Controller, Parts
from rft.errors import EngineError
from rft.learner.learner import LearnerSpec
from rft.learner.parallel.group import LearnerGroup
from rft.metrics import Progress, RunLog
from rft.offline import RunStopped
from rft.offline_eval import Sampled
from rft.offline_run import train_offline
from rft.plan import Plan, threads_for
from rft.remote import ActorDied, Overdue, call, kill, on_head_death, ray_cluster
from rft.rewards import RewardRunner
from rft.rollout.fleet import Fleet
from rft.rollout.pool import RolloutPool
from rft.runfolder import RunFolder
from rft.sync import files
from rft.sync.channel import PushChannel
from rft.sync.ipc import ColocatedChannel
from rft.twin import Twin
from rft.warm_start import warm_start

R = TypeVar("R")

DONE, FAILED, USER_ERROR, STOPPED, FAULT = 0, 1, 2, 75, 76


def train(plan: Plan, folder: RunFolder) -> int:
    """Carry out a plan in a claimed folder; returns the exit code."""
    runfolder.write_config(folder.path, plan.config)
    config = plan.config
    progress = Progress(config.train.steps, config.name, display=config.tracking.display)
    with progress:
        progress.stage("starting Ray")
        try:
            with ray_cluster(config.ray.address, config.ray.object_store_gib):
                return asyncio.run(_train(plan, folder, progress))
        except RunStopped as stopped:
            progress.note(f"{stopped} with a checkpoint saved; the same command goes on from there")
            return STOPPED


async def _train(plan: Plan, folder: RunFolder, progress: Progress) -> int:
    config = plan.config
    stop = asyncio.Event()
    _on_signals(stop, progress)
    if config.warm_start is not None:
        progress.stage("warm start")
        start = partial(start_learner, plan)
        plan = plan.with_model(await warm_start(plan, start, progress, folder.path, stop))
    log = RunLog(
        folder.path,
        config.train.steps,
        config.tracking,
        resumed_at=folder.resumed_at,
        config=config.to_dict(),
    )
    on_head_death(lambda name: _end_with_ray(name, log, progress))
    reason = "failed"
    try:
        body = _online if config.algorithm.online else _offline
        result = await body(plan, folder, progress, log, stop)
        runfolder.write_result(folder.path, {"steps": config.train.steps, **result})
        reason = "done"
    except RunStopped as stopped:
        reason = "stopped"
        log.event("run/stopped", step=stopped.step)
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        log.event("run/failed", error=reason, traceback=traceback.format_exc())
        raise
    finally:
        log.close(reason)
        files.remove(plan.channel_spec().folder)
    progress.note(f"done: {folder.path}")
    return DONE


def _end_with_ray(name: str, log: RunLog, progress: Progress) -> None:
    """Without its head Ray can neither be asked nor shut down: say so, kill what is left, and go."""
    import psutil

    what = f"Ray's {name} died; every actor is lost with it"
    log.event("fault/ray", part=name, what=what, action="the run ends; the last checkpoint is sound")
    log.close(what)
    progress.close()
    print(f"rft: failed: {what}", file=sys.stderr, flush=True)
    for process in psutil.Process().children(recursive=True):
        kill(process.pid)
    os._exit(FAULT)


def _on_signals(stop: asyncio.Event, progress: Progress) -> None:
    """The first Ctrl-C or SIGTERM asks for a checkpoint and an end; a second one is not waited for."""

    def ask(name: str) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        progress.note(f"{name}: finishing the step and saving a checkpoint (again: stop at once)")
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask, number.name)


async def _online(
    plan: Plan, folder: RunFolder, progress: Progress, log: RunLog, stop: asyncio.Event
) -> dict[str, Any]:
    config = plan.config
    pool, twin = make_pool(plan), None
    rewards = RewardRunner(config.rewards, Path.cwd(), config.train.steps)
    try:
        progress.stage(f"starting {config.rollout.replicas} x {plan.engine} and the learner")
        learner = start_learner(plan, learner_spec(plan))
        channel = make_channel(plan, learner, pool)
        ready = call(learner.describe.remote(), config.rollout.start_timeout_s, "starting the learner")
        starting = asyncio.gather(start_engines(channel, pool), rewards.start(), ready)
        _, _, facts = await unless_stopped(starting, stop)
        progress.note(f"learner: {facts['parameters']:,} parameters on {facts['device']}")
        await call(learner.require_folder.remote(str(folder.path)), 60, "looking for the run folder")
        twin = await _twin(plan, folder, log, progress, stop) if config.algorithm.copies == 2 else None
        parts = Parts(learner, pool, channel, rewards, log, progress, twin)
        controller = Controller(plan, parts, folder.checkpoints, stop=stop)
        result = await controller.run(folder.resume)
        await channel.before_step()
        await call(learner.export.remote(str(folder.path / "model")), 600, "exporting the final model")
        if twin is not None:
            await twin.export(folder.path / "model-second")
            await twin.fleet.channel.close()
        await channel.close()
        return result
    finally:
        await rewards.close()
        await pool.close()
        if twin is not None:
            await twin.fleet.pool.close()


async def _twin(plan: Plan, folder: RunFolder, log: RunLog, progress: Progress, stop: asyncio.Event) -> Twin:
    """The second copy of the model, started."""
    config, pool = plan.config, make_pool(plan)
    progress.stage(f"starting {config.rollout.replicas} x {plan.engine} and the learner of the second copy")
    learner = start_learner(plan, learner_spec(plan))
    try:
        await unless_stopped(pool.start(), stop)
    except BaseException:
        await pool.close()
        raise
    fleet = Fleet(pool, make_channel(plan, learner, pool), config.rollout, log, progress)
    return Twin(learner, fleet, config, folder.path / "checkpoints-second")


async def _offline(
    plan: Plan, folder: RunFolder, progress: Progress, log: RunLog, stop: asyncio.Event
) -> dict[str, Any]:
    progress.stage("starting the learner")
    learner = start_learner(plan, learner_spec(plan))
    async with _sampling(plan, learner, log, progress) as generate:
        result = await train_offline(plan, folder, learner, progress, log, stop, generate)
    await call(learner.export.remote(str(folder.path / "model")), 600, "exporting the final model")
    return result


@asynccontextmanager
async def _sampling(
    plan: Plan, learner: Any, log: RunLog, progress: Progress
) -> AsyncIterator[Sampled | None]:
    """Engines and rewards for the evaluation of an offline run; None where it asks for none."""
    if plan.eval_prompts is None:
        yield None
        return
    config = plan.config
    pool, rewards = make_pool(plan), RewardRunner(config.rewards, Path.cwd(), config.train.steps)
    try:
        progress.stage(f"starting {config.rollout.replicas} x {plan.engine}")
        channel = make_channel(plan, learner, pool)
        await asyncio.gather(start_engines(channel, pool), rewards.start())
        await channel.connect()
        await channel.before_step()
        yield Sampled(plan, pool, channel, rewards, log)
        await channel.close()
    finally:
        await rewards.close()
        await pool.close()


async def unless_stopped(work: Awaitable[R], stop: asyncio.Event) -> R:
    """Await `work`, or raise RunStopped as soon as a stop is asked for: a start can take minutes, and
    there is nothing to save yet."""
    doing, asked = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait((doing, asked), return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if not doing.done():
        doing.cancel()
        raise RunStopped(0)
    return doing.result()


# -- the parts -----------------------------------------------------------------------------------------


def learner_spec(plan: Plan) -> LearnerSpec:
    """What the learner is built from."""
    config = plan.config
    mean, largest = plan.gap_bounds()
    return LearnerSpec(
        model=plan.model,
        tokenizer=config.model.tokenizer or plan.model,
        algorithm=config.algorithm,
        config=config.learner,
        device=plan.device,
        threads=threads_for(config.learner.threads, config.learner.cores),
        seed=config.seed,
        total_steps=config.train.steps,
        num_iterations=config.train.num_iterations,
        minibatches=config.train.minibatches,
        max_completion_length=config.rollout.sampling.max_completion_length,
        temperature=config.rollout.sampling.temperature if config.algorithm.online else 1.0,
        max_gap_mean=mean,
        max_gap=largest,
        expects_fresh=config.algorithm.online and config.rollout.staleness == 0,
        trust_remote_code=config.model.trust_remote_code,
        reference=config.model.reference,
        reference_cached=config.learner.reference_logps == "cached",
        texts=reward_texts(config),
    )


def reward_texts(config: Config) -> dict[str, Any] | None:
    """How a reward model's texts are rendered, for whoever scores with it; None for other models."""
    if not config.algorithm.score_heads:
        return None
    names = {"system", "chat_template", "chat_template_options", "train_on"}
    return {"kind": config.algorithm.data, "data": config.data.model_dump(mode="json", include=names)}


def start_learner(plan: Plan, spec: LearnerSpec) -> LearnerGroup:
    """Start the learner's ranks; they load the model at once."""
    return LearnerGroup(spec, plan.channel_spec())


def make_pool(plan: Plan) -> RolloutPool:
    """The rollout replicas, not started yet."""
    rollout = plan.config.rollout
    return RolloutPool(
        [plan.engine_spec()] * rollout.replicas,
        cpus=0,
        gpus=rollout.tensor_parallel * plan.channel_spec().gpu_share if plan.device == "cuda" else 0,
        start_timeout_s=rollout.start_timeout_s,
        generate_timeout_s=rollout.generate_timeout_s,
    )


async def start_engines(channel: PushChannel, pool: RolloutPool) -> None:
    """Start the replicas, on devices that are free for them."""
    await channel.before_start()
    await pool.start()


def make_channel(plan: Plan, learner: Any, pool: RolloutPool) -> PushChannel:
    """The way of the weights from the learner to the replicas, not connected yet."""
    config, spec = plan.config, plan.channel_spec()
    kind = ColocatedChannel if spec.colocated else PushChannel
    return kind(learner, pool, spec, config.rollout.update, config.sync.timeout_s)


def report_failure(error: BaseException) -> int:
    """Tell a failure on stderr, with its traceback; returns the exit code: FAULT where a part of the
    machine failed, so that the same command may well succeed, FAILED for all else."""
    from ray.exceptions import RayError

    traceback.print_exception(error, file=sys.stderr)
    print(f"rft: failed: {type(error).__name__}: {error}", file=sys.stderr)
    of_the_machine = ActorDied | EngineError | Overdue | CheckpointError | RayError
    return FAULT if isinstance(error, of_the_machine) else FAILED
