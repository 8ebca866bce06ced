"""The online loop: rollout -> reward -> advantages -> step -> push -> log -> save.

The controller owns order and nothing else. It is one asyncio loop: a task per prompt in flight, and
the loop below that trains whenever the slot buffer gives a batch. `staleness` 0 is synchronous, more
is asynchronous; the code is the same.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rft.algorithms.base import Algorithm
from rft.batch import Batch, Group
from rft.checkpoint import Checkpoint
from rft.config import Config
from rft.data import Sampler
from rft.evaluation import evaluate, judge
from rft.metrics import Progress, RunLog
from rft.metrics.guards import Guards, GuardStop
from rft.offline import RunStopped
from rft.packing import shares_prefix
from rft.plan import Plan
from rft.remote import call
from rft.rewards import RewardRunner
from rft.rollout.engine import EngineError, Generated, Request, Sampling
from rft.rollout.group import sample_group
from rft.rollout.pool import ReplicaDied, RolloutPool
from rft.rollout.sampling import derive_seed
from rft.rollout.slots import SlotBuffer, Work
from rft.step_metrics import age_metrics, batch_metrics, sample_rows, scored_group, train_rows
from rft.sync.channel import PushReport, WeightChannel


@dataclass
class Parts:
    """The live parts of an online run."""

    learner: Any  # Ray handle of a LearnerActor
    pool: RolloutPool
    channel: WeightChannel
    rewards: RewardRunner
    log: RunLog
    progress: Progress


@dataclass
class Controller:
    """One online run. `step` counts finished training steps and equals the policy's version."""

    plan: Plan
    parts: Parts
    checkpoints: Path
    step: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        config = self.config
        assert self.plan.train_prompts is not None
        self.prompts = self.plan.train_prompts.prompts
        self.sampler = Sampler(len(self.prompts), config.seed, shuffle=config.data.shuffle)
        self.slots = SlotBuffer(config.train.batch_size, config.rollout.staleness)
        # A policy gradient's loss is around zero by construction: a jump of it says nothing.
        watched = config.guards.model_copy(update={"loss_spike": "off"})
        self.guards = Guards(watched, staleness=config.rollout.staleness)
        self.redo: list[tuple[int, int]] = []  # handed out before an interruption, not yet trained on
        self.restarts = 0
        self.saved_at = -1
        self._wake = asyncio.Event()
        self._recovering = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._fault: BaseException | None = None
        self._reward_seconds = 0.0
        self._filtered = 0

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def algorithm(self) -> Algorithm:
        return self.config.algorithm

    # -- the loop ----------------------------------------------------------------------------------

    async def run(self, resume: Checkpoint | None) -> dict[str, float]:
        """Train to the end; returns the last evaluation. Raises RunStopped after a requested stop."""
        last: dict[str, float] = {}
        if resume is not None:
            await self._restore(resume)
        await self.parts.channel.connect()
        await self._push()  # always: an engine loads from disk, the learner may have been restored
        try:
            if self.step == 0:
                last = await self._log_start()
            while self.step < self.config.train.steps:
                self._check_stop()
                last = await self._one_step() or last
            await self._save()
            return last
        except (RunStopped, GuardStop):
            await self._save()
            raise
        finally:
            await self._cancel_rollouts()

    async def _log_start(self) -> dict[str, float]:
        """Step 0: the untrained policy."""
        metrics = await self._evaluate()
        self.parts.log.log(0, metrics)
        self.parts.progress.update(0, metrics)
        return metrics

    async def _one_step(self) -> dict[str, float]:
        """One training step; returns the evaluation's metrics where there was one."""
        begin = time.perf_counter()
        self._hand_out()
        works = await self._next_works()
        waited = time.perf_counter() - begin
        reward_metrics = self.parts.rewards.take_metrics()
        age = [self.step - w.version for w in works]
        batch = self._build([w.group for w in works if w.group is not None])
        trained = await self._ask_learner("step", batch, self.step)
        self.step += 1
        report = await self._push()
        metrics = {
            **trained,
            **reward_metrics,
            **batch_metrics(works, batch),
            **age_metrics(age),
            **self._slot_metrics(),
            **report.metrics,
            "group/filtered": float(self._filtered),
            "time/rollout": waited,
            "time/reward": self._reward_seconds,
            "time/sync": report.seconds,
            "time/step": time.perf_counter() - begin,
        }
        self._reward_seconds, self._filtered = 0.0, 0
        tokens = float(batch.mask.sum())
        metrics["throughput/tokens_per_s"] = tokens / metrics["time/step"]
        metrics["throughput/samples_per_s"] = batch.num_sequences / metrics["time/step"]
        due = self.config.eval.every and self.step % self.config.eval.every == 0
        evaluation = await self._evaluate() if due or self.step == self.config.train.steps else {}
        metrics |= evaluation
        self.slots.acknowledge()
        self.parts.log.log(self.step, metrics)
        self.parts.log.samples(self.step, train_rows(works))
        self.parts.progress.update(self.step, metrics)
        if self.config.checkpoint.every and self.step % self.config.checkpoint.every == 0:
            await self._save()  # after the log: a kill in between repeats the step, its line is set aside
        self._watch(metrics)
        return evaluation

    def _watch(self, metrics: dict[str, float]) -> None:
        """Let the guards look at the step. Raises GuardStop where the config says to stop."""
        for finding in self.guards.observe(self.step, metrics):
            self.parts.log.event(f"guard/{finding.guard}", **finding.fields())
            self.parts.progress.note(finding.message)
            if finding.action == "stop":
                raise GuardStop(finding)

    def _build(self, groups: list[Group]) -> Batch:
        share = shares_prefix(groups, self.config.learner.prefix_sharing, self.plan.shape.hidden)
        return Batch.build(groups, share_prefix=share)

    # -- rollouts ----------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Give every free slot a prompt; first those that an interrupted run had handed out."""
        while self.slots.free:
            if self.redo:
                key = self.redo.pop(0)
            else:
                (row,) = self.sampler.next(1)
                key = (self.sampler.epoch, row)
            work = self.slots.lease(key, self.prompts[key[1]])
            self._spawn(work)

    def _spawn(self, work: Work) -> None:
        self.slots.dispatch(work, self.step)
        task = asyncio.create_task(self._serve(work))
        self._tasks.add(task)
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None and self._fault is None:
            self._fault = task.exception()
        self._wake.set()

    async def _serve(self, work: Work) -> None:
        """Sample and score one prompt's group, on another replica if the first one dies."""
        c = self.config.rollout.sampling
        sampling = Sampling(
            n=self.config.train.num_generations,
            max_tokens=c.max_completion_length,
            temperature=c.temperature,
            stop=c.stop,
            seed=derive_seed(self.config.seed, *work.key, work.version),
        )
        progress = self.step / max(self.config.train.steps, 1)
        plan = self.algorithm.rollouts(
            sampling.n, progress=progress, demonstration=bool(work.prompt.columns.get("completion"))
        )
        name = f"train-{work.ticket}"
        sampled = await sample_group(self.generate, name, work.prompt, plan, sampling, self.plan.tokenizer)
        begin = time.perf_counter()
        judged = await judge(work.prompt, sampled.completions, self.parts.rewards, progress)
        self._reward_seconds = max(self._reward_seconds, time.perf_counter() - begin)
        self._settle(work, scored_group(judged, sampled.trained))

    def _settle(self, work: Work, group: Group) -> None:
        """A scored group enters the step, or is dropped and replaced by another prompt."""
        rewards = [c.reward for c in group.completions if c.reward is not None]
        if len(rewards) < max(self.algorithm.min_generations, 1):
            reason = "unjudged"
        elif not self.algorithm.keep_group(rewards):
            reason = "filtered"
            self._filtered += 1
            limit = self.config.train.max_filtered * self.config.train.batch_size
            if self._filtered > limit:
                raise RuntimeError(
                    f"{self._filtered} groups in a row of step {self.step + 1} carried no signal "
                    f"(train.max_filtered allows {limit}): the task is too easy or too hard for this policy"
                )
        else:
            self.slots.score(work, group)
            return
        self.slots.drop(work, reason)
        self.parts.log.event("group/dropped", prompt=work.prompt.id, reason=reason)
        self._hand_out()

    async def generate(self, request: Request) -> list[Generated]:
        """Complete a request, rebuilding dead replicas on the way."""
        attempt = 0
        while True:
            try:
                name = request.id if attempt == 0 else f"{request.id}-again-{attempt}"
                return await self.parts.pool.generate(replace(request, id=name))
            except ReplicaDied as error:
                attempt += 1
                await self._recover(error)

    async def _next_works(self) -> list[Work]:
        """Wait until a batch of scored works is there. Raises what any of the tasks raised."""
        while True:
            if self._fault is not None:
                raise self._fault
            self._check_stop()
            works = self.slots.take(self.step)
            if works is not None:
                return works
            self._wake.clear()
            waiters = [asyncio.ensure_future(e.wait()) for e in (self._wake, self.stop)]
            await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
            for waiter in waiters:
                waiter.cancel()

    async def _cancel_rollouts(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- weights -----------------------------------------------------------------------------------

    async def _push(self) -> PushReport:
        """Push the current version to every engine; engines whose update failed are rebuilt."""
        while True:
            try:
                report = await self.parts.channel.push(self.step)
            except EngineError as error:
                index = error.index if isinstance(error, ReplicaDied) else 0
                await self._recover(ReplicaDied(index, str(error)), everyone=True)
                continue
            self.parts.log.event(
                "version/pushed", version=report.version, seconds=report.seconds, bytes=report.bytes
            )
            return report

    async def _recover(self, error: ReplicaDied, *, everyone: bool = False) -> None:
        """Rebuild dead replicas and give them the current version; `everyone` after a push that
        failed half-way, which leaves every engine unusable. Raises EngineError past `max_restarts`."""
        pool = self.parts.pool
        known = pool.generation
        async with self._recovering:
            if pool.generation != known:
                return  # somebody else has rebuilt it in the meantime
            indices = range(len(pool.specs)) if everyone else [error.index]
            self.restarts += 1
            limit = self.config.rollout.max_restarts
            if self.restarts > limit:
                raise EngineError(
                    f"{error}. Rebuilt {limit} times already (rollout.max_restarts): giving up."
                ) from error
            self.parts.progress.note(f"{error}; building it anew ({self.restarts} of {limit})")
            self.parts.log.event("engine/lost", engine=error.index, reason=str(error))
            begin = time.perf_counter()
            for index in indices:
                await pool.rebuild(index)
            await self.parts.channel.connect()
            if not everyone:  # a failed push is repeated by the caller
                await self.parts.channel.push(self.step)
            self.parts.log.event(
                "engine/rebuilt",
                engine=error.index,
                version=self.step,
                seconds=time.perf_counter() - begin,
            )

    async def _ask_learner(self, method: str, *args: Any) -> Any:
        reference = getattr(self.parts.learner, method).remote(*args)
        seconds = self.config.learner.step_timeout_s
        return await call(reference, seconds, f"{method} on the learner at step {self.step}")

    # -- evaluation, saving, stopping ----------------------------------------------------------------

    async def _evaluate(self) -> dict[str, float]:
        """Held-out accuracy of the current version; {} where evaluation is off."""
        held_out = self.plan.eval_prompts
        if held_out is None:
            return {}
        begin = time.perf_counter()
        metrics, judged = await evaluate(
            self,
            self.parts.rewards,
            self.plan.tokenizer,
            held_out.prompts,
            self.config.eval,
            primary=self.config.rewards.functions[0].label,
            max_tokens=self.config.rollout.sampling.max_completion_length,
            seed=self.config.seed,
            label=f"eval-{self.step}",
        )
        self.parts.rewards.take_metrics()  # the held-out scores are no part of the next step's
        metrics["time/eval"] = time.perf_counter() - begin
        self.parts.log.event(
            "eval/done", step=self.step, accuracy=metrics["eval/accuracy"], seconds=metrics["time/eval"]
        )
        self.parts.log.samples(self.step, [row for j in judged for row in sample_rows(j, "eval")])
        return metrics

    async def _save(self) -> float:
        """Save a checkpoint of this step, once; returns the seconds that it took."""
        if self.saved_at == self.step:
            return 0.0
        begin = time.perf_counter()
        meta = {
            "step": self.step,
            "sampler": self.sampler.state_dict(),
            "outstanding": self.slots.outstanding() + self.redo,
            "counts": dict(self.slots.counts),
        }
        keep = self.config.checkpoint.keep
        path = await self._ask_learner("save", str(self.checkpoints), self.step, keep, meta)
        self.saved_at = self.step
        seconds = time.perf_counter() - begin
        self.parts.log.event("checkpoint/saved", step=self.step, path=path, seconds=seconds)
        return seconds

    async def _restore(self, found: Checkpoint) -> None:
        self.step = await self._ask_learner("restore", str(found.path))
        self.sampler.load_state_dict(found.meta["sampler"])
        self.redo = [(epoch, row) for epoch, row in found.meta["outstanding"]]
        self.slots.counts.update(found.meta["counts"])
        self.saved_at = self.step
        self.parts.log.event("checkpoint/restored", step=self.step, path=str(found.path))
        self.parts.progress.note(f"resumed at step {self.step} from {found.path}")

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise RunStopped(self.step)

    def _slot_metrics(self) -> dict[str, float]:
        dropped = {k: v for k, v in self.slots.counts.items() if k.startswith("dropped/")}
        return {
            "data/epoch": float(self.sampler.seen) / self.sampler.size,
            "data/prompts": float(self.sampler.seen),
            "data/dropped": float(sum(dropped.values())),
            **{f"data/{name}": float(count) for name, count in dropped.items()},
            "engine/restarts": float(self.restarts),
        }
