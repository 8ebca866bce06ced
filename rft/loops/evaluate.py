"""Held-out evaluation of both loops: accuracy of sampled completions, and the loss on held-out groups."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rft.algorithms.base import Rollout
from rft.batch import Batch, Group, Prompt
from rft.config.schema import Config
from rft.learner.objective import Sums, add_sums
from rft.loops.step_metrics import sample_rows
from rft.metrics import RunLog
from rft.rewards.runner import RewardRunner
from rft.rewards.types import Outcome, SampleReward
from rft.rollout.engine import Generate, Request, Sampling
from rft.rollout.episodes import EpisodeSampler
from rft.rollout.sample import Judged, completions_of, judge
from rft.sync.channel import WeightChannel
from rft.utils.seeds import derive_seed


def is_correct(reward: SampleReward, primary: str) -> bool | None:
    """Whether the primary reward function judged it correct; None where it could not judge. Where the source
    of a mixture is not scored by it, the first reward of the source is the primary one."""
    score = reward.scores.get(primary) or next(iter(reward.scores.values()), None)
    return None if score is None or score.value is None else score.outcome == Outcome.correct


async def evaluate(
    generate: Generate,
    rewards: RewardRunner,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    config: Config,
    *,
    label: str,
    progress: float = 0.0,
    episodes: EpisodeSampler | None = None,
) -> tuple[dict[str, float], list[Judged]]:
    """Measure accuracy over `eval.samples` samples per prompt, pass@k, and greedy accuracy.

    The seeds depend only on the run's seed and the prompt: two policies are evaluated with the same seeds.
    label: distinguishes the requests from others in flight. progress: share of the run that is done, for the
    rewards. episodes: samples in an environment instead. Returns the metrics (`eval/...`) and the judged
    samples.
    """
    settings, primary = config.eval, config.rewards.primary
    max_tokens = config.rollout.sampling.max_completion_length

    async def one(kind: str, prompt: Prompt, sampling: Sampling) -> Judged:
        name = f"{label}-{kind}-{prompt.id}"
        if episodes is not None:
            plan = [Rollout()] * sampling.n
            played = await episodes.sample(name, prompt, plan, sampling, training=False)
            return await episodes.judge(played, rewards, progress, training=False)
        request = Request(name, prompt.tokens, sampling)
        completions = completions_of(await generate(request), tokenizer)
        return await judge(prompt, completions, rewards, progress, training=False)

    work = []
    for p in prompts:
        seed = derive_seed(config.seed, "eval", p.id)
        sampling = Sampling(settings.samples, max_tokens, settings.temperature, settings.top_p, seed=seed)
        work.append(one("sample", p, sampling))
    if settings.greedy:
        work += [one("greedy", p, Sampling(1, max_tokens, temperature=0.0)) for p in prompts]
    judged = await asyncio.gather(*work)
    by_sample, by_greedy = judged[: len(prompts)], judged[len(prompts) :]
    metrics = _accuracy([[is_correct(r, primary) for r in j.rewards] for j in by_sample])
    if by_greedy:
        greedy = _accuracy([[is_correct(r, primary) for r in j.rewards] for j in by_greedy])
        metrics["eval/greedy_accuracy"] = greedy["eval/accuracy"]
    completions = [c for j in by_sample for c in j.completions]
    count = max(len(completions), 1)  # none if an environment failed in every episode
    metrics["eval/length_mean"] = sum(c.num_sampled for c in completions) / count
    metrics["eval/truncated"] = sum(c.finish == "length" for c in completions) / count
    metrics["eval/problems"] = float(len(prompts))
    scores = [r.scores[primary] for j in by_sample for r in j.rewards if primary in r.scores]
    outcomes = Counter(str(score.outcome) for score in scores)
    metrics |= {f"eval/outcome/{k}": v / count for k, v in sorted(outcomes.items())}
    if episodes is not None:
        metrics |= {f"eval/{name}": value for name, value in episodes.take_metrics(training=False).items()}
    return metrics, by_sample


def _accuracy(table: list[list[bool | None]]) -> dict[str, float]:
    """Accuracy and pass@k (k = 1, 2, 4, ...) over prompts; samples that could not be judged are left out."""
    rows = [[x for x in row if x is not None] for row in table]
    judged = [row for row in rows if row]
    if not judged:
        return {"eval/accuracy": math.nan}
    means = torch.tensor([sum(row) / len(row) for row in judged], dtype=torch.float64)
    out = {"eval/accuracy": float(means.mean())}
    if len(judged) > 1:
        out["eval/accuracy_stderr"] = float(means.std() / math.sqrt(len(judged)))
    n = max(len(row) for row in judged)
    k = 2
    while k <= n:
        whole = [row for row in judged if len(row) >= k]
        out[f"eval/pass@{k}"] = sum(pass_at_k(len(row), sum(row), k) for row in whole) / len(whole)
        k *= 2
    out["eval/unjudged"] = float(sum(len(a) - len(b) for a, b in zip(table, rows, strict=True)))
    return out


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased chance that one of k of n samples is correct (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


@dataclass(frozen=True)
class SampledEvaluation:
    """Accuracy of completions to held-out prompts, sampled by the run's engines.

    channel: where the engines hold no current weights (an offline run), the way to push them.
    """

    generate: Generate
    rewards: RewardRunner
    tokenizer: Any
    prompts: Sequence[Prompt]
    config: Config
    log: RunLog
    channel: WeightChannel | None = None
    episodes: EpisodeSampler | None = None

    async def run(self, step: int) -> dict[str, float]:
        """Evaluate the policy after `step` steps; keep some samples in the log."""
        if self.channel is not None:
            await self.channel.push(step)
        parts = (self.generate, self.rewards, self.tokenizer, self.prompts, self.config)
        progress = step / self.config.train.steps
        metrics, judged = await evaluate(
            *parts, label=f"eval-{step}", progress=progress, episodes=self.episodes
        )
        if self.channel is not None:
            await self.channel.proved()
            await self.channel.before_step()
        if self.log.wants_samples(step):
            self.log.samples(step, [row for j in judged for row in sample_rows(j, "eval", self.tokenizer)])
        return metrics


@dataclass(frozen=True)
class HeldOut:
    """The loss and the algorithm's measures on held-out groups of an offline run.

    The groups are split into parts of at least `batch_size` groups, so that losses that compare within a
    batch have something to compare.
    """

    groups: Sequence[Group]
    batch_size: int
    share_prefix: bool
    arrange: Callable[[list[Group]], list[Group]]

    def batches(self) -> list[Batch]:
        """Lay out the groups in equal parts."""
        parts = max(1, len(self.groups) // self.batch_size)
        return [
            Batch.build(self.arrange(list(self.groups[i::parts])), share_prefix=self.share_prefix)
            for i in range(parts)
        ]

    def metrics(self, parts: Sequence[Sums]) -> dict[str, float]:
        """`eval/...`: means over all units of all parts; a measure without a unit is left out."""
        sums = add_sums(parts)
        means = {f"eval/{name}": total / count for name, (total, count) in sums.items() if count}
        return {**means, "eval/examples": float(len(self.groups))}
