"""Evaluation of an offline run on rows that it never trains on: the loss, the algorithm's own measures, and,
where it is asked for, the accuracy of sampled completions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from rft.batch import Batch, Group
from rft.learner.objective import Sums, add_sums
from rft.loops.evaluate import evaluate
from rft.metrics import RunLog
from rft.metrics.step import sample_rows
from rft.plan import Plan
from rft.rewards.runner import RewardRunner
from rft.rollout.pool import RolloutPool
from rft.sync.channel import WeightChannel

SampledMetrics = Callable[[int], Awaitable[dict[str, float]]]


@dataclass(frozen=True)
class HeldOut:
    """Held-out groups and when to look at them: every `every` steps, and at the first and last.

    They are split into parts of at least `batch_size` groups, so that losses that compare within a batch have
    something to compare. `generate` samples completions of the present weights at a step and scores them.
    """

    groups: Sequence[Group]
    every: int
    batch_size: int
    share_prefix: bool
    arrange: Callable[[list[Group]], list[Group]]
    generate: SampledMetrics | None = None

    def due(self, step: int, steps: int) -> bool:
        """Whether there is an evaluation after `step` of `steps`."""
        return step == steps or step % self.every == 0

    def batches(self) -> list[Batch]:
        """The groups, laid out in equal parts."""
        parts = max(1, len(self.groups) // self.batch_size)
        return [
            Batch.build(self.arrange(list(self.groups[i::parts])), share_prefix=self.share_prefix)
            for i in range(parts)
        ]

    def metrics(self, parts: Sequence[Sums]) -> dict[str, float]:
        """`eval/...`: means over all units of all parts; a measure without a unit is left out."""
        sums = add_sums(parts)
        found = {f"eval/{name}": total / count for name, (total, count) in sums.items() if count}
        return {**found, "eval/examples": float(len(self.groups))}


@dataclass(frozen=True)
class Sampled:
    """Accuracy of completions to the plan's held-out prompts, sampled by engines from the present weights."""

    plan: Plan
    pool: RolloutPool
    channel: WeightChannel
    rewards: RewardRunner
    log: RunLog

    async def __call__(self, step: int) -> dict[str, float]:
        """Push the learner's weights, which are those after `step`, then sample and score."""
        config = self.plan.config
        assert self.plan.eval_prompts is not None
        await self.channel.push(step)
        metrics, judged = await evaluate(
            self.pool.generate,
            self.rewards,
            self.plan.tokenizer,
            self.plan.eval_prompts.prompts,
            config.eval,
            primary=config.rewards.functions[0].label,
            max_tokens=config.rollout.sampling.max_completion_length,
            seed=config.seed,
            label=f"eval-{step}",
            progress=step / config.train.steps,
        )
        await self.channel.proved()
        await self.channel.before_step()
        self.log.samples(step, [row for j in judged for row in sample_rows(j, "eval")])
        return metrics
