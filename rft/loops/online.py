"""The online loop: rollout -> reward -> train -> weight sync -> log -> save.

The controller owns the order and nothing else. It is one asyncio loop without threads: a task per prompt
in flight (left), and the loop that trains whenever a batch of scored groups is ready (right). `staleness`
0 is synchronous, more is asynchronous: one code path. The policy version is the number of finished steps.

    PromptSampler (data)                            Controller.run: _one_step, once per policy version
         | row                                           |
         v                                               v
    _hand_out: lease a slot (SlotBuffer),           1 _next_works: wait for `batch` scored slots; raise the
         | dispatch it with the held version v           |   error of any task
         v                                               | groups
    _serve: one task per prompt                          v
         | prompt                                   2 Batch.build: all groups flat
         v                                               | batch
    GroupSampler.sample (rollout/sample.py)          ----|---- gate held: no replica is rebuilt -----------
         |   Fleet.generate -> RolloutPool               v
         |     -> engine: Ray actor, vLLM | hf      3 Fleet.before_step: wait for the proof of push v; take
         |     tokens, log-probs, versions               |   over a shared device
         |   judge -> RewardRunner                       v
         |     -> reward workers (processes)        4 LearnerHandle.step(batch, v): the ranks, Ray actors:
         | group                                         |   advantages, loss, backward, update: version v + 1
         v                                               v
    _keep_or_drop: fill the slot, or drop the        5 Fleet.push(v + 1) -> WeightChannel: announce, pause,
             group and hand out another prompt           |   send, finish, resume: the engines hold v + 1
                                                     ----|--------------------------------------------------
                                                         v
                                                    6 free the trained slots, drop groups that are too old
                                                         v
    _hand_out  <----------------------------------- 7 hand out: engines sample with v + 1 from here on,
                                                         |   while the step is written down
                                                         v
                                                    8 metrics, samples, Saver (background), Guards

1 waits for rollouts, 3 for all engines to score a few fixed tokens (the proof that push v arrived), 5 for
every replica. A group dispatched at version v is trained on by version v + staleness at the latest. When a
replica dies, the gate is taken, it is rebuilt and given the current version, and its requests are sent again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rft.batch import Batch, Group
from rft.checkpoint import Checkpoint
from rft.data.chat import Renderer
from rft.environments.sources import Environments
from rft.errors import NoSignal, RunStopped
from rft.learner.workers import LearnerHandle
from rft.loops import step_metrics
from rft.loops.evaluate import SampledEvaluation
from rft.loops.recorder import Recorder
from rft.loops.saver import Saver
from rft.metrics import Progress, RunLog
from rft.metrics.guards import Guards
from rft.plan import OnlinePlan
from rft.preflight.data import prompt_sampler
from rft.rewards.runner import RewardRunner
from rft.rollout.buffer import SlotBuffer, State, Work
from rft.rollout.engine import Sampling
from rft.rollout.episodes import EpisodeGroupSampler, Episodes, check_batch, make_episodes
from rft.rollout.fleet import Fleet
from rft.rollout.hooks import LoopHooks
from rft.rollout.pool import RolloutPool
from rft.rollout.sample import GroupSampler
from rft.sync.channel import WeightChannel
from rft.utils.deadlines import unless_stopped
from rft.utils.seeds import derive_seed
from rft.work import shares_prefix

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
    hooks: LoopHooks = field(default_factory=LoopHooks)
    environments: Environments | None = None


@dataclass
class Controller:
    """One online run. `step` counts finished training steps and equals the policy's version."""

    plan: OnlinePlan
    parts: Parts
    checkpoints: Path
    step: int = 0
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        plan, parts = self.plan, self.parts
        config = self.config = plan.config
        self.prompts = plan.train_prompts.prompts
        self.sampler = prompt_sampler(config, self.prompts)
        waits = config.rollout.late == "wait"
        self.slots = SlotBuffer(config.train.batch_size, config.rollout.staleness, waits)
        self.fleet = Fleet(parts.pool, parts.channel, config.rollout, parts.log, parts.progress)
        self.fleets = [self.fleet, *parts.hooks.fleets]
        generate = parts.hooks.route(self.fleet.generate)
        render = Renderer(config.data, plan.tokenizer)
        sampler = (config.algorithm, generate, parts.rewards, render)
        self.groups = GroupSampler(*sampler)
        self.episodes: Episodes | None = None
        if parts.environments is not None:
            self.episodes = make_episodes(config, parts.environments, generate, plan.tokenizer, parts.log)
            self.groups = EpisodeGroupSampler(*sampler, self.episodes)
        self.lockstep = None if self.episodes is None else self.episodes.lockstep
        self.evaluation: SampledEvaluation | None = None
        if plan.eval_sets:
            held_out = (plan.tokenizer, plan.eval_sets, config, parts.log)
            self.evaluation = SampledEvaluation(
                self.fleet.generate, parts.rewards, *held_out, episodes=self.episodes
            )
        self.recorder = Recorder(plan, parts.learner, parts.log)
        self.saver = Saver(parts.learner, self.checkpoints, config, parts.progress, parts.log)
        self.guards = Guards(config.guards, config.rollout.staleness, online=True)
        self.redo: list[tuple[int, int]] = []  # (epoch, row) handed out before and not trained on: next
        self.dropped: deque[tuple[int, int, str]] = deque(maxlen=KEPT_DROPPED)  # epoch, row, reason
        self._late: set[tuple[int, int]] = set()  # prompts whose first group was dropped as too old
        self._tasks: dict[asyncio.Task[None], Work | None] = {}  # and the work that they sample and score
        self._wake = asyncio.Event()  # a task ended
        self._fault: BaseException | None = None  # of the first task that failed
        self._without_signal: Counter[str] = Counter()  # groups in a row that were dropped, by reason
        self._trained: list[Work] = []  # works of the last step, until their slots are freed
        self._line: dict[str, float] = {}  # metrics of the last step, as far as known
        self._scored: list[tuple[Work, Group]] = []  # since the last step
        self._reward_seconds = 0.0  # the slowest group's, since the last step
        self._filtered = 0  # groups, since the last step
        self._lost_workers = 0.0

    # -- the loop ----------------------------------------------------------------------------------

    async def run(self, resume: Checkpoint | None) -> dict[str, float]:
        """Train to the end; returns the last evaluation. Raises RunStopped after a requested stop."""
        await unless_stopped(self._open(resume), self.stop)
        try:
            async with self.saver.save_at_end(self):
                last = await self._evaluate_first()
                self._hand_out()
                while self.step < self.config.train.steps:
                    self._check_stop()
                    last = await self._one_step() or last
                self._check_stop()
                for fleet in self.fleets:
                    async with fleet.gate:
                        await fleet.prove()  # the last version: its evaluation is part of the result
                await self.save(final=True)
                return last
        finally:
            for task in list(self._tasks):
                task.cancel()
            ends = (*self._tasks, *(fleet.close() for fleet in self.fleets))
            await asyncio.gather(*ends, return_exceptions=True)

    async def _one_step(self) -> dict[str, float]:
        """Train on one batch and push the result; returns the evaluation's metrics, {} where none was due."""
        parts, begin = self.parts, time.perf_counter()
        phase = partial(step_metrics.phase, parts.log, parts.progress)
        with phase("rollout", self.step):
            works = await self._next_works()
        waited = time.perf_counter() - begin
        reward_metrics = parts.rewards.take_metrics()
        self._lost_workers, fault = step_metrics.reward_faults(reward_metrics, self._lost_workers)
        if fault:
            parts.log.event("fault/reward", **fault)
        ages = [self.step - w.version for w in works]
        batch = self._build(groups := parts.hooks.select([w.group for w in works if w.group is not None]))
        async with self.fleet.gate:
            with phase("train", self.step):
                try:
                    await self.fleet.before_step()
                    trained = await parts.learner.step(batch, self.step)
                except BaseException:  # a checkpoint that is saved now still names these works
                    self.slots.put_back(works)
                    parts.hooks.step_failed()
                    self.recorder.hold(self.step + 1, works, groups, {})
                    raise
            self.step += 1  # whatever fails from here on: this step's line is written before its checkpoint
            self._trained, self._line = works, {**trained, **reward_metrics}
            self.recorder.hold(self.step, works, groups, trained)
            with phase("sync", self.step):
                report = await self.fleet.push(self.step)
        self.fleet.progressed()
        metrics = self._line
        metrics |= await parts.hooks.after_push(self.step, self._build)
        seconds = time.perf_counter() - begin
        metrics |= {
            **step_metrics.slot_metrics(self.slots, self.sampler),
            **self.fleet.metrics(),
            **({} if self.episodes is None else self.episodes.take_metrics()),
            **report.metrics,
            "group/filtered": float(self._filtered),
            "time/rollout": waited,
            "time/reward": self._reward_seconds,
            "time/checkpoint": self.saver.take_seconds(),
            "time/step": seconds,
        }
        self._reward_seconds, self._filtered = 0.0, 0
        evaluation = await self._evaluate() if self._evaluation_due() else {}

        # All engines hold the new version: free the slots and hand out the next prompts.
        self._free_trained()
        self._observe(self._scored)
        self._drop_late()
        self._hand_out()
        await asyncio.sleep(0)  # the requests go out; the rest is done while engines sample

        metrics |= step_metrics.batch_metrics(works, batch, seconds)
        metrics |= {**step_metrics.age_metrics(ages), **evaluation}
        if parts.log.wants_samples(self.step):
            parts.log.samples(self.step, step_metrics.train_rows(works, self.plan.tokenizer))
        parts.log.log(self.step, metrics)
        self.recorder.flush()
        parts.progress.update(self.step, metrics)
        for message in await parts.learner.pop_messages():
            parts.progress.note(message)
        if self.saver.due(self.step):  # after the log: a kill in between repeats the step, not its line
            await self.save()
        await self.saver.poll()
        self.guards.enforce(self.step, metrics, parts.log, parts.progress)
        return evaluation

    def _free_trained(self) -> None:
        """Free the slots of the groups that the step was trained on, once, and log their prompts."""
        if works := self._trained:
            self.slots.acknowledge()
            prompts, ages = [list(w.key) for w in works], [self.step - 1 - w.version for w in works]
            self.parts.log.event("group/trained", step=self.step, prompts=prompts, ages=ages)
        self._trained = []

    def _observe(self, scored: list[tuple[Work, Group]]) -> None:
        """Show scored groups to the sampler, in ticket order: arrival must not matter. Clears `_scored`."""
        for work, group in sorted(scored, key=lambda pair: pair[0].ticket):
            self.sampler.observe(work.key[1], group, self.config.rewards.primary)
        self._scored = []

    def _build(self, groups: list[Group]) -> Batch:
        share = shares_prefix(groups, self.config.learner.prefix_sharing, self.plan.shape.hidden)
        batch = Batch.build(groups, share_prefix=share)
        if self.episodes is not None:
            check_batch(groups, batch)
        return batch

    async def _next_works(self) -> list[Work]:
        """Wait for a batch of scored works. Raises the error of any task."""
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

    def _evaluation_due(self) -> bool:
        every = self.config.eval.every
        return self.step in (0, self.config.train.steps) or bool(every and self.step % every == 0)

    async def _evaluate_first(self) -> dict[str, float]:
        """Evaluate before the first step of this process, where it is due and not in the log: for a new run,
        or for one that ended before the evaluation did. Returns the evaluation of this version."""
        logged = self.parts.log.resumed_evaluation()
        if logged or not self._evaluation_due():
            return logged
        metrics = await unless_stopped(self._evaluate(), self.stop)
        if metrics or self.step == 0:
            self.parts.log.log(self.step, metrics)
            self.parts.progress.update(self.step, metrics)
        return metrics

    async def _evaluate(self) -> dict[str, float]:
        """Evaluate the current version; {} where evaluation is off, or a stop is requested meanwhile."""
        if self.evaluation is None:
            return {}
        begin = time.perf_counter()
        try:
            metrics = await unless_stopped(self.evaluation.run(self.step), self.stop)
        except RunStopped:
            return {}  # the loop saves and ends
        seconds = metrics["time/eval"] = time.perf_counter() - begin
        accuracy = metrics.get("eval/accuracy")  # None: only named sets are evaluated
        self.parts.log.event("eval/done", step=self.step, accuracy=accuracy, seconds=seconds)
        return metrics

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise RunStopped(self.step or None)

    # -- rollouts ----------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Fill free slots with prompts, as many as the run's last step needs: first those that were handed
        out before, by an interrupted run or for a group that got too old."""
        needed = (self.config.train.steps - self.step) * self.slots.batch
        version = min(fleet.held for fleet in self.fleets)
        while self.slots.free and len(self.slots.live) < needed:
            if self.redo:
                key = self.redo.pop(0)
            else:
                (row,) = self.sampler.next(1)
                key = (self.sampler.epoch, row)
            work = self.slots.lease(key, self.prompts[key[1]])
            self.slots.dispatch(work, version)
            if self.lockstep is not None:
                self.lockstep.enter(f"train-{work.ticket}")
            self._spawn(self._serve(work), work)

    def _spawn(self, body: Coroutine[Any, Any, None], work: Work | None = None) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            del self._tasks[task]
            if work is not None and self.lockstep is not None:
                self.lockstep.leave(f"train-{work.ticket}")
            if not task.cancelled() and task.exception() is not None and self._fault is None:
                self._fault = task.exception()
            self._wake.set()

        task = asyncio.create_task(body)
        self._tasks[task] = work
        task.add_done_callback(ended)

    async def _serve(self, work: Work) -> None:
        """Sample and score one prompt's group."""
        seed = derive_seed(self.config.seed, *work.key, work.version)
        count = self.sampler.generations(work.key[1], self.config.train.num_generations)
        sampling = Sampling.of(self.config.rollout.sampling, count, seed)
        progress = self.step / max(self.config.train.steps, 1)
        name = f"train-{work.ticket}"
        group, seconds = await self.groups.sample(work.prompt, sampling, name, work.version, progress)
        self._reward_seconds = max(self._reward_seconds, seconds)
        self._keep_or_drop(work, await self.parts.hooks.scored(group))

    def _keep_or_drop(self, work: Work, group: Group) -> None:
        """Put a scored group into its slot, or drop it and hand out another prompt. Raises NoSignal after too
        many dropped groups in a row: sampling on would never end."""
        if work.state is State.dropped:
            return
        rewards = [c.reward for c in group.completions if c.reward is not None]
        self._scored.append((work, group))
        if len(rewards) < max(self.config.algorithm.min_generations, 1):
            reason = "unjudged"
        elif not self.config.algorithm.keep_group(rewards):
            reason = "filtered"
            self._filtered += 1
        else:
            self.slots.score(work, group)
            self._without_signal.clear()
            return
        self._drop(work, reason)
        self._without_signal[reason] += 1
        limit = self.config.train.max_filtered * self.config.train.batch_size
        if self._without_signal.total() > limit:
            where = "see the rewards' outcomes" if self.episodes is None else "see fault/... in events.jsonl"
            raise NoSignal(step_metrics.without_signal(self._without_signal, self.step + 1, limit, where))
        self._hand_out()

    def _drop_late(self) -> None:
        """Drop groups that are too old for the next step; each prompt is tried a second time."""
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

    def _drop(self, work: Work, reason: str, again: bool = False) -> None:
        self.slots.drop(work, reason)
        if not again:
            self.dropped.append((*work.key, reason))
        self.parts.log.event("group/dropped", prompt=list(work.key), reason=reason, again=again)

    # -- checkpoints -------------------------------------------------------------------------------

    async def save(self, *, final: bool = False) -> None:
        """Save a checkpoint of this step, once; final: wait until it is complete.

        A checkpoint says that its step is done: the step's line is written before, even where the push or the
        evaluation failed.
        """
        self._free_trained()
        if self._line and self.step > self.parts.log.last_step:
            self.parts.log.log(self.step, self._line)
        self.recorder.flush()
        if final:  # a resumed run samples the outstanding prompts again, but not the dropped ones
            again = set(self.slots.outstanding())
            self._observe([pair for pair in self._scored if pair[0].key not in again])
        meta = {
            "step": self.step,
            "sampler": self.sampler.state_dict(),
            "outstanding": self.slots.outstanding() + self.redo,
            "dropped": list(self.dropped),
            "counts": dict(self.slots.counts),
            "rewards": self.parts.rewards.state_dict(),
            "replay": self.parts.hooks.state_dict(),
        }
        await self.parts.hooks.save(self.step)
        await self.saver.save(self.step, meta, final=final)

    async def _open(self, resume: Checkpoint | None) -> None:
        """Restore the run, push its version to the engines and watch their health."""
        if resume is not None:
            await self._restore(resume)
        await self.recorder.open(self.step)
        for fleet in self.fleets:
            await fleet.open(self.step)
            self._spawn(fleet.watch_health())

    async def _restore(self, checkpoint: Checkpoint) -> None:
        parts, meta = self.parts, checkpoint.meta
        await parts.channel.before_step()
        self.step = await parts.learner.restore(str(checkpoint.path))
        await parts.hooks.restore(self.step)
        parts.hooks.load_state_dict(meta["replay"], {p.id: p for p in self.prompts})
        self.sampler.load_state_dict(meta["sampler"])
        self.redo = [(epoch, row) for epoch, row in meta["outstanding"]]
        self.dropped.extend((epoch, row, reason) for epoch, row, reason in meta["dropped"])
        self.slots.counts.update(meta["counts"])
        parts.rewards.load_state_dict(meta["rewards"])
        self.saver.saved_at = self.step
        self.guards.resume(parts.log.run_dir, self.step)
        parts.log.event("checkpoint/restored", step=self.step, path=str(checkpoint.path))
        parts.progress.note(f"resumed at step {self.step} from {checkpoint.path}")
