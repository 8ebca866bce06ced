"""The online loop: rollout -> reward -> advantages -> step -> push -> log -> save.

The controller owns order and nothing else. It is one asyncio loop: a task per prompt in flight, and
the loop below that trains whenever the slot buffer gives a batch. `staleness` 0 is synchronous, more
is asynchronous; the code is the same.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rft.algorithms.base import Algorithm
from rft.batch import Batch, Group
from rft.checkpoint import Checkpoint
from rft.config.schema import Config
from rft.contrib.curriculum import Curriculum, pass_rate
from rft.contrib.replay import Replay
from rft.contrib.second_policy import Twin, own
from rft.data import Sampler
from rft.data.chat import Renderer
from rft.errors import BrokenWeights, CheckpointError, EngineError, LearnerError, LogpGapError, RunStopped
from rft.learner.workers import LearnerHandle
from rft.loops.evaluate import evaluate
from rft.loops.saver import Saver
from rft.metrics import Progress, RunLog
from rft.metrics import step as step_metrics
from rft.metrics.guards import Guards, GuardStop
from rft.metrics.log import METRICS_FILE, read_jsonl
from rft.metrics.phases import Phases
from rft.packing import shares_prefix
from rft.plan import OnlinePlan
from rft.rewards import RewardError
from rft.rewards.runner import RewardRunner
from rft.rollout.buffer import SlotBuffer, State, Work
from rft.rollout.engine import Sampling
from rft.rollout.fleet import Fleet
from rft.rollout.pool import RolloutPool
from rft.rollout.sample import GroupSampler
from rft.sync.channel import WeightChannel
from rft.utils.actors import ActorDied
from rft.utils.deadlines import Overdue, unless_stopped
from rft.utils.seeds import derive_seed


class NoSignal(RuntimeError):
    """Too many groups in a row without a learning signal."""


# After these the learner is whole, and what was trained since the last checkpoint is worth keeping.
SAVE_ON = (RunStopped, GuardStop, RewardError, NoSignal, EngineError, LearnerError, LogpGapError)
KEPT_DROPPED = 100_000  # dropped prompts that a checkpoint names, the newest ones


@dataclass
class Parts:
    """The live parts of an online run."""

    learner: LearnerHandle
    pool: RolloutPool
    channel: WeightChannel
    rewards: RewardRunner
    log: RunLog
    progress: Progress
    twin: Twin | None = None


@dataclass
class Controller:
    """One online run. `step` counts finished training steps and equals the policy's version."""

    plan: OnlinePlan
    parts: Parts
    checkpoints: Path
    step: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        config = self.config
        self.prompts = self.plan.train_prompts.prompts
        seed, size = config.seed, len(self.prompts)
        self.sampler: Sampler | Curriculum = (
            Sampler(size, seed, shuffle=config.data.shuffle)
            if config.train.curriculum is None
            else Curriculum(size, seed, config.train.curriculum)
        )
        waits = config.rollout.late == "wait"
        self.slots = SlotBuffer(config.train.batch_size, config.rollout.staleness, waits)
        self.guards = Guards(config.guards, config.rollout.staleness, online=True)
        parts = self.parts
        self.fleet = Fleet(parts.pool, parts.channel, config.rollout, parts.log, parts.progress)
        self.saver = Saver(parts.learner, self.checkpoints, config, parts.log, parts.progress)
        self.phases = Phases(parts.log, parts.progress)
        self._late: set[tuple[int, int]] = set()  # prompts that were handed out in vain before
        self.redo: list[tuple[int, int]] = []  # handed out before and not trained on: next in turn
        self.dropped: deque[tuple[int, int, str]] = deque(maxlen=KEPT_DROPPED)  # epoch, row, reason
        self.twin = parts.twin
        generate = self.fleet.generate if self.twin is None else self.twin.route(self.fleet)
        render = Renderer(config.data, self.plan.tokenizer)
        self.groups = GroupSampler(self.algorithm, generate, parts.rewards, render)
        self.replay = Replay(self.algorithm.replay)
        self._wake = asyncio.Event()
        self._tasks: dict[asyncio.Task[None], Work | None] = {}  # and what they sample and score
        self._fault: BaseException | None = None
        self._reward_seconds = 0.0
        self._filtered = 0  # since the last step
        self._without_signal: Counter[str] = Counter()  # groups in a row that were dropped, by reason
        self._reward_faults = 0.0
        self._measured: list[tuple[int, int, float]] = []  # ticket, row, pass rate

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def algorithm(self) -> Algorithm:
        return self.config.algorithm

    @property
    def _fleets(self) -> list[Fleet]:
        return [self.fleet] if self.twin is None else [self.fleet, self.twin.fleet]

    # -- the loop ----------------------------------------------------------------------------------

    async def run(self, resume: Checkpoint | None) -> dict[str, float]:
        """Train to the end; returns the last evaluation. Raises RunStopped after a requested stop."""
        last: dict[str, float] = {}
        await unless_stopped(self._open(resume), self.stop)
        try:
            if self.step == 0:
                last = await unless_stopped(self._log_start(), self.stop)
            self._hand_out()
            while self.step < self.config.train.steps:
                self._check_stop()
                last = await self._one_step() or last
            last = last or await self._evaluate()
            self._check_stop()
            for fleet in self._fleets:
                async with fleet.gate:
                    await fleet.prove()  # the last version: its evaluation is part of the result
            await self._save(final=True)
            return last
        except RunStopped:
            if self.step:  # before the first step there is nothing to save
                await self._save(final=True)
            raise
        except SAVE_ON as error:
            await self._save_before_the_end(error)
            raise
        except ActorDied as error:  # replicas are mended: this was the learner
            self.parts.log.event("fault/learner", part="learner", what=str(error), action="the run ends")
            raise
        finally:
            await self._cancel_rollouts()

    async def _open(self, resume: Checkpoint | None) -> None:
        """Restore the run, give the engines its version and watch their health."""
        if resume is not None:
            await self._restore(resume)
        for fleet in self._fleets:
            await fleet.open(self.step)
            self._spawn(fleet.watch_health())

    async def _log_start(self) -> dict[str, float]:
        """Step 0: the untrained policy."""
        metrics = await self._evaluate()
        self.parts.log.log(0, metrics)
        self.parts.progress.update(0, metrics)
        return metrics

    async def _one_step(self) -> dict[str, float]:
        """One training step; returns the evaluation's metrics where there was one."""
        begin = time.perf_counter()
        with self.phases("rollout", self.step):
            works = await self._next_works()
        waited = time.perf_counter() - begin
        reward_metrics = self.parts.rewards.take_metrics()
        self._reward_faults, fault = step_metrics.reward_faults(reward_metrics, self._reward_faults)
        if fault:
            self.parts.log.event("fault/reward", **fault)
        age = [self.step - w.version for w in works]
        groups = self.replay.mix([w.group for w in works if w.group is not None])
        batch = self._build(groups if self.twin is None else own(groups, 0))
        async with self.fleet.gate:
            with self.phases("train", self.step):
                trained = await self._train(works, batch)
            self.step += 1
            with self.phases("sync", self.step):
                report = await self.fleet.push(self.step)
        self.fleet.progressed()
        if self.twin is not None:
            trained |= await self.twin.step(self._build(own(groups, 1)), self.step - 1)
        seconds = time.perf_counter() - begin
        found = {
            **trained,
            **reward_metrics,
            **step_metrics.slot_metrics(self.slots, self.sampler),
            **self.fleet.metrics(),
            **report.metrics,
            "group/filtered": float(self._filtered),
            "time/rollout": waited,
            "time/reward": self._reward_seconds,
            "time/checkpoint": self.saver.take_seconds(),
            "time/step": seconds,
        }
        self._reward_seconds, self._filtered = 0.0, 0
        due = self.config.eval.every and self.step % self.config.eval.every == 0
        evaluation = await self._evaluate() if due or self.step == self.config.train.steps else {}
        self._end_step(works, age)
        await asyncio.sleep(0)  # the next requests go out; the rest is done while engines sample
        batch_found = step_metrics.batch_metrics(works, batch, seconds)
        metrics = {**found, **batch_found, **step_metrics.age_metrics(age), **evaluation}
        self.parts.log.log(self.step, metrics)
        self.parts.log.samples(self.step, step_metrics.train_rows(works))
        self.parts.progress.update(self.step, metrics)
        for message in await self.parts.learner.pop_messages():
            self.parts.progress.note(message)
        if self.config.checkpoint.every and self.step % self.config.checkpoint.every == 0:
            await self._save()  # after the log: a kill in between repeats the step, its line is set aside
        await self.saver.poll()
        self._watch(metrics)
        return evaluation

    async def _train(self, works: list[Work], batch: Batch) -> dict[str, float]:
        """The learner's step on works that were taken for it. Until it is done they are not trained on: a
        checkpoint that is saved because the step failed still names them."""
        try:
            await self.fleet.before_step()
            return await self.parts.learner.step(batch, self.step)
        except BaseException:
            self.slots.put_back(works)
            self.replay.take_back()
            raise

    def _end_step(self, works: list[Work], ages: list[int]) -> None:
        """Free the slots of a step that all engines have the outcome of, and start on the next prompts
        while this step is being written down."""
        self.slots.acknowledge()
        keys = [list(w.key) for w in works]
        self.parts.log.event("group/trained", step=self.step, prompts=keys, ages=ages)
        if isinstance(self.sampler, Curriculum):  # in ticket order: arrival must not matter
            for _, row, rate in sorted(self._measured):
                self.sampler.observe(row, rate)
        self._measured.clear()
        self._drop_late()
        self._hand_out()

    def _drop_late(self) -> None:
        """Give up groups that the next step may not be trained on any more; each prompt gets a second try."""
        late = dict.fromkeys(self.slots.too_old(self.step))
        for task, work in self._tasks.items():
            if work in late:
                task.cancel()
        for work in late:
            again = work.key not in self._late
            self._drop(work, "too_old", again)
            if again:
                self._late.add(work.key)
                self.redo.append(work.key)

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
        """Give free slots prompts, as far as the run's last step needs any; first those that were handed
        out before, by an interrupted run or in vain."""
        needed = (self.config.train.steps - self.step) * self.slots.batch
        version = min(fleet.held for fleet in self._fleets)
        while self.slots.free and len(self.slots.live) < needed:
            if self.redo:
                key = self.redo.pop(0)
            else:
                (row,) = self.sampler.next(1)
                key = (self.sampler.epoch, row)
            work = self.slots.lease(key, self.prompts[key[1]])
            self.slots.dispatch(work, version)
            self._spawn(self._serve(work), work)

    def _spawn(self, body: Coroutine[Any, Any, None], work: Work | None = None) -> None:
        task = asyncio.create_task(body)
        self._tasks[task] = work
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
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
        name = f"train-{work.ticket}"
        group, seconds = await self.groups.sample(work.prompt, sampling, name, work.version, progress)
        self._reward_seconds = max(self._reward_seconds, seconds)
        self._settle(work, group)

    def _settle(self, work: Work, group: Group) -> None:
        """A scored group enters the step, or is dropped and replaced by another prompt."""
        if work.state is State.dropped:
            return
        rewards = [c.reward for c in group.completions if c.reward is not None]
        rate = pass_rate(group, self._primary)
        if rate is not None:
            self._measured.append((work.ticket, work.key[1], rate))
        if len(rewards) < max(self.algorithm.min_generations, 1):
            reason = "unjudged"
        elif not self.algorithm.keep_group(rewards):
            reason = "filtered"
            self._filtered += 1
        else:
            self.slots.score(work, group)
            self._without_signal.clear()
            return
        self._drop(work, reason)
        self._without_signal[reason] += 1
        self._check_signal()
        self._hand_out()

    def _check_signal(self) -> None:
        """Raise NoSignal once too many groups in a row were of no use: sampling on would never end."""
        limit = self.config.train.max_filtered * self.config.train.batch_size
        if self._without_signal.total() <= limit:
            return
        filtered, unjudged = self._without_signal["filtered"], self._without_signal["unjudged"]
        causes = []
        if filtered:
            causes.append(f"in {filtered} the rewards differ too little: the task is too easy or too hard")
        if unjudged:
            causes.append(f"in {unjudged} too few completions could be judged: see the rewards' outcomes")
        raise NoSignal(
            f"{self._without_signal.total()} groups in a row were dropped while step {self.step + 1} was "
            f"sampled ({'; '.join(causes)}). train.max_filtered allows {limit}"
        )

    def _drop(self, work: Work, reason: str, again: bool = False) -> None:
        self.slots.drop(work, reason)
        if not again:
            self.dropped.append((*work.key, reason))
        self.parts.log.event("group/dropped", prompt=list(work.key), reason=reason, again=again)

    async def _next_works(self) -> list[Work]:
        """Wait until a batch of scored works is there. Raises what any of the tasks raised."""
        while True:
            self._check_stop()  # first: a signal to every process may kill reward workers as well
            if self._fault is not None:
                raise self._fault
            done = min(self.slots.scored, self.slots.batch)
            self.parts.progress.phase("rollout", done, self.slots.batch)
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
        await asyncio.gather(*self._tasks, *(fleet.close() for fleet in self._fleets), return_exceptions=True)

    # -- evaluation, saving, stopping ----------------------------------------------------------------

    async def _evaluate(self) -> dict[str, float]:
        """Held-out accuracy of the current version; {} where evaluation is off."""
        held_out = self.plan.eval_prompts
        if held_out is None:
            return {}
        begin = time.perf_counter()
        evaluating = evaluate(
            self.fleet.generate,
            self.parts.rewards,
            self.plan.tokenizer,
            held_out.prompts,
            self.config.eval,
            primary=self._primary,
            max_tokens=self.config.rollout.sampling.max_completion_length,
            seed=self.config.seed,
            label=f"eval-{self.step}",
            progress=self.step / self.config.train.steps,
        )
        try:
            metrics, judged = await unless_stopped(evaluating, self.stop)
        except RunStopped:
            return {}  # the loop saves and ends
        metrics["time/eval"] = time.perf_counter() - begin
        self.parts.log.event(
            "eval/done", step=self.step, accuracy=metrics["eval/accuracy"], seconds=metrics["time/eval"]
        )
        self.parts.log.samples(
            self.step, [row for j in judged for row in step_metrics.sample_rows(j, "eval")]
        )
        return metrics

    async def _save(self, *, final: bool = False) -> None:
        """Save a checkpoint of this step, once; `final`: wait until it is complete."""
        meta = {
            "step": self.step,
            "sampler": self.sampler.state_dict(),
            "outstanding": self.slots.outstanding() + self.redo,
            "dropped": list(self.dropped),
            "counts": dict(self.slots.counts),
            "rewards": self.parts.rewards.state_dict(),
            "replay": self.replay.state_dict(),
        }
        if self.twin is not None:
            await self.twin.save(self.step)
        await self.saver.save(self.step, meta, final=final)

    async def _save_before_the_end(self, error: Exception) -> None:
        """Keep the steps since the last checkpoint where `error` has left the learner whole. A failure to
        save is told and does not take the error's place."""
        if not self.step:
            saved = "no step is finished, so there is nothing to save"
        elif isinstance(error, BrokenWeights):
            saved = "no checkpoint is saved: its weights are broken"
        elif self.twin is not None and self.twin.version != self.step:
            saved = "no checkpoint is saved: the second copy has not finished this step"
        else:
            try:
                await self._save(final=True)
                saved = f"a checkpoint of step {self.step} is saved"
            except (BrokenWeights, CheckpointError, ActorDied, Overdue) as failure:
                saved = f"no checkpoint is saved: {failure}"
        if isinstance(error, LearnerError | LogpGapError):
            action = f"{saved}; the run ends"
            self.parts.log.event("fault/learner", part="learner", what=str(error), action=action)
        self.parts.progress.note(f"{type(error).__name__} after step {self.step}; {saved}")

    async def _restore(self, found: Checkpoint) -> None:
        await self.parts.channel.before_step()
        self.step = await self.parts.learner.restore(str(found.path))
        if self.twin is not None:
            await self.twin.restore(self.step)
        self.sampler.load_state_dict(found.meta["sampler"])
        self.redo = [(epoch, row) for epoch, row in found.meta["outstanding"]]
        self.dropped.extend((epoch, row, reason) for epoch, row, reason in found.meta["dropped"])
        self.slots.counts.update(found.meta["counts"])
        self.parts.rewards.load_state_dict(found.meta["rewards"])
        self.replay.load_state_dict(found.meta["replay"], {p.id: p for p in self.prompts})
        self.saver.saved_at = self.step
        history = [r for r in read_jsonl(self.parts.log.run_dir / METRICS_FILE) if r["step"] <= self.step]
        self.guards = Guards(self.config.guards, self.config.rollout.staleness, history, online=True)
        self.parts.log.event("checkpoint/restored", step=self.step, path=str(found.path))
        self.parts.progress.note(f"resumed at step {self.step} from {found.path}")

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise RunStopped(self.step or None)

    @property
    def _primary(self) -> str:
        return self.config.rewards.functions[0].label
