"""A run from config to final model: claim the folder, start the parts, run the loop, end them all."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ray.exceptions import RayError

from rft import checkpoint, run_dir
from rft.config.schema import Config
from rft.environments.sources import Environments
from rft.environments.types import EnvironmentFault
from rft.errors import CheckpointError, EngineError, RunStopped, TransferError
from rft.learner.spec import LearnerSpec
from rft.learner.workers import LearnerGroup, LearnerHandle
from rft.loops.evaluate import SampledEvaluation
from rft.loops.offline import train_offline
from rft.loops.online import Controller, Parts
from rft.loops.warm_start import WARM_START_FOLDER, warm_start
from rft.metrics import Progress, RunLog
from rft.metrics.log import Observer
from rft.plan import OfflinePlan, OnlinePlan, Plan, make_plan
from rft.rewards import RewardError
from rft.rewards.runner import RewardRunner
from rft.rollout.fleet import Fleet
from rft.rollout.hooks import LoopHooks
from rft.rollout.pool import RolloutPool
from rft.run_dir import RunFolder
from rft.sync import files
from rft.sync.channel import WeightChannel
from rft.sync.ipc import ColocatedChannel
from rft.utils.actors import ActorDied
from rft.utils.deadlines import Deadline, Overdue, unless_stopped
from rft.utils.dotted import load_dotted
from rft.utils.files import folder_atomic
from rft.utils.process import kill_tree
from rft.utils.ray_cluster import on_head_death, ray_cluster
from rft.utils.signals import STOPPED, StopRequests, print_stop
from rft.utils.terminal import say

TEACHER, TEACHER_OF_ROWS = "rft.contrib.teacher.hooks_of", "rft.contrib.teacher.with_teacher"
DONE, FAILED, USER_ERROR, FAULT = 0, 1, 2, 76
# Raised here when another process dies: a stop signal may have reached that one as well.
_OF_ANOTHER_PROCESS = (
    ActorDied, EngineError, EnvironmentFault, Overdue, RayError, RewardError, TransferError
)  # fmt: skip


def run(
    config: Config,
    resume: str,
    stops: StopRequests,
    observers: Sequence[Observer] = (),
    files: Mapping[Path, bytes] | None = None,
) -> int:
    """Claim the config's run folder and train in it; returns the exit code.

    resume: auto, never, or a checkpoint's folder. files: data that the config names, written into the run
    folder first. Raises ConfigError before anything is started, and the error that ends the run.
    """
    with run_dir.hold(config) as warning:
        config = run_dir.keep_dtypes(config, resume)
        folder = run_dir.claim(config, resume)
        for text in filter(None, (warning, *folder.notes)):
            say(f"rft: {text}")
        if folder.finished is not None:
            say(f"rft: {folder.path} is complete: {json.dumps(folder.finished)}")
            return DONE
        with run_dir.with_files(files or {}, keep=True):
            plan = make_plan(config)
        for text in plan.memory().warnings():
            say(f"rft: warning: {text}")
        if stops.asked():
            raise RunStopped(None)
        return train(plan, folder, stops, observers)


def train(plan: Plan, folder: RunFolder, signals: StopRequests, observers: Sequence[Observer] = ()) -> int:
    """Carry out a plan in a claimed folder; returns the exit code."""
    config = plan.config
    run_dir.write_config(folder.path, config)
    progress = Progress(config.train.steps, config.name, display=config.tracking.display)
    log = RunLog(
        folder.path,
        config.train.steps,
        config.tracking,
        resumed_at=folder.resumed_at,
        config=config.to_dict(),
        observers=observers,
    )
    for rejected in folder.rejected:
        log.event("checkpoint/rejected", path=str(rejected.path), reason=rejected.reason)
    weights = plan.channel_spec().folder
    ending = Ending(folder, log, progress, signals, weights)
    if plan.dtype_choice:
        log.event("run/dtype", choice=plan.dtype_choice)
        progress.note(f"dtype: {plan.dtype_choice}")
    reason = "failed"
    try:
        with progress:
            signals.handle(at_once=ending.at_once)
            try:
                log.begin()
                progress.stage("starting Ray")
                with ray_cluster(config.ray.address, config.ray.object_store_gib):
                    asyncio.run(_train(plan, folder, progress, log, signals))
                reason = "done"
                progress.note(f"done: {folder.path}")
                return DONE
            except RunStopped as stopped:
                reason = "stopped"
                return ending.stopped(stopped)
            except asyncio.CancelledError:  # stopped at once by the program that called
                reason = "stopped"
                return ending.stopped(RunStopped(max(log.last_step, 0) or None))
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                log.event("run/failed", error=reason, traceback=traceback.format_exc())
                if isinstance(error, _OF_ANOTHER_PROCESS) and signals.asked(within=1.0):
                    return ending.stopped(RunStopped(max(log.last_step, 0) or None), reason)
                raise
    finally:
        log.close(reason)
        files.remove(weights)


async def _train(
    plan: Plan, folder: RunFolder, progress: Progress, log: RunLog, signals: StopRequests
) -> None:
    config = plan.config
    stop, loop, thread = asyncio.Event(), asyncio.get_running_loop(), threading.get_ident()
    task = asyncio.current_task()
    assert task is not None
    seconds = config.train.stop_grace_s

    def announce(reason: str) -> None:
        progress.note(
            f"{reason}: finishing the step and saving a checkpoint, within {seconds:g} s ({signals.again})"
        )
        log.event("run/stopping", signal=reason)
        stop.set()

    def request(reason: str) -> float:
        if threading.get_ident() == thread:  # a callback, between two steps: the next one must not begin
            announce(reason)
        else:
            loop.call_soon_threadsafe(announce, reason)
        return seconds

    signals.handle(request=request, cancel=lambda: loop.call_soon_threadsafe(task.cancel))
    try:
        if config.warm_start is not None:
            progress.stage("warm start")
            start = partial(start_learner, plan)
            model = await warm_start(plan, config.warm_start, start, progress, folder.path, stop)
            plan = plan.with_model(model)
        on_head_death(lambda name: _end_with_ray(name, log, progress, signals))
        if isinstance(plan, OnlinePlan):
            result = await _online(plan, folder, progress, log, stop)
        else:
            result = await _offline(plan, folder, progress, log, stop)
        run_dir.write_result(folder.path, {"steps": config.train.steps, **result})
        signals.exit_code = DONE
    finally:
        signals.handle(request=lambda reason: seconds)  # only the parts remain to be ended


@dataclass(frozen=True)
class Ending:
    """Reports how a run that was asked to stop has ended."""

    folder: RunFolder
    log: RunLog
    progress: Progress
    signals: StopRequests
    weights: str | None  # folder of weights in transfer, often in shared memory

    def stopped(self, stopped: RunStopped, error: str = "") -> int:
        """Report a tidy stop; `error`: a failure meanwhile. Returns the exit code."""
        if stopped.step is None and not stopped.stage and self.log.last_step > 0:
            stopped = RunStopped(self.log.last_step)  # in the export, or while a resumed run started
        saved = self._newest(stopped.stage)
        self.log.event("run/stopped", step=stopped.step, signal=self.signals.reason, saved=saved, error=error)
        if saved is not None and saved == stopped.step:
            outcome = "with a checkpoint saved; the same command resumes from it"
        else:
            outcome = _resumes_from(saved)
        failed = f"; meanwhile: {error}" if error else ""
        self.progress.note(f"{stopped} {outcome} (reason: {self.signals.reason}{failed})")
        return STOPPED

    def at_once(self, reason: str) -> None:
        """Report an end that waits for nothing, just before it."""
        if self.signals.exit_code == DONE:
            print_stop(f"the run is complete; its processes are ended at once ({reason})")
            return
        saved = self._newest("") or self._newest("warm start")
        step = max(self.log.last_step, 0)
        print_stop(f"stopped at once ({reason}): the step in progress is lost, {_resumes_from(saved)}")
        self.log.event("run/stopped", step=step, signal=reason, saved=saved)
        self.log.close("stopped")
        files.remove(self.weights)

    def _newest(self, stage: str) -> int | None:
        return checkpoint.newest_step(
            self.folder.path / WARM_START_FOLDER if stage else self.folder.checkpoints
        )


def _resumes_from(saved: int | None) -> str:
    if saved is None:
        return "and nothing was saved: the same command starts again from step 0"
    return f"and the checkpoint of step {saved} is complete; the same command resumes from it"


def _end_with_ray(name: str, log: RunLog, progress: Progress, signals: StopRequests) -> None:
    """End the process: without its head Ray can be neither asked nor shut down."""
    what = f"Ray's {name} died; every actor is lost with it"
    log.event("fault/ray", part=name, what=what, action="the run ends; the last checkpoint is sound")
    code = STOPPED if signals.asked(within=1.0) else FAULT  # a signal to every process may have ended it
    log.close(what)
    progress.close()
    say(f"rft: {signals.reason or 'failed'}: {what}")
    kill_tree(os.getpid())
    os._exit(code)


async def _online(
    plan: OnlinePlan, folder: RunFolder, progress: Progress, log: RunLog, stop: asyncio.Event
) -> dict[str, float]:
    config = plan.config
    hooks = LoopHooks() if config.teacher is None else await load_dotted(TEACHER)(plan, progress, stop)
    pool = make_pool(plan)
    rewards = make_rewards(config)
    environments = make_environments(config)

    async def start_policy(name: str) -> tuple[LearnerHandle, Fleet]:
        """Start a further learner with engines, for hooks that train one."""
        progress.stage(f"starting {config.rollout.replicas} x {plan.engine} and {name}")
        more = make_pool(plan)
        other = start_learner(plan, plan.learner_spec(), name)
        try:
            await unless_stopped(more.start(), stop)
        except BaseException:
            await more.close()
            raise
        return other, Fleet(more, make_channel(plan, other, more), config.rollout, log, progress)

    try:
        progress.stage(f"starting {config.rollout.replicas} x {plan.engine} and the learner")
        learner = start_learner(plan, plan.learner_spec())
        channel = make_channel(plan, learner, pool)
        starting = asyncio.gather(
            start_engines(channel, pool),
            rewards.start(),
            learner.describe(),
            start_environments(environments, rewards),
        )
        _, _, info, _ = await unless_stopped(starting, stop)
        progress.note(f"learner: {info.parameters:,} parameters on {info.device}")
        await learner.require_folder(str(folder.path))
        if config.algorithm.hooks:
            hooks = await load_dotted(config.algorithm.hooks)(config, folder.path, start_policy)
        parts = Parts(learner, pool, channel, rewards, log, progress, hooks, environments)
        result = await Controller(plan, parts, folder.checkpoints, stop=stop).run(folder.resume)
        await channel.before_step()
        await unless_stopped(export(learner, folder.path / "model"), stop)
        await unless_stopped(hooks.export(folder.path), stop)
        await channel.close()
        return result
    finally:
        await rewards.close()
        if environments is not None:
            await environments.close()
        await pool.close()
        await hooks.close()


async def _offline(
    plan: OfflinePlan, folder: RunFolder, progress: Progress, log: RunLog, stop: asyncio.Event
) -> dict[str, float]:
    config = plan.config
    if config.teacher is not None:
        plan = await load_dotted(TEACHER_OF_ROWS)(plan, progress, stop)
    progress.stage("starting the learner")
    learner = start_learner(plan, plan.learner_spec())
    async with AsyncExitStack() as parts:
        sampled = None
        if plan.eval_sets:  # engines and rewards, for the evaluation
            pool, rewards = make_pool(plan), make_rewards(config)
            parts.push_async_callback(pool.close)
            parts.push_async_callback(rewards.close)
            progress.stage(f"starting {config.rollout.replicas} x {plan.engine}")
            channel = make_channel(plan, learner, pool)
            await unless_stopped(asyncio.gather(start_engines(channel, pool), rewards.start()), stop)
            await unless_stopped(channel.connect(), stop)
            await channel.before_step()
            held_out = (plan.tokenizer, plan.eval_sets, config, log)
            sampled = SampledEvaluation(pool.generate, rewards, *held_out, channel)
        await unless_stopped(learner.describe(), stop)  # it answers once the model is loaded
        result = await train_offline(plan, folder, learner, progress, log, stop, sampled)
        if sampled is not None:
            await channel.close()
    await unless_stopped(export(learner, folder.path / "model"), stop)
    return result


async def export(learner: LearnerHandle, folder: Path) -> None:
    """Write the final model, atomically."""
    with folder_atomic(folder) as temporary:
        await learner.export(str(temporary))


# -- the parts -----------------------------------------------------------------------------------------


def start_learner(plan: Plan, spec: LearnerSpec, name: str = "the learner") -> LearnerGroup:
    """Start the learner's ranks; they load the model at once."""
    online = spec.algorithm.online
    if online:
        start_timeout_s = Deadline(plan.config.rollout.start_timeout_s, "rollout.start_timeout_s")
    else:
        start_timeout_s = Deadline(spec.config.step_timeout_s, "learner.step_timeout_s")
    return LearnerGroup(spec, plan.channel_spec(), start_timeout_s, name)


def make_rewards(config: Config) -> RewardRunner:
    """The reward functions, not started yet; without any, the environment or the held-out sets have some."""
    optional, sources = bool(config.environments or config.eval.sets), config.data.rewards_by_source
    return RewardRunner(config.rewards, Path.cwd(), config.train.steps, optional=optional, by_source=sources)


def make_environments(config: Config) -> Environments | None:
    """The environments, not started yet."""
    return Environments(config.environments, Path.cwd()) if config.environments else None


async def start_environments(environments: Environments | None, rewards: RewardRunner) -> None:
    """Load the environments, if there are some, and hand over the rewards that read them."""
    if environments is not None:
        await asyncio.gather(environments.start(), rewards.start())
        environments.call_rewards(rewards.in_environment)


def make_pool(plan: Plan) -> RolloutPool:
    """The rollout replicas, not started yet."""
    devices = plan.config.rollout.tensor_parallel * plan.channel_spec().gpu_share
    return RolloutPool(plan.engine_spec(), gpus=devices if plan.device == "cuda" else 0)


async def start_engines(channel: WeightChannel, pool: RolloutPool) -> None:
    """Start the replicas, on devices that are free for them."""
    await channel.before_start()
    await pool.start()


def make_channel(plan: Plan, learner: LearnerHandle, pool: RolloutPool) -> WeightChannel:
    """The weight channel from the learner to the replicas, not connected yet."""
    spec = plan.channel_spec()
    kind = ColocatedChannel if spec.colocated else WeightChannel
    return kind(learner, pool, spec, plan.config.rollout.update, plan.proof_spec())


def report_failure(error: BaseException) -> int:
    """Print a failure on stderr, with its traceback; returns the exit code: FAULT where a part of the
    machine failed, so that the same command may well succeed, FAILED otherwise."""
    traceback.print_exception(error, file=sys.stderr)
    say(f"rft: failed: {type(error).__name__}: {error}")
    of_the_machine = ActorDied | EngineError | Overdue | CheckpointError | RayError
    return FAULT if isinstance(error, of_the_machine) else FAILED
